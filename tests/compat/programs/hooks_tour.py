"""Everything people do with hooks: add, reset, nest, cache, edit, read gradients, any module."""

from functools import partial

import torch
import torch.nn as nn
from reporting import report

import transformer_lens
import transformer_lens.utils as utils
from transformer_lens import ActivationCache, HookedTransformer, HookedTransformerConfig
from transformer_lens.hook_points import HookedRootModule, HookPoint

cfg = HookedTransformerConfig(
    n_layers=2, d_model=32, n_ctx=24, d_head=8, n_heads=4, d_vocab=50, act_fn="gelu", seed=11
)
model = HookedTransformer(cfg)
tokens = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(5))
report("initial weights", [p.detach().float().norm().item() for p in model.parameters()])
report("parameter names", [name for name, _ in model.named_parameters()])
report("hook names", list(model.hook_dict))
logits = model(tokens)
report("logits", logits[:, -1])

# --- add, look, reset ---------------------------------------------------------------------------
seen = []


def note(activation, hook):
    seen.append((hook.name, tuple(activation.shape)))


model.add_hook("blocks.0.hook_resid_pre", note)
model.add_hook(lambda name: name.endswith("hook_z"), note)
model.add_perma_hook("blocks.1.mlp.hook_post", note)
report("hooks on", [len(hp.fwd_hooks) for hp in model.hook_points()])
model(tokens)
model.reset_hooks()
model(tokens)
report("after reset", [len(hp.fwd_hooks) for hp in model.hook_points()])
model.reset_hooks(including_permanent=True)
report("seen", seen)
report("permanent gone", sum(len(hp.fwd_hooks) for hp in model.hook_points()))


# --- order, nesting, levels ---------------------------------------------------------------------
def times(activation, hook, factor):
    return activation * factor


def plus(activation, hook, amount):
    return activation + amount


name = utils.get_act_name("resid_mid", 0)
both = [(name, partial(times, factor=2.0)), (name, partial(plus, amount=1.0))]
report("in order", model.run_with_hooks(tokens, fwd_hooks=both)[:, -1, :5])
report("other order", model.run_with_hooks(tokens, fwd_hooks=both[::-1])[:, -1, :5])
with model.hooks(fwd_hooks=[both[0]]) as outer:
    with model.hooks(fwd_hooks=[both[1]]):
        report("nested", model(tokens)[:, -1, :5])
        report("levels", [h.context_level for h in model.hook_dict[name].fwd_hooks])
    report("one left", outer(tokens)[:, -1, :5])
t_plain = model(tokens)
torch.testing.assert_close(t_plain, logits)
model.hook_dict[name].add_hook(partial(plus, amount=3.0))
model.hook_dict[name].add_hook(partial(times, factor=0.5), prepend=True)
report("prepended", model(tokens)[:, -1, :5])
model.hook_dict[name].remove_hooks()


def breaks(activation, hook):
    raise RuntimeError("stop here")


try:
    model.run_with_hooks(tokens, fwd_hooks=[(name, breaks)])
except RuntimeError as error:
    report("raised", str(error))
report("clean again", model(tokens)[:, -1, :5])


# --- contexts -----------------------------------------------------------------------------------
def remember(activation, hook):
    hook.ctx["mean"] = activation.mean().item()


def recall(activation, hook):
    return activation + model.hook_dict[name].ctx["mean"]


late = [("blocks.1.hook_resid_post", recall)]
report("context", model.run_with_hooks(tokens, fwd_hooks=[(name, remember), *late])[:, -1, :5])
report("kept", model.hook_dict[name].ctx["mean"])
model.clear_contexts()
report("cleared", model.hook_dict[name].ctx)

