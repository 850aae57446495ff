"""Gemma 3 with images (4B, 12B, 27B, MedGemma): its language model. What sees images is dropped."""

from collections.abc import Iterator
from dataclasses import replace

from fastlens.weights.families import gemma3_text
from fastlens.weights.family import Key


def _both(*names: str) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def _vision() -> Iterator[str]:
    """Every tensor of the image encoder (SigLIP) and of the projection behind it."""
    layer = [*(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")), "layer_norm1",
             "layer_norm2", "mlp.fc1", "mlp.fc2"]  # fmt: skip
    tower = _both("embeddings.patch_embedding", "post_layernorm")
    tower += ["embeddings.position_embedding.weight"]
    tower += _both(*(f"encoder.layers.{{l}}.{name}" for name in layer))
    tower += ["head.probe", "head.attention.in_proj_weight", "head.attention.in_proj_bias"]
    tower += _both("head.attention.out_proj", "head.layernorm", "head.mlp.fc1", "head.mlp.fc2")
    # In memory, in new folders and in those on the hub.
    for prefix in ("model.", ""):
        yield f"{prefix}multi_modal_projector.mm_input_projection_weight"
        yield f"{prefix}multi_modal_projector.mm_soft_emb_norm.weight"
        for name in tower:
            yield f"{prefix}vision_tower.{name}"
            yield f"{prefix}vision_tower.vision_model.{name}"


_TEXT = gemma3_text.FAMILY
KEYS: dict[str, Key | None] = {
    **_TEXT.keys,
    # In folders all of the language model has a name of its own.
    **{f"language_model.model.{name}": key for name, key in _TEXT.keys.items()},
    "language_model.lm_head.weight": _TEXT.keys["lm_head.weight"],
    **dict.fromkeys(_vision()),
}
_NAMES = """gemma-3-4b-pt gemma-3-4b-it gemma-3-12b-pt gemma-3-12b-it gemma-3-27b-pt gemma-3-27b-it
medgemma-4b-pt medgemma-4b-it medgemma-27b-it""".split()

FAMILY = replace(
    _TEXT,
    name="gemma3",
    architectures=("Gemma3ForConditionalGeneration",),
    prefix="model.language_model.",
    nested="text_config",
    # transformers does not cap the logits of this architecture.
    reads=_TEXT.reads - {"final_logit_softcapping"},
    # They say where images go, which cannot be given here.
    ignored=_TEXT.ignored
    | set(
        """vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index
        image_token_id boi_token_id eoi_token_id""".split()
    ),
    keys=KEYS,
    aliases={name: f"google/{name}" for name in _NAMES},
)
