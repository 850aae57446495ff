"""The snippets of the migration page: those whose library is installed print the same numbers."""

import contextlib
import io
import json
import runpy
import warnings
from pathlib import Path

import pytest
import torch

from tests.fixtures_tokens import gpt2_like

SNIPPETS = Path(__file__).parents[2] / "docs" / "migration"
# The others need an environment of their own; the page says which versions they were run with.
HERE = ["fastlens_any_module", "fastlens_new", "fastlens_same", "transformer_lens_3"]
ELSEWHERE = ["nnsight_", "pyvene_", "transformer_lens_4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which ``gpt2`` is a tiny model, for every library that loads by name."""
    from transformers import GPT2Config, GPT2LMHeadModel

    place = tmp_path_factory.mktemp("migration")
    tokenizer = gpt2_like()
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64, "initializer_range": 0.2}
    end = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end, **shape)
    GPT2LMHeadModel(config).save_pretrained(place / "gpt2")
    tokenizer.save_pretrained(place / "gpt2")
    # Older configs have it, and TransformerLens reads it.
    path = place / "gpt2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_ctx": 64}))
    return place


def printed(name: str) -> dict[str, float]:
    out = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(out):
        warnings.simplefilter("ignore")
        runpy.run_path(str(SNIPPETS / f"{name}.py"))
    lines = [line.rsplit(" ", 1) for line in out.getvalue().splitlines()]
    return {
        text: float(value)
        for text, value in lines
        if text.split(" ")[0] in ("norm", "ablated", "patched")
    }


@pytest.mark.tl
@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_a_snippet_prints_what_the_others_do(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    wanted = printed("fastlens_same")
    assert list(wanted) == ["norm", "ablated", *(f"patched {pos}" for pos in range(7))]
    # The prompts differ from the fourth token on.
    assert wanted["patched 2"] != pytest.approx(wanted["patched 3"], abs=1e-3)
    assert printed(name) == pytest.approx(wanted, abs=1e-5)


def test_every_snippet_is_on_the_page_and_known():
    page = (SNIPPETS.parent / "migration.md").read_text()
    names = {path.stem for path in SNIPPETS.glob("*.py")}
    assert names == {*HERE, *ELSEWHERE}
    assert all(f'"docs/migration/{name}.py"' in page for name in names)
    for name in ELSEWHERE:
        compile((SNIPPETS / f"{name}.py").read_text(), name, "exec")