# --- caches -------------------------------------------------------------------------------------
_, cache = model.run_with_cache(tokens, names_filter=lambda n: "hook_resid" in n)
report("filtered", list(cache.keys()))
_, cache = model.run_with_cache(
    tokens, names_filter=["blocks.0.attn.hook_q", "ln_final.hook_scale"]
)
report("listed", {key: list(value.shape) for key, value in cache.items()})
_, cache = model.run_with_cache(tokens, pos_slice=-1, names_filter="blocks.1.hook_mlp_out")
report("sliced", cache["mlp_out", 1])
_, plain = model.run_with_cache(tokens[:1], return_cache_object=False, remove_batch_dim=True)
report("a dict", [type(plain).__name__, list(plain["blocks.0.attn.hook_pattern"].shape)])
store: dict = {}
model.add_caching_hooks(lambda n: n.endswith("hook_pattern"), cache=store)
model(tokens)
model.reset_hooks()
report("patterns", store["blocks.1.attn.hook_pattern"][0, 0])
cache_dict, fwd, bwd = model.get_caching_hooks(
    names_filter=lambda n: n.endswith(("attn_out", "mlp_out")), incl_bwd=True
)
with model.hooks(fwd_hooks=fwd, bwd_hooks=bwd):
    model(tokens, return_type="loss").backward()
cache = ActivationCache(cache_dict, model)
report("gradient names", list(cache.keys()))
report("gradients", cache["blocks.0.hook_attn_out_grad"][0, :, :4])
report("weight gradients", model.blocks[0].attn.W_Q.grad[:, :3, :3])
model.zero_grad()
loss, cache = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
report("loss", loss)
report("pattern gradient", cache["blocks.1.attn.hook_pattern_grad"][0, 0])
model.zero_grad()

# --- flags --------------------------------------------------------------------------------------
for flag in ("attn_result", "split_qkv_input", "attn_in", "hook_mlp_in"):
    getattr(model, f"set_use_{flag}")(True)
    _, cache = model.run_with_cache(tokens)
    report(f"with {flag}", sorted(key for key in cache if key.startswith("blocks.0.")))
    getattr(model, f"set_use_{flag}")(False)


def freeze_head_input(activation, hook, head):
    activation[:, :, head] = 0.5
    return activation


model.set_use_split_qkv_input(True)
hook = ("blocks.1.hook_q_input", partial(freeze_head_input, head=2))
report("one head's query input", model.run_with_hooks(tokens, fwd_hooks=[hook])[:, -1, :5])
model.set_use_split_qkv_input(False)


# --- any module ---------------------------------------------------------------------------------
class SquareThenAdd(nn.Module):
    def __init__(self, offset):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset))
        self.hook_square = HookPoint()

    def forward(self, x):
        return self.offset + self.hook_square(x * x)


class TwoLayerModel(HookedRootModule):
    def __init__(self):
        super().__init__()
        self.layer1 = SquareThenAdd(3.0)
        self.layer2 = SquareThenAdd(-4.0)
        self.hook_in = HookPoint()
        self.hook_mid = HookPoint()
        self.hook_out = HookPoint()
        super().setup()

    def forward(self, x):
        x_in = self.hook_in(x)
        x_mid = self.hook_mid(self.layer1(x_in))
        return self.hook_out(self.layer2(x_mid))


small = TwoLayerModel()
out, cache = small.run_with_cache(torch.tensor(5.0))
report("small model", {key: value.item() for key, value in cache.items()})
out = small.run_with_hooks(
    torch.tensor(5.0), fwd_hooks=[("layer1.hook_square", lambda x, hook: torch.tensor(0.0))]
)
report("small model, edited", out)
report("module names", list(small.mod_dict))
report("package", transformer_lens.__name__)


# --- parts replaced -----------------------------------------------------------------------------
class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.hook_doubled = HookPoint()

    def forward(self, x):
        return self.hook_doubled(2 * self.inner(x))


model.blocks[1].mlp = Doubled(model.blocks[1].mlp)
model.setup()
report("with a part replaced", model(tokens)[:, -1, :5])
report("its place", [n for n in model.hook_dict if "doubled" in n])
_, cache = model.run_with_cache(tokens, names_filter="blocks.1.mlp.hook_doubled")
report("what it gave", cache["blocks.1.mlp.hook_doubled"][0, -1])
