"""The parts of a run sum to what the run computed, in every kind of model, in float64."""

import functools

import pytest
import torch
from torch import Tensor

from fastlens import HookedTransformer
from fastlens.cache import ActivationCache
from fastlens.components.norms import norm_behind
from fastlens.errors import ConfigError, HookNameError, LayerError, ShapeError
from tests.close import assert_close_to
from tests.configs import TINY_CONFIGS, tiny

CONFIGS = {
    **{name: tiny(name) for name in TINY_CONFIGS},
    "gpt2_folded": tiny("gpt2", normalization_type="LNPre"),
    "llama_folded": tiny("llama", normalization_type="RMSPre"),
    "neox_folded": tiny("neox", normalization_type="LNPre"),
    "final_rms": tiny("gpt2", normalization_type="LNPre", final_rms=True),
    "post_norm_ln": tiny("gpt2", use_normalization_before_and_after=True),
    "split_inputs": tiny("gpt2", use_split_qkv_input=True),
    "attn_result": tiny("llama", use_attn_result=True),
}
every_model = pytest.mark.parametrize("name", sorted(CONFIGS))
POS = 5


@functools.cache
def run(name: str) -> tuple[HookedTransformer, Tensor, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HookedTransformer({**CONFIGS[name], "dtype": torch.float64})
        for parameter in model.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        tokens = torch.randint(0, model.cfg.d_vocab, (2, POS))
        logits, cache = model.run_with_cache(tokens)
    return model, logits.detach(), dict(cache.cache_dict)


def cache_of(name: str) -> ActivationCache:
    model, _, held = run(name)
    return ActivationCache(dict(held), model)


def has_neurons(name: str) -> bool:
    """Whether all tokens pass the same neurons: not in a mixture of experts."""
    return not run(name)[0].cfg.num_experts


def close(ours: Tensor, truth: Tensor) -> None:
    assert_close_to(ours, truth, atol=1e-10)


@every_model
def test_layers_sum_to_the_stream(name):
    cache = cache_of(name)
    n_layers = cache.model.cfg.n_layers
    for layer in range(n_layers):
        close(cache.decompose_resid(layer).sum(0), cache["resid_pre", layer])
    close(cache.decompose_resid().sum(0), cache["resid_post", -1])


@every_model
@pytest.mark.parametrize("expand", [True, False])
def test_heads_neurons_embeddings_and_biases_sum_to_the_stream(name, expand):
    cache, expand = cache_of(name), expand and has_neurons(name)
    for layer in (0, 1):
        stack = cache.get_full_resid_decomposition(layer, expand_neurons=expand)
        close(stack.sum(0), cache["resid_pre", layer])
    stack = cache.get_full_resid_decomposition(expand_neurons=expand, pos_slice=(1, 4))
    close(stack.sum(0), cache["resid_post", -1][:, 1:4])
    stack = cache.get_full_resid_decomposition(expand_neurons=expand, pos_slice=-1)
    close(stack.sum(0), cache["resid_post", -1][:, -1])


@every_model
def test_parts_of_the_mlps_input_sum_to_it(name):
    cache = cache_of(name)
    cfg = cache.model.cfg
    if cfg.attn_only:
        with pytest.raises(LayerError, match="no MLPs"):
            cache.decompose_resid(0, mlp_input=True)
        return
    for layer in range(cfg.n_layers):
        place = "resid_pre" if cfg.parallel_attn_mlp else "resid_mid"
        for stack in (
            cache.decompose_resid(layer, mlp_input=True),
            cache.get_full_resid_decomposition(
                layer, mlp_input=True, expand_neurons=has_neurons(name)
            ),
            cache.get_full_resid_decomposition(layer, mlp_input=True, expand_neurons=False),
        ):
            close(stack.sum(0), cache[place, layer])
        close(cache.accumulated_resid(layer, mlp_input=True)[-1], cache[place, layer])
    for method in (cache.decompose_resid, cache.get_full_resid_decomposition):
        with pytest.raises(LayerError, match=f"the last is {cfg.n_layers - 1}"):
            method(mlp_input=True)


@every_model
def test_normalised_parts_sum_to_what_the_layer_read(name):
    cache = cache_of(name)
    cfg = cache.model.cfg
    read: list[tuple[int, bool, str]] = [(cfg.n_layers, False, "ln_final.hook_normalized")]
    read += [(i, False, f"blocks.{i}.ln1.hook_normalized") for i in range(cfg.n_layers)]
    if not cfg.attn_only:
        read += [(i, True, f"blocks.{i}.ln2.hook_normalized") for i in range(cfg.n_layers)]
    for layer, mlp_input, place in read:
        stream = "resid_mid" if mlp_input and not cfg.parallel_attn_mlp else "resid_pre"
        reads_stream = cfg.norm_after_sublayer and layer < cfg.n_layers
        if cfg.normalization_type is None or reads_stream:
            truth = cache["resid_post", -1] if layer == cfg.n_layers else cache[stream, layer]
        else:
            truth = cache[place]
        if cfg.use_split_qkv_input and place.endswith("ln1.hook_normalized"):
            truth = truth[:, :, 0]
        for stack in (
            cache.decompose_resid(layer, mlp_input=mlp_input, apply_ln=True),
            cache.get_full_resid_decomposition(
                layer, mlp_input=mlp_input, apply_ln=True, expand_neurons=has_neurons(name)
            ),
        ):
            close(stack.sum(0), truth)
        if not mlp_input and layer > 0:
            for stack in (
                cache.stack_head_results(layer, apply_ln=True, incl_remainder=True),
                *(
                    [cache.stack_neuron_results(layer, apply_ln=True, incl_remainder=True)]
                    if not cfg.attn_only and has_neurons(name)
                    else []
                ),
            ):
                close(stack.sum(0), truth)


@every_model
def test_projected_parts_are_the_parts_projected(name):
    cache = cache_of(name)
    directions = torch.randn(32, 3, dtype=torch.float64)
    for mlp_input in (False, not cache.model.cfg.attn_only):
        for apply_ln in (False, True):
            for expand in {False, has_neurons(name)}:
                options = {"mlp_input": mlp_input, "apply_ln": apply_ln, "expand_neurons": expand}
                whole = cache.get_full_resid_decomposition(1, **options)
                for along in (directions, directions[:, 0]):
                    projected = cache.get_full_resid_decomposition(
                        1, **options, project_output_onto=along
                    )
                    close(projected, whole @ along)
    if cache.model.cfg.attn_only or not has_neurons(name):
        return
    for apply_ln in (False, True):
        whole = cache.stack_neuron_results(-1, apply_ln=apply_ln, incl_remainder=True)
        for along in (directions, directions[:, 0]):
            projected = cache.stack_neuron_results(
                -1, apply_ln=apply_ln, incl_remainder=True, project_output_onto=along
            )
            close(projected, whole @ along)


@every_model
def test_heads_and_neurons_with_the_remainder_sum_to_the_stream(name):
    cache = cache_of(name)
    stack, labels = cache.stack_head_results(incl_remainder=True, return_labels=True)
    close(stack.sum(0), cache["resid_post", -1])
    assert labels[-1] == "remainder" and labels[0] == "L0H0"
    close(cache.stack_head_results(0, incl_remainder=True)[0], cache["resid_pre", 0])
    if not cache.model.cfg.attn_only and has_neurons(name):
        stack, labels = cache.stack_neuron_results(1, incl_remainder=True, return_labels=True)
        close(stack.sum(0), cache["resid_pre", 1])
        assert labels[-1] == "remainder" and labels[1] == "L0N1"


@every_model
def test_heads_and_their_bias_sum_to_what_attention_wrote(name):
    cache = cache_of(name)
    block = cache.model.blocks[0]
    written = cache.stack_head_results(1).sum(0) + block.attn.b_O
    behind = norm_behind(cache.model.cfg, "ln1")
    written = written if behind is None else getattr(block, behind)(written)
    close(written, cache["attn_out", 0])


@every_model
def test_labels_count_the_rows(name):
    cache = cache_of(name)
    for method in ("accumulated_resid", "decompose_resid", "get_full_resid_decomposition"):
        options = {"expand_neurons": has_neurons(name)} if method.startswith("get") else {}
        for layer in (0, 1, -1):
            stack, labels = getattr(cache, method)(layer, return_labels=True, **options)
            assert len(stack) == len(labels) == len(set(labels))


def test_experts_have_no_neurons_to_tell_apart():
    cache = cache_of("moe")
    for method in ("stack_neuron_results", "get_full_resid_decomposition"):
        with pytest.raises(ConfigError, match="has no W_out, so it has no neurons"):
            getattr(cache, method)(1)


def test_positions_that_do_not_enter_the_stream_get_no_row():
    labels = cache_of("shortformer").decompose_resid(1, return_labels=True)[1]
    assert labels == ["embed", "0_attn_out", "0_mlp_out"]
    labels = cache_of("gpt2").decompose_resid(1, return_labels=True)[1]
    assert labels == ["embed", "pos_embed", "0_attn_out", "0_mlp_out"]


def test_one_scale_a_head_is_one_scale_unless_the_heads_were_edited():
    cache = cache_of("split_inputs")
    assert cache["scale", 1, "ln1"].shape == (2, POS, 4, 1)
    edited = cache["scale", 1, "ln1"].clone()
    edited[:, :, 2] *= 2
    cache.cache_dict["blocks.1.ln1.hook_scale"] = edited
    with pytest.raises(ShapeError, match="differs between heads"):
        cache.decompose_resid(1, apply_ln=True)


def test_either_name_of_a_stream_will_do():
    cache = cache_of("gpt2")
    whole = cache.accumulated_resid()
    remainder = cache.stack_head_results(1, incl_remainder=True)[-1]
    for i in (1, 2):
        del cache.cache_dict[f"blocks.{i}.hook_resid_pre"]
    close(cache.accumulated_resid(), whole)
    cache = cache_of("gpt2")
    for i in (0, 1):
        del cache.cache_dict[f"blocks.{i}.hook_resid_post"]
    close(cache.stack_head_results(1, incl_remainder=True)[-1], remainder)


def test_of_two_names_the_edited_one_is_read_that_transformer_lens_reads():
    cache = cache_of("gpt2")
    cache.cache_dict["blocks.1.hook_resid_pre"] = torch.ones(2, POS, 32, dtype=torch.float64)
    assert (cache.accumulated_resid(1)[1] == 1).all()
    close(
        cache.stack_head_results(1, incl_remainder=True).sum(0), cache["blocks.0.hook_resid_post"]
    )


def test_an_embedding_that_was_not_cached_is_not_left_out_in_silence():
    cache = cache_of("gpt2")
    del cache.cache_dict["hook_pos_embed"]
    with pytest.raises(HookNameError, match=r"decompose_resid\(\) needs .*'hook_pos_embed'"):
        cache.decompose_resid()
    assert len(cache.decompose_resid(incl_embeds=False)) == 6


@pytest.mark.parametrize("layer", [-2, 4, 100])
def test_layers_that_are_not_there(layer):
    cache = cache_of("gpt2")
    for method in ("accumulated_resid", "decompose_resid", "stack_head_results"):
        with pytest.raises(LayerError, match="give 0 to 3"):
            getattr(cache, method)(layer)
