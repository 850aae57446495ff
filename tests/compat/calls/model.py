"""`HookedTransformer`: running, text, weights, processing, flags, devices."""

import torch

from tests.compat.library import Library
from tests.configs import tiny


def _flag(setter: str, flag: str, name: str = "gpt2"):
    """Switch a flag on and run: its activations and the logits."""

    def call(lens: Library):
        model = lens.fresh(name)
        getattr(model, setter)(True)
        logits, cache = model.run_with_cache(lens.tokens)
        return getattr(model.cfg, flag), logits, list(cache.keys())

    return call


def _processed(method: str, **options):
    """A processing step on the model's own state dict."""

    def call(lens: Library):
        state = getattr(lens.gpt2, method)(lens.fresh("gpt2").state_dict(), **options)
        return {key: value for key, value in state.items() if "mask" not in key}

    return call


def _weight(name: str, model: str = "gpt2"):
    return lambda lens: getattr(getattr(lens, model), name)


def _load_and_process(lens: Library):
    model = lens.fresh("gpt2")
    model.load_and_process_state_dict(lens.fresh("gpt2").state_dict())
    return model.cfg.normalization_type, model(lens.tokens), model.W_Q


def _process(lens: Library):
    model = lens.fresh("gpt2")
    model.process_weights_(True, True, True, False)
    return model(lens.tokens), model.W_U


def _init(lens: Library):
    model = lens.fresh("gpt2")
    torch.manual_seed(5)
    model.init_weights()
    return dict(model.named_parameters())


def _fill(lens: Library):
    state = lens.gpt2.state_dict()
    del state["blocks.0.attn.b_Q"]
    return sorted(lens.gpt2.fill_missing_keys(state))


def _refactored(lens: Library):
    model, refactored = lens.gpt2, lens.fresh("gpt2")
    state = model.refactor_factored_attn_matrices(refactored.state_dict())
    refactored.load_state_dict(state)
    # The factors are unique up to signs.
    return refactored.QK.AB, refactored.OV.AB, refactored(lens.tokens)


def _moved(lens: Library):
    model = lens.fresh("gpt2").to(torch.float64)
    return str(model.cfg.dtype), model(lens.tokens).dtype


def _embedded(lens: Library):
    residual, tokens, positions, mask = lens.gpt2.input_to_embed(lens.tokens)
    return residual, tokens, positions, mask


def _offset(lens: Library):
    past = lens("TransformerLensKeyValueCache").init_cache(lens.gpt2.cfg, "cpu", 3)
    before = lens.gpt2.get_pos_offset(past, 3)
    mask = torch.ones_like(lens.tokens)
    lens.gpt2(lens.tokens, past_kv_cache=past, attention_mask=mask)
    return before, lens.gpt2.get_pos_offset(past, 3)


def _runs(lens: Library):
    model, tokens = lens.gpt2, lens.tokens
    both = model(tokens, return_type="both")
    return (
        model(tokens),
        both.logits,
        both.loss,
        model(tokens, return_type="loss", loss_per_token=True),
        model(tokens, stop_at_layer=1),
        model(lens.residual, start_at_layer=1),
        model(tokens, return_type=None),
        lens.llama(tokens),
        lens.attn_only(tokens),
    )


def _check_hooks(lens: Library):
    model = lens.gpt2
    point = model.blocks[0].attn.hook_z
    refused = False
    try:
        model.check_hooks_to_add(
            model.blocks[0].attn.hook_result, "blocks.0.attn.hook_result", print
        )
    except AssertionError:
        refused = True
    return model.check_hooks_to_add(point, "blocks.0.attn.hook_z", print), refused


def _construct(lens: Library):
    with lens.quiet():
        model = lens("HookedTransformer")(tiny("gpt2"))
    return list(model.hook_dict), list(model.state_dict()), model.cfg.to_dict()["n_params"]


CALLS = {
    "HookedTransformer": {
        "HookedTransformer": _construct,
        "Output": lambda lens: lens("HookedTransformer.Output")(torch.ones(2), torch.ones(())),
    },
    "HookedTransformer.HookedTransformer": {
        "forward": _runs,
        "run_with_cache": lambda lens: lens.gpt2.run_with_cache(
            lens.tokens, return_cache_object=False
        ),
        "check_hooks_to_add": _check_hooks,
        "get_pos_offset": _offset,
        "get_residual": lambda lens: lens.gpt2.get_residual(
            lens.gpt2.embed(lens.tokens), 0, return_shortformer_pos_embed=True
        ),
        "input_to_embed": _embedded,
        "loss_fn": lambda lens: lens.gpt2.loss_fn(lens.gpt2(lens.tokens), lens.tokens),
        "to": _moved,
        "cpu": lambda lens: str(lens.fresh("gpt2").cpu().cfg.device),
        "move_model_modules_to_device": lambda lens: lens.fresh(
            "gpt2"
        ).move_model_modules_to_device(),
        "init_weights": _init,
        "load_and_process_state_dict": _load_and_process,
        "fill_missing_keys": _fill,
        "fold_layer_norm": _processed("fold_layer_norm"),
        "center_writing_weights": _processed("center_writing_weights"),
        "center_unembed": _processed("center_unembed"),
        "fold_value_biases": _processed("fold_value_biases"),
        "refactor_factored_attn_matrices": _refactored,
        "process_weights_": _process,
        "set_use_attn_result": _flag("set_use_attn_result", "use_attn_result"),
        "set_use_split_qkv_input": _flag("set_use_split_qkv_input", "use_split_qkv_input"),
        "set_use_hook_mlp_in": _flag("set_use_hook_mlp_in", "use_hook_mlp_in"),
        "set_use_attn_in": _flag("set_use_attn_in", "use_attn_in"),
        "set_ungroup_grouped_query_attention": _flag(
            "set_ungroup_grouped_query_attention", "ungroup_grouped_query_attention", "llama"
        ),
        "n_params_total": _weight("n_params_total"),
        "W_gate": _weight("W_gate", "llama"),
        **{
            name: _weight(name)
            for name in """W_U b_U W_E W_pos W_E_pos W_K W_Q W_V W_O W_in W_out b_K b_Q b_V b_O
            b_in b_out QK OV""".split()
        },
        "accumulated_bias": lambda lens: [lens.gpt2.accumulated_bias(layer) for layer in range(4)],
        "all_composition_scores": lambda lens: [
            lens.gpt2.all_composition_scores(mode) for mode in "QKV"
        ],
        "all_head_labels": lambda lens: lens.gpt2.all_head_labels(),
        "tokens_to_residual_directions": lambda lens: lens.gpt2.tokens_to_residual_directions(
            lens.tokens
        ),
    },
}
