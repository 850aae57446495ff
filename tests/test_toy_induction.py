"""The model inside the package: that it is small, offline, and does what docs rely on it to do."""

import importlib.resources
import importlib.util
import json
import logging
import math
import shutil
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fastlens import HookedTransformer

ROOT = Path(__file__).parents[1]
ASSET = Path(str(importlib.resources.files("fastlens"))) / "assets" / "toy_induction"
MAX_BYTES = 300_000
BOS, PAD, UNK = 0, 2, 3
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
MIN_SCORE = 0.8
# Not from the manual that the model was trained on.
ENGLISH = (
    "It was a quiet morning in the village, and the old woman who kept the shop had already "
    "opened the door."
)


def load(**options: Any) -> HookedTransformer:
    return HookedTransformer.from_pretrained_no_processing(
        "toy-induction", device="cpu", verbose=False, **options
    )


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    return load()


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "tools" / "train_toy_induction.py"
    spec = importlib.util.spec_from_file_location("train_toy_induction", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def repeated_tokens(n: int, *, bos: bool = True, rows: int = 32) -> torch.Tensor:
    """Random characters and the same again."""
    once = torch.randint(UNK + 1, 100, (rows, n), generator=torch.Generator().manual_seed(n))
    tokens = once.repeat(1, 2)
    return torch.cat([torch.full((rows, 1), BOS), tokens], 1) if bos else tokens


def induction_scores(model: HookedTransformer, n: int, *, bos: bool = True) -> torch.Tensor:
    """[layer, head]: mean of A[i, i - (n - 1)] over the repetition."""
    tokens = repeated_tokens(n, bos=bos)
    _, cache = model.run_with_cache(tokens)
    query = torch.arange(n, 2 * n) + bos
    return torch.stack(
        [
            cache["pattern", layer][:, :, query, query - (n - 1)].mean((0, 2))
            for layer in range(model.cfg.n_layers)
        ]
    )


def previous_token_scores(model: HookedTransformer) -> torch.Tensor:
    _, cache = model.run_with_cache(repeated_tokens(50))
    patterns = torch.stack([cache["pattern", layer] for layer in range(model.cfg.n_layers)])
    return patterns.diagonal(-1, dim1=-2, dim2=-1).mean((1, 3))


def repetition_loss(model: HookedTransformer, fwd_hooks: Any = ()) -> tuple[float, float]:
    """Loss on 50 random characters and on their repetition, in nats per token."""
    tokens = repeated_tokens(50)
    losses = model.run_with_hooks(
        tokens, return_type="loss", loss_per_token=True, fwd_hooks=list(fwd_hooks)
    )
    return losses[:, :50].mean().item(), losses[:, 51:].mean().item()


# -- what ships ------------------------------------------------------------------------------


def test_the_folder_is_small_and_holds_no_pickle():
    files = {path.name: path.stat().st_size for path in ASSET.iterdir()}
    assert set(files) == {
        "fastlens.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < MAX_BYTES


def test_the_weights_are_the_parameters_in_float32_and_finite(model):
    with safe_open(ASSET / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(stored) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert stored[name].dtype == torch.float32
        assert stored[name].isfinite().all()
        assert torch.equal(stored[name], parameter)


def test_the_config_says_what_it_is_and_nothing_of_the_machine_that_made_it():
    fields = json.loads((ASSET / "fastlens.json").read_text(encoding="utf-8"))
    assert fields["model_name"] == "toy-induction"
    assert fields["n_layers"] == 2 and fields["attn_only"] is True
    assert fields["positional_embedding_type"] == "standard"
    assert fields["normalization_type"] == "LN"
    assert fields["dtype"] == "float32"
    assert fields["tokenizer_name"] is None
    assert "device" not in fields
    for name in ("fastlens.json", "tokenizer_config.json", "tokenizer.json"):
        text = (ASSET / name).read_text(encoding="utf-8")
        assert str(Path.home()) not in text and str(ROOT) not in text


# -- what it can do --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [32, 50, 63])
def test_two_heads_are_induction_heads(model, n):
    scores = induction_scores(model, n)
    assert scores[1].topk(2).values.min() >= MIN_SCORE
    # Layer 0 cannot know what followed a token.
    assert scores[0].max() < 0.1


def test_induction_heads_need_no_bos(model):
    assert induction_scores(model, 50, bos=False)[1].topk(2).values.min() >= MIN_SCORE


def test_layer_0_has_a_previous_token_head(model):
    scores = previous_token_scores(model)
    assert scores[0].max() >= MIN_SCORE
    assert scores[1].max() < 0.1


def test_a_repetition_is_foretold(model):
    first, second = repetition_loss(model)
    assert first > 4.0
    assert second < 0.2


def test_the_circuit_is_a_circuit(model):
    # Without previous-token heads, induction heads have nothing to match.
    previous = previous_token_scores(model)[0] > 0.25

    def without_previous(z, hook):
        z[:, :, previous] = 0.0
        return z

    _, second = repetition_loss(model, [("blocks.0.attn.hook_z", without_previous)])
    assert second > 2.0


@pytest.mark.parametrize(
    ("text", "following"),
    [("abcabcab", "c"), ("xyzxyzxy", "z"), ("abcdabc", "d"), ("qwertyqwert", "y")],
)
def test_short_patterns_continue(model, text, following):
    assert model.to_string(model(text)[0, -1].argmax()) == following


def test_text_is_better_than_chance(model):
    assert model(ENGLISH, return_type="loss").item() < 0.6 * math.log(model.cfg.d_vocab)


def test_it_generates_characters(model):
    text = model.generate("The ", max_new_tokens=20, do_sample=False, verbose=False)
    assert text.startswith("The ") and len(text) == 24
    assert set(text) <= set(CHARACTERS)


# -- tokens ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        tokenizer = AutoTokenizer.from_pretrained(ASSET)
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert not [record.getMessage() for record in records]
    return tokenizer


@pytest.mark.parametrize(
    "text",
    [CHARACTERS, CHARACTERS[::-1], "a  b   c ", " don't , stop . ", "\n\n x\n", "''``--...!?"],
)
def test_every_character_is_a_token_and_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in ids] == list(text)


def test_the_vocabulary_is_the_model_s(tokenizer, model):
    assert len(tokenizer) == model.cfg.d_vocab == 100
    assert sorted(tokenizer.encode(CHARACTERS)) == list(range(4, 100))
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert named == (BOS, 1, PAD) and tokenizer.unk_token_id == UNK


def test_an_unknown_character_is_unk(tokenizer):
    assert tokenizer.encode("a\u00e9\u65e5\tb") == [70, UNK, UNK, UNK, 71]


def test_text_gets_one_bos_by_default(model):
    assert model.to_tokens("ab").tolist() == [[BOS, 70, 71]]
    assert model.to_tokens("ab", prepend_bos=False).tolist() == [[70, 71]]
    assert model.to_str_tokens("a b") == ["<bos>", "a", " ", "b"]
    assert model.to_string(model.to_tokens("a  b", prepend_bos=False)[0]) == "a  b"
    assert model.to_single_token("a") == 70


def test_padding_on_the_left_changes_nothing(model):
    texts = ["abcabcab", "xyz"]
    tokens = model.to_tokens(texts, padding_side="left")
    assert (tokens[1, :5] == PAD).all()
    logits = model(texts, padding_side="left")
    alone = model(texts[1])
    torch.testing.assert_close(logits[1:, 5:], alone, rtol=0, atol=1e-4)


# -- with the rest of the library ------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-4), ("float64", 1e-9)])
def test_processing_keeps_every_log_probability(dtype, tolerance):
    processed = HookedTransformer.from_pretrained(
        "toy-induction", device="cpu", verbose=False, dtype=dtype
    )
    assert processed.cfg.normalization_type == "LNPre"
    tokens = repeated_tokens(50)
    expected = load(dtype=dtype)(tokens).log_softmax(-1)
    torch.testing.assert_close(processed(tokens).log_softmax(-1), expected, rtol=0, atol=tolerance)


@pytest.mark.tl
def test_transformer_lens_computes_the_same(model):
    tl = pytest.importorskip("transformer_lens")
    fields = {
        name: getattr(model.cfg, name)
        for name in "n_layers d_model n_heads d_head n_ctx d_vocab attn_only act_fn".split()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = tl.HookedTransformer(tl.HookedTransformerConfig(**fields, device="cpu"))
        other.load_state_dict(model.state_dict())
        tokens = repeated_tokens(50)
        torch.testing.assert_close(model(tokens), other(tokens), rtol=0, atol=1e-4)


# -- the script that trains it ---------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_shipped_model_is_what_the_script_would_keep(script, model):
    quality = script.quality_of(model, script.corpus()[-script.HELD_OUT_CHARACTERS :])
    assert quality.shortcomings() == []
    # The script measures what this file measures.
    best = induction_scores(model, 50).max().item()
    assert max(quality.induction[1]) == pytest.approx(best, abs=0.03)
    assert max(quality.previous_token[0]) == pytest.approx(
        previous_token_scores(model).max().item(), abs=0.03
    )


def test_the_script_s_tokenizer_is_the_one_that_ships(script, tmp_path):
    script.make_tokenizer().save_pretrained(tmp_path)
    assert files_of(tmp_path)["tokenizer.json"] == files_of(ASSET)["tokenizer.json"]


def test_a_batch_repeats_where_it_says_so(script):
    generator = torch.Generator().manual_seed(0)
    for stage in script.STAGES:
        repeating = stage.random_rows + stage.copied_rows
        tokens, weights = script.batch_of(stage, script.corpus(), generator)
        assert tokens.shape == (repeating + stage.text_rows, stage.length)
        assert weights.shape == (len(tokens), stage.length - 1)
        assert (tokens[:, 0] == BOS).all() and (tokens[:, 1:] != BOS).all()
        # The first round of a row has the small weight, and is as long as the row's period.
        for row, weight in zip(tokens[:repeating, 1:], weights[:repeating], strict=True):
            period = int((weight < 1).sum())
            assert stage.shortest_period <= period < stage.length - 1
            assert torch.equal(row[period:], row[:-period])
        assert (weights[repeating:] == 1).all()


def test_a_few_steps_make_a_model_that_loads(script, tmp_path, capsys):
    out = tmp_path / "new"
    threads = ["--threads", "1"]
    assert script.main(["--steps", "2", "--out", str(out), *threads]) == 1
    assert not out.exists()
    assert "--force" in capsys.readouterr().out
    assert script.main(["--steps", "2", "--seed", "3", "--out", str(out), "--force", *threads]) == 0
    loaded = HookedTransformer.from_pretrained_no_processing(out, device="cpu", verbose=False)
    assert loaded("abcabc").shape == (1, 7, 100)
    assert set(files_of(out)) == set(files_of(ASSET))


def test_a_better_model_is_not_overwritten(script, tmp_path):
    out = tmp_path / "kept"
    shutil.copytree(ASSET, out)
    before = files_of(out)
    assert script.main(["--steps", "1", "--out", str(out), "--threads", "1"]) == 1
    assert files_of(out) == before


def test_a_time_limit_ends_training(script):
    model = script.new_model(0)
    before = model.W_E.clone()
    script.train(model, script.corpus(), steps=10**9, seconds=0.05)
    assert not torch.equal(model.W_E, before)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
