"""Short names of activations: ``("k", 3)`` or ``"k3"`` for ``"blocks.3.attn.hook_k"``."""

import re

_SAME_ACTIVATION = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_SAME_PART = {"a": "attn", "attention": "attn", "m": "mlp", "b": "", "block": "", "blocks": ""}
_OF_ATTENTION = ("q", "k", "v", "z", "rot_q", "rot_k", "result", "pattern", "attn_scores")
_OF_THE_MLP = ("pre", "post", "mid", "pre_linear")
_OF_A_NORM = ("scale", "normalized")


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The full hook name of an activation.

    >>> get_act_name("k", 6), get_act_name("k6"), get_act_name("normalized", 27, "ln2")
    ('blocks.6.attn.hook_k', 'blocks.6.attn.hook_k', 'blocks.27.ln2.hook_normalized')
    >>> get_act_name("embed"), get_act_name("scale"), get_act_name("scale4ln1")
    ('hook_embed', 'ln_final.hook_scale', 'blocks.4.ln1.hook_scale')

    Args:
        name: The activation without ``hook_``. A name that has a dot or starts with ``hook_``,
            given alone, is full already and returned as it is. Letters, digits, letters
            (``"scale4ln1"``) hold the layer and the part too, and override the other arguments.
            ``attn``, ``key``, ``query``, ``value``, ``attn_logits``, ``mlp_pre``, ``mlp_mid``,
            ``mlp_post`` stand for ``pattern``, ``k``, ``q``, ``v``, ``attn_scores``, ``pre``,
            ``mid``, ``post``.
        layer: The block. Without one, ``scale`` and ``normalized`` are those of ``ln_final``.
        layer_type: The part of the block: ``"attn"`` or ``"a"``, ``"mlp"`` or ``"m"``, ``"ln1"``,
            ``"ln2"``, ...; ``"b"`` or ``"block"`` is the block itself. Not needed where the
            activation has only one place (``q``, ``pattern``, ``post``, ...).

    The name is not checked against a model. Rules and aliases are TransformerLens'.
    """
    is_alone = layer is None and layer_type is None
    if is_alone and ("." in name or name.startswith("hook_")):
        return name
    packed = re.match(r"([a-z]+)(\d+)(.*)", name)
    if packed:
        name, layer, layer_type = packed.groups()
    name = _SAME_ACTIVATION.get(name, name)
    if name in _OF_ATTENTION:
        part = "attn"
    elif name in _OF_THE_MLP:
        part = "mlp"
    else:
        part = _SAME_PART.get(layer_type or "", layer_type)
    if name in _OF_A_NORM and layer is None:
        part = f"ln_final.{part}" if part else "ln_final"
    block = "" if layer is None else f"blocks.{layer}."
    return f"{block}{part}.hook_{name}" if part else f"{block}hook_{name}"
