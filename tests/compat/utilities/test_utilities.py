"""All names of `transformer_lens.utilities` by their paths, their arguments, and values.

The values are those of what lives elsewhere in fastlens, whose own tests compare them in depth.
"""

import importlib
import inspect
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn

import fastlens.devices
from fastlens.compat import utilities as ours
from fastlens.compat.utilities import defaults_utils, devices, initialization_utils
from tests.close import assert_close_to
from tests.fixtures_tokens import TOKENIZERS, gpt2_like, llama_like, reloadable

COMPARED = [
    "transformer_lens.utilities.components_utils.get_act_name",
    "transformer_lens.utilities.defaults_utils.LocallyOverridenDefaults",
    "transformer_lens.utilities.defaults_utils.USE_DEFAULT_VALUE",
    "transformer_lens.utilities.defaults_utils.override_or_use_default_value",
    "transformer_lens.utilities.devices.ModelWithCfg",
    "transformer_lens.utilities.devices.get_device",
    "transformer_lens.utilities.devices.move_to_and_update_config",
    "transformer_lens.utilities.devices.warn_if_mps",
    "transformer_lens.utilities.initialization_utils.NonlinearityType",
    "transformer_lens.utilities.initialization_utils.calc_fan_in_and_fan_out",
    "transformer_lens.utilities.initialization_utils.init_kaiming_normal_",
    "transformer_lens.utilities.initialization_utils.init_kaiming_uniform_",
    "transformer_lens.utilities.initialization_utils.init_xavier_normal_",
    "transformer_lens.utilities.initialization_utils.init_xavier_uniform_",
    "transformer_lens.utilities.lm_utils.lm_accuracy",
    "transformer_lens.utilities.lm_utils.lm_cross_entropy_loss",
    "transformer_lens.utilities.slice.Slice",
    "transformer_lens.utilities.slice.Slice.apply",
    "transformer_lens.utilities.slice.Slice.indices",
    "transformer_lens.utilities.slice.Slice.unwrap",
    "transformer_lens.utilities.tokenize_utils.get_attention_mask",
    "transformer_lens.utilities.tokenize_utils.get_input_with_manually_prepended_bos",
    "transformer_lens.utilities.tokenize_utils.get_tokenizer_with_bos",
    "transformer_lens.utilities.tokenize_utils.get_tokens_with_bos_removed",
]

# What is of TransformerLens' bridge alone, or only its loader's.
NOT_HERE = {
    "multi_gpu": {
        "cast_floating_params_to_dtype",
        "find_misplaced_modules",
        "maybe_cast_floating_params",
    },
    "hf_utils": {
        "autoconfig_with_remote_post_init_compat",
        "autotokenizer_with_special_token_compat",
        "make_post_init_kwarg_tolerant",
    },
}
MODULES = (
    "activation_functions addmm attention attribute_utils cache components_utils defaults_utils "
    "devices exploratory_utils gpu_utils hf_utils initialization_utils library_utils lm_utils "
    "logits_utils matrix multi_gpu parameter_swap quantization slice tensors tokenize_utils "
    "typed_module_list"
).split()


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"no utils\.to_nunpy .* Nearest: 'to_numpy'"):
        _ = ours.to_nunpy
    with pytest.raises(ImportError):
        from fastlens.compat.utilities import evals  # noqa: F401


def public_names(module: Any) -> set[str]:
    """What a module defines itself: functions, classes and values, not what it imports."""
    names = set()
    for name, value in vars(module).items():
        if (
            name.startswith("_")
            or inspect.ismodule(value)
            or name in ("T", "TYPE_CHECKING", "logger")
        ):
            continue
        is_own = getattr(value, "__module__", None) == module.__name__
        if is_own or (name.isupper() and not callable(value)):
            names.add(name)
    return names


@pytest.mark.tl
@pytest.mark.parametrize("name", MODULES)
def test_modules_have_the_names_of_transformer_lens(theirs, name):
    module = importlib.import_module(f"fastlens.compat.utilities.{name}")
    wanted = public_names(theirs(name))
    missing = {other for other in wanted if not hasattr(module, other)}
    assert missing == NOT_HERE.get(name, set())


