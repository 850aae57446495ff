"""`HookPoint`, `HookedRootModule` and the config."""

import random

import torch

from tests.compat.library import Library
from tests.configs import tiny

Z = "blocks.0.attn.hook_z"


def _double(activation, hook):
    return activation * 2


def _with_hook(add):
    """Logits while a hook is on that ``add(model)`` puts there, and how many it left."""

    def call(lens: Library):
        model = lens.fresh("gpt2")
        add(model)
        return model(lens.tokens), [len(point.fwd_hooks) for point in model.hook_points()]

    return call


def _inside(lens: Library):
    model = lens.fresh("gpt2")
    with model.hooks(fwd_hooks=[(Z, _double)]):
        inside = model(lens.tokens), len(model.hook_dict[Z].fwd_hooks)
    return inside, len(model.hook_dict[Z].fwd_hooks), model(lens.tokens)


def _handle(lens: Library):
    point = lens.fresh("gpt2").hook_dict[Z]
    handle = lens("hook_points.LensHandle")(point.register_forward_hook(print), True, 2)
    before = len(point._forward_hooks)
    handle.hook.remove()
    return handle.is_permanent, handle.context_level, before, len(point._forward_hooks)


def _listed(lens: Library):
    model = lens.fresh("gpt2")
    assert isinstance(model, lens("hook_points.HookIntrospectionMixin"))
    model.add_hook(Z, _double)
    return {name: len(handles) for name, handles in model.list_hooks().items()}


def _cleared(method: str):
    def call(lens: Library):
        model = lens.fresh("gpt2")
        model.add_hook(Z, _double)
        model.add_perma_hook("ln_final.hook_scale", _double)
        model.hook_dict[Z].ctx["seen"] = 1
        getattr(model, method)()
        return [len(p.fwd_hooks) for p in model.hook_points()], dict(model.hook_dict[Z].ctx)

    return call


def _cached_by(method: str, *arguments):
    def call(lens: Library):
        model = lens.fresh("gpt2")
        cache = getattr(model, method)(*arguments)
        if isinstance(cache, tuple):
            cache, forward, _ = cache
            model.run_with_hooks(lens.tokens, fwd_hooks=forward)
        else:
            model(lens.tokens)
        return dict(cache)

    return call


def _cache_into(method: str, *arguments):
    def call(lens: Library):
        model, cache = lens.fresh("gpt2"), {}
        with lens.quiet():
            getattr(model, method)(cache, *arguments)
        model(lens.tokens)
        return cache

    return call


def _setup(lens: Library):
    class Net(lens("HookedRootModule.HookedRootModule")):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(3, 3)
            self.hook_mid = lens("hook_points.HookPoint")()
            self.setup()

        def forward(self, x):
            return self.hook_mid(self.first(x)) * 3

    torch.manual_seed(0)
    net = Net()
    out, cache = net.run_with_cache(lens.random(2, 3))
    return out, dict(cache), list(net.hook_dict), list(net.mod_dict)


def _check_and_add(model):
    model.check_and_add_hook(model.hook_dict[Z], Z, _double)


def _point(use):
    """A fresh hook point called ``blocks.3.hook_x``."""

    def call(lens: Library):
        point = lens("hook_points.HookPoint")()
        point.name = "blocks.3.hook_x"
        return use(point, lens.random(2, 3))

    return call


def _added(point, x):
    point.add_hook(_double)
    point.add_hook(lambda tensor, hook: tensor + 1, prepend=True)
    return point(x), len(point.fwd_hooks), [h.is_permanent for h in point.fwd_hooks]


def _permanent(point, x):
    point.add_perma_hook(_double)
    point.remove_hooks()
    return point(x), [h.is_permanent for h in point.fwd_hooks]


def _removed(point, x):
    point.add_hook(_double, is_permanent=True)
    point.add_hook(_double, level=1)
    point.remove_hooks(level=1)
    first = len(point.fwd_hooks)
    point.remove_hooks(including_permanent=True)
    return first, len(point.fwd_hooks)


def _has(point, x):
    empty = point.has_hooks()
    point.add_hook(_double, is_permanent=True)
    return (
        empty,
        point.has_hooks(),
        point.has_hooks(dir="bwd"),
        point.has_hooks(including_permanent=False),
    )


def _context(point, x):
    point.ctx["n"] = 1
    point.clear_context()
    return point.ctx


class _Reversed:
    """A conversion of activations, as TransformerLens' classes are: there and back."""

    def convert(self, x, *context):
        return x.flip(-1)

    def revert(self, x, *context):
        return x.flip(-1)


