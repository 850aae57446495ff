"""Which layers have which tensors, where the first are dense."""

from fastlens.weights.late_mixtures import first_dense, mixed_keys, mixture_fields
from fastlens.weights.llama_like import M, keys

CONFIG = {
    "num_hidden_layers": 4, "first_k_dense_replace": 2, "intermediate_size": 48,
    "moe_intermediate_size": 10, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
}  # fmt: skip


def test_which_layers_are_dense():
    is_dense = first_dense(3)
    assert [is_dense({}, layer) for layer in range(5)] == [True, True, True, False, False]
    assert [is_dense({"first_k_dense_replace": 1}, layer) for layer in range(2)] == [True, False]
    assert not is_dense({"first_k_dense_replace": None}, 0)


def test_fields():
    fields = mixture_fields({}, CONFIG)
    assert (fields["d_mlp"], fields["d_mlp_dense"], fields["d_shared_expert"]) == (10, 48, 20)
    assert (fields["n_dense_layers"], fields["num_experts"]) == (2, 8)
    assert mixture_fields({"n_shared_experts": None}, CONFIG)["d_shared_expert"] is None
    dense = mixture_fields({"first_k_dense_replace": 4}, CONFIG)
    assert dense == {"d_mlp": 48, "d_mlp_dense": 48}


def test_tensors_of_dense_layers_and_of_mixtures():
    found = mixed_keys(keys(), 2)
    layers = {
        name: [layer for layer in range(4) if key.in_layer is None or key.in_layer({}, layer)]
        for name, key in found.items()
        if key is not None
    }
    assert layers[M + "gate_proj.weight"] == layers[M + "down_proj.weight"] == [0, 1]
    assert found[M + "gate_proj.weight"].axes == "d_mlp_dense d_model"
    for name in ("gate.weight", "experts.gate_up_proj", "experts.{e}.up_proj.weight",
                 "shared_experts.down_proj.weight", "gate.e_score_correction_bias"):  # fmt: skip
        assert layers[M + name] == [2, 3], name
    assert layers["layers.{l}.self_attn.q_proj.weight"] == [0, 1, 2, 3]
    assert M + "gate.e_score_correction_bias" not in mixed_keys(keys(), 2, has_bias=False)
