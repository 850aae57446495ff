"""Capturing to disk against the forwards alone.

    python benchmarks/capture.py            measure and print
    python benchmarks/capture.py --write    and write the results file
    python benchmarks/capture.py --smoke    the toy model: does the script run?

SmolLM2-135M, float32, `resid_post` of one layer in bf16 to a temporary folder.
Contenders alternate in one process, on the same batches of tokens: forwards that stop behind the
same layer, and `capture_text`, whose bytes are compared with the forwards' activations first. What
`capture_text` does once (digests of weights and text, tokens) is in its time.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.timing import alternating, machine
from fastlens import HookedTransformer
from fastlens.store import Store, capture_text
from fastlens.store.rows import batches, token_rows

RESULTS = Path(__file__).parent / "results" / "cpu-2-cores" / "capture.json"
TEXTS = Path(__file__).parents[1] / "docs"
CONTEXT, BATCH, LIMIT = 256, 2048, 20_000


def texts() -> list[str]:
    """Paragraphs of this project's documentation."""
    pages = sorted(TEXTS.glob("*.md"))
    return [part for page in pages for part in page.read_text(encoding="utf-8").split("\n\n")]


def check_equal(store: Store, name: str, expected: list[torch.Tensor]) -> None:
    """Ends the program if the store has other activations."""
    if len(store) != len(expected):
        sys.exit(f"{len(store)} batches were captured, and {len(expected)} run.")
    for i, activation in enumerate(expected):
        if not torch.equal(store.read(name, i), activation.bfloat16()):
            sys.exit(f"batch {i} of the capture is not what the forward gives.")


def measured(model: Any, layer: int, limit: int, context: int, **options: Any) -> dict[str, Any]:
    """Seconds of both, and their ratio."""
    documents, folder = texts(), Path(tempfile.mkdtemp())
    name = f"blocks.{layer}.hook_resid_post"
    bos = model.cfg.default_prepend_bos
    rows = list(token_rows(documents, model.tokenizer, context, bos, limit=limit))
    tokens = [found.long() for found, _ in batches(rows, BATCH)]

    def forwards() -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(some, stop_at_layer=layer + 1, return_type=None) for some in tokens]

    def captured() -> Store:
        shutil.rmtree(folder)
        return capture_text(
            model,
            documents,
            f"resid_post:{layer}",
            folder,
            dtype="bf16",
            context=context,
            batch=BATCH,
            limit=limit,
        )

    try:
        check_equal(captured(), name, forwards())
        # Held outputs would cost the forwards memory that a capture does not hold.
        timings = alternating(
            {
                "forwards": lambda: forwards() and None,
                "forwards again": lambda: forwards() and None,
                "capture": captured,
            },
            **options,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    base = timings["forwards"].median
    return {
        "machine": machine("cpu"),
        "model": model.cfg.model_name,
        "layer": layer,
        "tokens": sum(some.numel() for some in tokens),
        "seconds": {label: timing.record() for label, timing in timings.items()},
        "ratio": {label: timing.median / base for label, timing in timings.items()},
    }


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    wanted = parser.parse_args(argv)
    name = "toy-induction" if wanted.smoke else "smollm2-135m"
    model = HookedTransformer.from_pretrained(name, device="cpu", verbose=False).eval()
    layer, limit, context = (0, 2000, 64) if wanted.smoke else (8, LIMIT, CONTEXT)
    options = (
        {"seconds": 0.0, "min_rounds": 1, "warm_ups": 0}
        if wanted.smoke
        else {"seconds": 60.0, "min_rounds": 3, "warm_ups": 1}
    )
    record = measured(model, layer, limit, context, **options)
    print(json.dumps(record, indent=1))
    if wanted.write:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
