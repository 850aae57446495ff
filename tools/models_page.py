"""Write docs/models.md: every family, read from its table and from the cases of its test.

python tools/models_page.py
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fastlens.config import HookedTransformerConfig  # noqa: E402
from fastlens.weights.family import FAMILIES, Family  # noqa: E402
from fastlens.weights.names import AUDIO  # noqa: E402
from fastlens.weights.own_format import as_family_config  # noqa: E402
from tests.weights.families import generated, generated_encoders  # noqa: E402
from tests.weights.published_configs import ANY, DIFFERENT  # noqa: E402

OWN_FORMAT = ("mingpt", "neel")
PAGE = ROOT / "docs" / "models.md"
HEAD = """\
# Models

`fastlens models` lists every name, `fastlens models SEARCH` the names, families and architectures
that contain a word, and `fastlens models NAME --config` shows a model's config without its weights.
Names and aliases are those of TransformerLens 3.9, and more. Any other hub repository, folder or
`.gguf` file of an architecture below loads too, whatever its name.

This page is generated from the tables in `fastlens/weights/families` and from the cases of their
tests: `python tools/models_page.py`. A test fails where it is not up to date.
"""
HOW = """\
## What "verified" means

A **generated** test builds tiny random models with transformers' own classes, biases and gains
random too, for each case that is listed, saves them to a folder and loads them back. It compares
logits and loss in float32 (at most {logits:g} from Hugging Face) and in float64 ({float64:g}, or
what the family says), the residual stream and its gradients between layers, generation with and
without a KV cache, left and right padding, rows alone and in batches; folded, streamed and bfloat16
weights; the axes of every hook; and for decoders that every site of `patching.sweep` runs by the
wave and gives what hooked runs give. An attribute or a tensor that the table does not account for
must be refused. Encoders: hidden states and heads, padding, hooks, caches, gradients.

**Remote code**: transformers has no class for it, so that TransformerLens 3.9, or another class
that computes the same from the same weights, is the truth. **TransformerLens' own**: toy models
that only its loader reads. Neither counts as verified against Hugging Face.
"""
OTHERS = """\
## Any other architecture

What transformers loads opens with hooks, caches and patching at its own modules' names:

```python
model = HookedModule.from_pretrained("state-spaces/mamba-130m-hf")
output, cache = model.run_with_cache(tokens)
place = "backbone.layers.0.hook_out"
patched = model.run_with_patches(other, patches={place: cache[place]})
```

It lacks TransformerLens' names, weight processing, methods for text, and `patching.sweep`. So do
speech encoders; TransformerLens' names of them are refused with a sentence that says so:
"""
AGREE = """\
## Where a config differs from TransformerLens'

For every architecture and every model that TransformerLens describes by name, a test compares each
config field that it states. Ours differ in these, on purpose; `n_ctx` is always the model's own,
which TransformerLens cuts to keep its masks small.

| models | field | why |
|---|---|---|
"""


def page() -> str:
    """The page's text."""
    families = sorted(FAMILIES, key=lambda family: family.name)
    verified = [family for family in families if tests_of(family) and not is_remote(family)]
    names = sum(len(family.hub_names()) + len(family.aliases) for family in families)
    summary = (
        f"{len(families)} families with {sum(len(f.architectures) for f in families)} architecture "
        f"names; {names} names of models. {len(verified)} families have generated tests against "
        f"Hugging Face; each of the others says what it was compared with.\n"
    )
    how = HOW.format(logits=generated.TOLERANCE, float64=1e-9)
    parts = [
        HEAD,
        summary,
        overview(families),
        how,
        *map(section, families),
        others(),
        differences(),
    ]
    return "\n".join(parts)


def overview(families: list[Family]) -> str:
    """One row a family."""
    rows = ["| family | architectures | loaded by | tests |", "|---|---|---|---|"]
    for family in families:
        link = f"[{family.name}](#{family.name})"
        architectures = ", ".join(f"`{name}`" for name in family.architectures)
        rows.append(f"| {link} | {architectures} | `{family.model_class}` | {short(family)} |")
    return "\n".join(rows) + "\n"


