"""Which weights are read when, and which are let go."""

import pytest
import torch

from fastlens import HookedTransformer
from fastlens.config import HookedTransformerConfig
from fastlens.errors import MemoryLimitError
from fastlens.weights import fold
from fastlens.weights.files import CHUNK_BYTES
from fastlens.weights.on_demand import parameters_on_meta
from fastlens.weights.source import open_source
from fastlens.weights.stream import StreamedGroup, WeightStream
from tests.weights.checkpoints import save_folder

FLAGS = {"fold_ln": True, "center_writing_weights": True, "center_unembed": True,
         "fold_value_biases": True, "refactor_factored_attn_matrices": False}  # fmt: skip


class Recorded:
    """A source that says what was read of it."""

    def __init__(self, source):
        self.source = source
        self.read: list[str] = []
        self.error: Exception | None = None

    def __getattr__(self, name):
        return getattr(self.source, name)

    def group(self, name, *args, **kwargs):
        self.read.append(name)
        if self.error is not None:
            raise self.error
        return self.source.group(name, *args, **kwargs)


@pytest.fixture
def opened(tmp_path):
    source = open_source(save_folder(tmp_path / "gpt2", "gpt2_untied"))
    cfg = HookedTransformerConfig(**source.config_fields(), device="cpu", init_weights=False)
    flags = fold.possible_flags(cfg, **FLAGS)
    cfg.normalization_type = "LNPre"
    return Recorded(source), cfg, flags


@pytest.fixture
def make(opened):
    source, cfg, flags = opened

    def made(n_layers: float):
        """A stream that may hold that many layers."""
        with parameters_on_meta():
            model = HookedTransformer(cfg, move_to_device=False)
        sizes: list[int] = []
        stream = WeightStream(
            model, source, flags, torch.device("cpu"),
            allowed=lambda held: int(n_layers * sizes[0]) if sizes else 10**9,
        )  # fmt: skip
        sizes.append(stream.layers[0].nbytes)
        return model, stream, source.read

    return made


def pass_over(model, order):
    for layer in order:
        assert not model.blocks[layer].attn.W_Q.is_meta
    # What is on its way has been asked for.
    return [f"blocks.{layer}" for layer in order]


def settled(stream):
    if stream._coming is not None:
        stream._coming[1].result()


def test_the_next_layer_is_read_meanwhile(make):
    model, stream, read = make(2)
    pass_over(model, [0])
    settled(stream)
    assert read == ["blocks.0", "blocks.1"]
    pass_over(model, [1, 2])
    settled(stream)
    assert read == ["blocks.0", "blocks.1", "blocks.2"]
    assert [group.name for group in stream.groups.values() if group.is_here] == [
        "blocks.1",
        "blocks.2",
    ]


def test_backwards_too(make):
    model, stream, read = make(2)
    pass_over(model, [2, 1])
    settled(stream)
    assert read == ["blocks.2", "blocks.1", "blocks.0"]


def test_with_room_for_one_nothing_is_read_ahead(make):
    model, stream, read = make(1)
    pass_over(model, [0, 1, 2, 0])
    assert read == ["blocks.0", "blocks.1", "blocks.2", "blocks.0"]


def test_what_fits_stays_for_the_next_pass(make):
    model, stream, read = make(2.5)
    pass_over(model, [0, 1, 2, 0, 1, 2])
    settled(stream)
    # One of three has to go each time, and it is never the one that is wanted next.
    assert len(read) <= 5
    model, stream, read = make(3)
    read.clear()
    pass_over(model, [0, 1, 2] * 3)
    assert sorted(read) == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_jump_drops_what_was_read_ahead(make):
    model, stream, read = make(2)
    pass_over(model, [0, 2])
    assert [group.name for group in stream.layers if group.is_here][-1] == "blocks.2"
    assert stream.held <= 2 * stream.layers[0].nbytes


def test_too_little_for_a_layer(make):
    model, stream, _ = make(0.5)
    with pytest.raises(MemoryLimitError, match=r"blocks\.0 takes .* do not fit into max_memory"):
        pass_over(model, [0])


def test_edited_layers_are_named_when_there_is_no_room(make):
    model, stream, _ = make(1)
    model.blocks[0].attn.W_Q.data.zero_()
    with pytest.raises(MemoryLimitError, match=r"Edited weights stay in memory: blocks\.0"):
        pass_over(model, [1])


def test_an_error_ahead_is_raised_when_the_layer_is_wanted(make, opened):
    model, stream, read = make(2)
    pass_over(model, [0])
    settled(stream)
    opened[0].error = OSError("gone")
    # The next one is here already; behind it nothing can be read.
    pass_over(model, [1])
    with pytest.raises(OSError, match="gone"):
        pass_over(model, [2])
    opened[0].error = None
    pass_over(model, [2])


def test_let_go(make):
    model, stream, _ = make(3)
    pass_over(model, [0, 1, 2])
    stream.let_go(keep=stream.layers[0].nbytes)
    assert stream.held <= stream.layers[0].nbytes
    stream.let_go()
    assert stream.held == 0


def test_learned_positions_stand_by_themselves(make):
    model, stream, read = make(3)
    assert isinstance(stream.groups["pos_embed"], StreamedGroup)
    assert not model.pos_embed.W_pos.is_meta
    assert not stream.groups["embed"].is_here
    assert list(stream.groups)[:3] == ["blocks.0", "blocks.1", "blocks.2"]


def test_every_parameter_is_placed(make):
    model, stream, _ = make(3)
    placed = {key for group in stream.groups.values() for key in group.meta}
    assert placed == {name for name, _ in model.named_parameters()}
    # Reading a group never takes less than one part of a file at a time.
    assert stream.transient >= CHUNK_BYTES