@pytest.mark.tl
def test_every_name_is_at_the_top(theirs):
    wanted = {
        name
        for name, value in vars(theirs()).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert wanted == set(ours.__all__)


def same_arguments(found: Any, wanted: Any) -> bool:
    """Whether every call that fits ``wanted`` fits ``found``: there may be more, with defaults."""
    theirs = [(p.name, p.kind, p.default) for p in inspect.signature(wanted).parameters.values()]
    parameters = list(inspect.signature(found).parameters.values())
    mine = [(p.name, p.kind, p.default) for p in parameters]
    rest = parameters[len(theirs) :]
    return mine[: len(theirs)] == theirs and all(p.default is not p.empty for p in rest)


@pytest.mark.tl
@pytest.mark.parametrize("name", MODULES)
def test_arguments(theirs, name):
    module = importlib.import_module(f"fastlens.compat.utilities.{name}")
    for thing in public_names(theirs(name)) - NOT_HERE.get(name, set()):
        wanted, found = getattr(theirs(name), thing), getattr(module, thing)
        if inspect.isfunction(wanted):
            assert same_arguments(found, wanted), thing
        elif inspect.isclass(wanted) and not hasattr(wanted, "__protocol_attrs__"):
            # nn.Module's own methods are torch's.
            own = [
                method
                for method, value in vars(wanted).items()
                if inspect.isroutine(value) and (not method.startswith("_") or method == "__init__")
            ]
            for method in own:
                pair = getattr(found, method), getattr(wanted, method)
                assert same_arguments(*pair), f"{thing}.{method}"


# -- values --------------------------------------------------------------------------------------


@pytest.mark.tl
@pytest.mark.parametrize(
    "arguments",
    [
        ("k", 6, "a"), ("pre", 2), ("embed",), ("normalized", 27, "ln2"), ("k6",), ("scale4ln1",),
        ("scale",), ("blocks.0.hook_x",), ("hook_embed",), ("attn", 1), ("mlp_pre", "3"),
        ("resid_pre", 0, "block"), ("result", 1, "attention"), ("q_input", 2),
    ],
)  # fmt: skip
def test_act_names(theirs, arguments):
    assert ours.get_act_name(*arguments) == theirs().get_act_name(*arguments)


@pytest.mark.tl
def test_defaults(theirs):
    tl = theirs("defaults_utils")
    assert defaults_utils.USE_DEFAULT_VALUE is tl.USE_DEFAULT_VALUE
    for default, override in ((True, None), (True, False), (None, 3)):
        found = ours.override_or_use_default_value(default, override=override)
        assert found == tl.override_or_use_default_value(default, override=override)
    seen = []
    for defaults in (ours.LocallyOverridenDefaults, tl.LocallyOverridenDefaults):
        model = SimpleNamespace(
            cfg=SimpleNamespace(default_prepend_bos=True),
            tokenizer=SimpleNamespace(padding_side="right"),
        )
        values = []
        with defaults(model, prepend_bos=False, padding_side="left"):
            values += [model.cfg.default_prepend_bos, model.tokenizer.padding_side]
        with defaults(model, prepend_bos=None):
            values += [model.cfg.default_prepend_bos, model.tokenizer.padding_side]
        for wrong in ({"padding_side": "up"}, {"d_model": 3}):
            with pytest.raises(AssertionError), defaults(model, **wrong):
                pass
        model.tokenizer = None
        with defaults(model, padding_side="left"):
            values.append(model.tokenizer)
        seen.append(values)
    assert seen[0] == seen[1] == [False, "left", True, "right", None]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(device="meta", dtype=torch.float32)
        self.W = nn.Parameter(torch.ones(2, device="cpu"))

    def to(self, device_or_dtype: Any) -> Any:  # type: ignore[override]
        raise AssertionError("not through the model's own `to`")


@pytest.mark.tl
@pytest.mark.parametrize("target", ["cpu", torch.device("cpu"), torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"print_details": False}], ids=repr)
def test_moving(theirs, capsys, target, options):
    seen = []
    for library in (devices, theirs("devices")):
        model = Model()
        assert isinstance(model, library.ModelWithCfg)
        assert not isinstance(model.cfg, library.ModelWithCfg)
        assert library.move_to_and_update_config(model, target, **options) is model
        seen.append((model.cfg, model.W.dtype, model.W.device, capsys.readouterr().out))
    assert seen[0] == seen[1]


@pytest.mark.tl
@pytest.mark.parametrize("has_mps", [False, True])
@pytest.mark.parametrize("allowed", ["", "1"])
@pytest.mark.parametrize("has_cuda", [False, True])
def test_devices(theirs, monkeypatch, has_mps, allowed, has_cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: has_mps)
    monkeypatch.setenv("TRANSFORMERLENS_ALLOW_MPS", allowed)
    assert ours.get_device() == theirs().get_device()


