"""SmolLM2-135M as transformers has it, from the weights that fastlens read.

transformers could read the same GGUF file, in a minute; this takes a second, and the weights are
the same by construction.
"""

from typing import Any

import torch

from fastlens import HookedTransformer


@torch.no_grad()
def hugging_face_twin(model: HookedTransformer) -> Any:
    """A `LlamaForCausalLM` with the weights of an unprocessed Llama without biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    cfg = model.cfg
    twin = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=cfg.d_model,
            num_hidden_layers=cfg.n_layers,
            num_attention_heads=cfg.n_heads,
            num_key_value_heads=cfg.n_key_value_heads,
            intermediate_size=cfg.d_mlp,
            vocab_size=cfg.d_vocab,
            max_position_embeddings=cfg.n_ctx,
            rms_norm_eps=cfg.eps,
            rope_parameters={"rope_theta": float(cfg.rotary_base), "rope_type": "default"},
            attn_implementation="sdpa",
            use_cache=False,
        )
    )
    twin.model.embed_tokens.weight.copy_(model.W_E)
    twin.lm_head.weight.copy_(model.W_U.T)
    twin.model.norm.weight.copy_(model.ln_final.w)
    for block, layer in zip(model.blocks, twin.model.layers, strict=True):
        attn = block.attn
        for name, w in (("q", attn.W_Q), ("k", attn._W_K), ("v", attn._W_V)):
            weight = getattr(layer.self_attn, f"{name}_proj").weight
            weight.copy_(w.transpose(1, 2).reshape(weight.shape))
        layer.self_attn.o_proj.weight.copy_(attn.W_O.flatten(0, 1).T)
        layer.mlp.gate_proj.weight.copy_(block.mlp.W_gate.T)
        layer.mlp.up_proj.weight.copy_(block.mlp.W_in.T)
        layer.mlp.down_proj.weight.copy_(block.mlp.W_out.T)
        layer.input_layernorm.weight.copy_(block.ln1.w)
        layer.post_attention_layernorm.weight.copy_(block.ln2.w)
    return twin.eval()
