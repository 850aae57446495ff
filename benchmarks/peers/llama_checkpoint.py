"""A Llama-shaped checkpoint of random weights, in shards, as Hugging Face would save it."""

import json
from pathlib import Path
from typing import Any

import torch

from fastlens.weights.native import write_safetensors

SHARD_BYTES = 400_000_000
# Just over two gigabytes of float32.
TWO_GIGABYTES = {
    "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16,
    "num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip
SMALL = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8000,
}  # fmt: skip


def write_llama(folder: Path, sizes: dict[str, int]) -> int:
    """Write the folder; returns the bytes of its weights. Whole folders are left as they are."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {
            **sizes, "architectures": ["LlamaForCausalLM"], "model_type": "llama",
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        index.write_text(json.dumps({"metadata": {}, "weight_map": _shards(folder, sizes)}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _shards(folder: Path, sizes: dict[str, int]) -> dict[str, str]:
    width, hidden = sizes["hidden_size"], sizes["intermediate_size"]
    kv = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    block = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden), "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes["vocab_size"], width)}
    for layer in range(sizes["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": one for name, one in block.items()}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (sizes["vocab_size"], width)}
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        # Gains near one; matrices so that the stream neither dies nor explodes.
        shard[name] = torch.randn(shape) * 0.02 + (1.0 if len(shape) == 1 else 0.0)
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES or name == "lm_head.weight":
            file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            write_safetensors(folder / file, shard)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    return weight_map