def short(family: Family) -> str:
    """How it is verified, in a few words."""
    count = sum(len(tests.cases) for tests in tests_of(family))
    generated_ones = f"generated, {count} case{'s' if count > 1 else ''}" if count else None
    remote = None
    if is_remote(family):
        remote = "TransformerLens' own" if family.name in OWN_FORMAT else "remote code"
    return ", ".join(filter(None, [generated_ones, remote])) or "written for it"


def section(family: Family) -> str:
    """All that the tables say of one family."""
    module = test_module(family)
    lines = [f"## {family.name}", "", first_line(sys.modules[type_module(family)].__doc__), ""]
    architectures = ", ".join(f"`{one}`" for one in family.architectures)
    lines.append(f"- Architectures: {architectures}, loaded by `{family.model_class}`")
    lines.append(f"- Mechanisms: {', '.join(mechanisms(family))}")
    for tests in tests_of(family):
        truth = "its code, written again" if is_remote(family) else "Hugging Face"
        lines.append(f"- Generated tests against {truth}: {', '.join(tests.cases)}"
                     + exceptions(tests))  # fmt: skip
    if not tests_of(family):
        lines.append(f"- Tests: {first_line(module.__doc__)}")
    text = Path(str(module.__file__)).read_text(encoding="utf-8")
    if "check_same_as_transformerlens(" in text or (
        "_weights(" in text and "transformer_lens" in text
    ):
        lines.append("- Weights compared with TransformerLens' converter")
    lines.append(
        f"- BOS in front of text by default: {'yes' if family.default_prepend_bos else 'no'}"
    )
    if family.gguf:
        lines.append(f"- GGUF files: {', '.join(f'`{name}`' for name in family.gguf)}")
    if family.hub_names():
        lines += ["- Names:", "", *(f"    - {name}" for name in names_of(family))]
    return "\n".join(lines) + "\n"


def exceptions(tests: Any) -> str:
    """Where a family is held to less, as its test says."""
    found = []
    default = generated.FamilyTests.float64_tolerance
    if getattr(tests, "float64_tolerance", default) != default:
        found.append(f"in float64 at most {tests.float64_tolerance:g}")
    if getattr(tests, "fallbacks", None):
        sites = ", ".join(f"`{site}`" for site in sorted(tests.fallbacks))
        found.append(f"not by the wave: {sites}")
    return f" ({'; '.join(found)})" if found else ""


def names_of(family: Family) -> Iterator[str]:
    """A repository and its aliases."""
    for repository in sorted(family.hub_names(), key=str.lower):
        also = [alias for alias, target in family.aliases.items() if target == repository]
        aliases = ", ".join(f"`{alias}`" for alias in also)
        yield f"`{repository}`" + (f" ({aliases})" if aliases else "")


def others() -> str:
    """HookedModule, and the audio names."""
    return OTHERS + "\n" + ", ".join(f"`{name}`" for name in sorted(AUDIO)) + ".\n"


def differences() -> str:
    """The table of explained differences."""
    rows = [
        f"| {'all' if who == ANY else f'`{who}`'} | `{field}` | {why} |"
        for (who, field), why in DIFFERENT.items()
    ]
    return AGREE + "\n".join(rows) + "\n"


# -- what is read ---------------------------------------------------------------------------------


def type_module(family: Family) -> str:
    """The module that holds a family's table."""
    return f"fastlens.weights.families.{family.name.replace('-', '_')}"


def test_module(family: Family) -> Any:
    """The test file of a family."""
    return importlib.import_module(f"tests.weights.families.test_{family.name.replace('-', '_')}")