def _reshaped(point, x):
    point.enable_reshape(_Reversed())
    point.add_hook(lambda tensor, hook: tensor * torch.arange(3.0))
    return point(x)


def _seeded(lens: Library):
    lens.cfg().set_seed_everywhere(11)
    return torch.rand(3), random.random()


def _of_cfg(use, path="config.HookedTransformerConfig"):
    return lambda lens: use(lens(path))


def _shown(cfg):
    fields = dict(cfg.to_dict())
    return {key: fields[key] for key in tiny("gpt2") if key in fields}


CONFIG = {
    "unwrap": _of_cfg(lambda kind: _shown(kind.unwrap(tiny("gpt2")))),
    "from_dict": _of_cfg(lambda kind: _shown(kind.from_dict(tiny("gpt2")))),
    "to_dict": _of_cfg(lambda kind: _shown(kind(**tiny("gpt2")))),
}
BASE = {"d_model": 8, "d_head": 4, "n_layers": 1, "n_ctx": 5, "act_fn": "relu"}


def _of_base(use):
    return _of_cfg(
        lambda kind: {key: use(kind).to_dict()[key] for key in (*BASE, "n_heads", "eps")},
        "config.TransformerLensConfig",
    )


CALLS = {
    "hook_points": {
        "HookPoint": _point(lambda point, x: (point.name, point.ctx, point.fwd_hooks)),
        "LensHandle": _handle,
        "HookIntrospectionMixin": _listed,
    },
    "hook_points.HookPoint": {
        "add_hook": _point(_added),
        "add_perma_hook": _point(_permanent),
        "remove_hooks": _point(_removed),
        "has_hooks": _point(_has),
        "clear_context": _point(_context),
        "enable_reshape": _point(_reshaped),
        "forward": _point(lambda point, x: point.forward(x)),
        "layer": _point(lambda point, x: point.layer()),
    },
    "hook_points.HookIntrospectionMixin": {"list_hooks": _listed},
    "HookedRootModule": {"HookedRootModule": _setup},
    "HookedRootModule.HookedRootModule": {
        "setup": _setup,
        "hook_points": lambda lens: [point.name for point in lens.gpt2.hook_points()],
        "remove_all_hook_fns": _cleared("remove_all_hook_fns"),
        "clear_contexts": _cleared("clear_contexts"),
        "reset_hooks": _cleared("reset_hooks"),
        "check_and_add_hook": _with_hook(_check_and_add),
        "check_hooks_to_add": lambda lens: lens(
            "HookedRootModule.HookedRootModule"
        )().check_hooks_to_add(lens.gpt2.hook_dict[Z], Z, _double),
        "add_hook": _with_hook(lambda model: model.add_hook(Z, _double)),
        "add_perma_hook": _with_hook(lambda model: model.add_perma_hook(Z, _double)),
        "hooks": _inside,
        "run_with_hooks": lambda lens: lens.gpt2.run_with_hooks(
            lens.tokens, fwd_hooks=[(Z, _double), (lambda n: n.endswith("mlp_out"), _double)]
        ),
        "run_with_cache": lambda lens: dict(
            lens.gpt2.run_with_cache(lens.tokens, names_filter=Z, pos_slice=2)[1]
        ),
        "add_caching_hooks": _cached_by("add_caching_hooks", Z),
        "get_caching_hooks": _cached_by("get_caching_hooks", Z),
        "cache_all": _cache_into("cache_all"),
        "cache_some": _cache_into("cache_some", lambda name: name == Z),
    },
    "config.hooked_transformer_config": {
        "HookedTransformerConfig": lambda lens: _shown(lens.cfg("llama")),
    },
    "config.hooked_transformer_config.HookedTransformerConfig": {
        **CONFIG,
        "set_seed_everywhere": _seeded,
        "is_layer_norm_activation": lambda lens: [
            lens.cfg(name).is_layer_norm_activation() for name in ("gpt2", "solu_ln")
        ],
    },
    "config.transformer_lens_config": {
        "TransformerLensConfig": _of_base(lambda kind: kind(**BASE))
    },
    "config.transformer_lens_config.TransformerLensConfig": {
        "unwrap": _of_base(lambda kind: kind.unwrap(BASE)),
        "from_dict": _of_base(lambda kind: kind.from_dict(BASE)),
        "to_dict": _of_base(lambda kind: kind(**BASE)),
    },
}