@pytest.mark.tl
@pytest.mark.parametrize("version", ["2.8.0+cpu", "2.13.0"])
@pytest.mark.parametrize("allowed", ["", "1"])
@pytest.mark.parametrize("device", ["mps", torch.device("mps", 0), "cpu", torch.device("cuda", 1)])
def test_warnings_about_mps(theirs, monkeypatch, version, allowed, device):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setenv("TRANSFORMERLENS_ALLOW_MPS", allowed)
    monkeypatch.setattr(fastlens.devices, "_warned", set())
    monkeypatch.setattr(theirs("devices"), "_mps_warned", False)
    monkeypatch.setattr(theirs("devices"), "_mps_broken_torch_warned", False)
    counts = []
    for library in (ours, theirs()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                library.warn_if_mps(device)
        counts.append([warning.category for warning in caught])
    assert counts[0] == counts[1]
    assert bool(counts[0]) == ("mps" in str(device) and (not allowed or version.startswith("2.8")))


@pytest.mark.tl
@pytest.mark.parametrize("shape", [(6,), (6, 8), (3, 6, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_initial_weights(theirs, shape, dtype):
    tl = theirs("initialization_utils")
    assert initialization_utils.NonlinearityType == tl.NonlinearityType
    weight = torch.empty(shape, dtype=dtype)
    fans = initialization_utils.calc_fan_in_and_fan_out(weight)
    assert fans == tl.calc_fan_in_and_fan_out(weight)
    options: list[tuple[str, dict[str, Any]]] = [
        ("init_xavier_uniform_", {}),
        ("init_xavier_normal_", {"gain": 0.7}),
        ("init_kaiming_uniform_", {}),
        ("init_kaiming_normal_", {"mode": "fan_out", "gain": 2.0}),
        ("init_kaiming_uniform_", {"a": 0.3, "nonlinearity": "leaky_relu", "mode": "fan_out"}),
        ("init_kaiming_normal_", {"nonlinearity": "tanh"}),
    ]
    for name, given in options:
        drawn = []
        for library in (initialization_utils, tl):
            torch.manual_seed(0)
            drawn.append(getattr(library, name)(torch.empty(shape, dtype=dtype), **given))
        assert torch.equal(*drawn), name


@pytest.mark.tl
def test_weights_that_have_no_fans(theirs):
    for library in (ours, theirs()):
        for shape in ((), (2, 3, 4, 5)):
            with pytest.raises(ValueError):
                library.calc_fan_in_and_fan_out(torch.empty(shape))


@pytest.mark.tl
@pytest.mark.parametrize("per_token", [False, True])
def test_losses(theirs, per_token):
    logits, tokens = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    found = ours.lm_accuracy(logits, tokens, per_token=per_token)
    assert torch.equal(found, theirs().lm_accuracy(logits, tokens, per_token=per_token))
    for given in (None, mask, mask.bool()):
        found = ours.lm_cross_entropy_loss(logits, tokens, given, per_token)
        wanted = theirs().lm_cross_entropy_loss(logits, tokens, given, per_token)
        assert_close_to(found, wanted, atol=1e-6)


@pytest.mark.tl
@pytest.mark.parametrize(
    "chosen",
    [None, 2, -1, (3,), (1, 4), (None, 4), (0, 5, 2), slice(1, 3), [0, 2, 2], [True] * 5 + [False],
     torch.tensor([1, 3])],
    ids=repr,
)  # fmt: skip
def test_slices(theirs, chosen):
    tensor = torch.arange(24).view(2, 6, 2)
    for make in ("Slice", "unwrap"):
        seen = []
        for library in (ours, theirs()):
            made = library.Slice(chosen) if make == "Slice" else library.Slice.unwrap(chosen)
            # Twice unwrapped is once unwrapped.
            assert library.Slice.unwrap(made) is made
            seen.append((made.apply(tensor, dim=1), made.indices(6), made.mode, repr(made)))
        assert torch.equal(seen[0][0], seen[1][0])
        assert (seen[0][1] == seen[1][1]).all()
        assert seen[0][2:] == seen[1][2:]


@pytest.mark.tl
@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(theirs, name, tmp_path):
    tl, tokenizer = theirs(), reloadable(TOKENIZERS[name](), tmp_path)
    found, wanted = ours.get_tokenizer_with_bos(tokenizer), tl.get_tokenizer_with_bos(tokenizer)
    for text in ("the cat", "", "Hi é"):
        assert found.encode(text) == wanted.encode(text)
    for text in ("the cat", ["the", "cat"]):
        found = ours.get_input_with_manually_prepended_bos(tokenizer.bos_token, text)
        assert found == tl.get_input_with_manually_prepended_bos(tokenizer.bos_token, text)


@pytest.mark.tl
@pytest.mark.parametrize("make", [gpt2_like, llama_like])
@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("prepend_bos", [True, False])
def test_masks(theirs, make, side, prepend_bos):
    tokenizer = make()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    rows = [[bos, 5, 6, 7], [pad, bos, 5, 6], [bos, 5, pad, pad], [bos, 5, pad, 6]]
    tokens = torch.tensor(rows)
    found = ours.get_attention_mask(tokenizer, tokens, prepend_bos, padding_side=side)
    wanted = theirs().get_attention_mask(tokenizer, tokens, prepend_bos, padding_side=side)
    # TransformerLens takes the last text token of a row without pads for BOS: a no-op there.
    assert torch.equal(found, wanted)
    found = ours.get_tokens_with_bos_removed(tokenizer, tokens, padding_side=side)
    wanted = theirs().get_tokens_with_bos_removed(tokenizer, tokens, padding_side=side)
    assert torch.equal(found, wanted)
    assert torch.equal(tokens, torch.tensor(rows))