def tests_of(family: Family) -> list[Any]:
    """The generated tests of a family."""
    kinds = (generated.FamilyTests, generated_encoders.EncoderTests)
    return [
        value
        for value in vars(test_module(family)).values()
        if isinstance(value, type)
        and issubclass(value, kinds)
        and value not in kinds
        and getattr(value, "family", None) is family
    ]


def is_remote(family: Family) -> bool:
    """Whether transformers has no class for it."""
    import transformers

    return not hasattr(transformers, family.architectures[0])


def first_line(text: str | None) -> str:
    """The first sentence or sentences of a docstring."""
    return (text or "").strip().split("\n\n")[0].replace("\n", " ")


def mechanisms(family: Family) -> list[str]:
    """What the configs of the tests' cases, or the table's defaults, switch on."""
    found: dict[str, None] = {}
    for fields in configs(family):
        found |= dict.fromkeys(words(fields))
    return list(found)


def configs(family: Family) -> Iterator[dict[str, Any]]:
    """Config fields of every case; of the defaults where there is none."""
    import transformers

    transformers.logging.set_verbosity_error()
    for tests in tests_of(family):
        for case, arguments in tests.cases.items():
            if hasattr(tests, "transformers_model"):
                config = tests.transformers_model(case).config
            else:
                config = getattr(transformers, family.config_class)(**arguments)
            yield family.config_fields(config.to_dict())
    if not tests_of(family):
        config = getattr(test_module(family), "CONFIG", {})
        yield family.config_fields(as_family_config(config, family.name))


def words(fields: dict[str, Any]) -> Iterator[str]:
    """The mechanisms that config fields switch on, in words."""
    blank = {"d_model": 1, "d_head": 1, "n_layers": 1, "n_ctx": 1, "device": "cpu"}
    has = {**vars(HookedTransformerConfig(**blank)), **fields}
    yield from filter(None, [
        {"LN": "LayerNorm", "RMS": "RMSNorm"}.get(has["normalization_type"] or ""),
        "norms before and after sublayers" if has["use_normalization_before_and_after"] else None,
        "norms after sublayers" if has["norm_after_sublayer"] else None,
        "attention and MLP in parallel" if has["parallel_attn_mlp"] else None,
        "grouped key-value heads" if has["n_key_value_heads"] else None,
        f"QK-norm ({has['qk_norm_kind'].replace('_', ' ')})" if has["use_qk_norm"] else None,
        "latent keys and values" if has.get("d_kv_latent") else None,
        "sliding windows" if has["use_local_attn"] else None,
        "attention sinks" if has["use_attention_sinks"] else None,
        "clipped queries, keys and values" if has["clip_qkv"] else None,
        "soft-capped scores" if has["attn_scores_soft_cap"] > 0 else None,
        "soft-capped logits" if has["output_logits_soft_cap"] > 0 else None,
        *positions(has),
        "experts" if has["num_experts"] else None,
        f"{'gated ' if has['gated_mlp'] else ''}MLP ({has['act_fn']})",
    ])  # fmt: skip


def positions(has: dict[str, Any]) -> Iterator[str | None]:
    """How positions enter."""
    kind = has["positional_embedding_type"]
    if kind != "rotary":
        kinds = {"standard": "learned positions", "alibi": "ALiBi", "shortformer": "Shortformer"}
        yield kinds.get(kind, "relative position bias")
        return
    adjacent = " (adjacent pairs)" if has["rotary_adjacent_pairs"] else ""
    partial = "partial " if (has["rotary_dim"] or has["d_head"]) < has["d_head"] else ""
    yield f"{partial}rotary positions{adjacent}"
    yield "layers without positions" if not all(has["rotary_layers"] or [True]) else None
    yield "NTK-by-parts scaling" if has["use_NTK_by_parts_rope"] else None
    yield "YaRN" if has["use_yarn_rope"] else None
    yield "LongRoPE" if has.get("longrope_short_factor") else None
    yield "linear scaling" if has["rotary_scaling_factor"] != 1 else None
    yield "another base in local layers" if has["rotary_base_local"] else None


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
