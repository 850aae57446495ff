"""Weights after training are TransformerLens'; nothing that was made is lost."""

import dataclasses
import sys
import types
import warnings

import pytest
import torch

from fastlens.errors import ConfigError, MissingDependencyError, SourceError
from fastlens.train import HookedTransformerTrainConfig, train
from tests.close import assert_close_to
from tests.configs import D_VOCAB
from tests.models import ours
from tests.toy import ours_toy, theirs_of

COMPARED = [
    "transformer_lens.train.HookedTransformerTrainConfig",
    "transformer_lens.train.train",
]
OPTIMIZERS = {
    "adam": {"optimizer_name": "Adam"},
    "adamw": {"optimizer_name": "AdamW", "weight_decay": 0.1, "warmup_steps": 3},
    "adam with decay": {"optimizer_name": "Adam", "weight_decay": 0.2, "max_grad_norm": 0.5},
    "adamw without decay": {"optimizer_name": "AdamW", "seed": 5},
    "sgd": {"optimizer_name": "SGD", "momentum": 0.9, "lr": 0.1, "warmup_steps": 2},
    "sgd with decay": {"optimizer_name": "SGD", "weight_decay": 0.01, "max_grad_norm": 1.0},
    "cut short": {"max_steps": 2},
}


class Rows(torch.utils.data.Dataset):
    """Random rows of tokens."""

    def __init__(self, n=11, length=9, d_vocab=D_VOCAB):
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.randint(d_vocab, (n, length), generator=generator)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"tokens": self.rows[index]}


def config(**options):
    return HookedTransformerTrainConfig(
        **{"num_epochs": 2, "batch_size": 4, "device": "cpu", "print_every": None, **options}
    )


def test_a_model_learns_its_data():
    model = ours("gpt2")
    data = Rows()
    before = model(data.rows, return_type="loss")
    assert train(model, config(num_epochs=30, lr=1e-2), data) is model
    assert model.training
    assert model(data.rows, return_type="loss") < before / 2


def test_gradients_from_before_are_not_part_of_it():
    trained = []
    for looked_at_before in (False, True):
        model = ours("gpt2")
        if looked_at_before:
            (100 * model(Rows().rows, return_type="loss")).backward()
        train(model, config(optimizer_name="SGD", lr=0.1, num_epochs=1), Rows())
        trained.append(model.W_E.detach())
    assert torch.equal(*trained)


@pytest.mark.tl
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_weights_as_transformer_lens(name, options, capsys):
    """In float64: Adam makes a whole step of the rounding of a gradient that is really zero."""
    pytest.importorskip("transformer_lens")
    from transformer_lens import train as theirs

    model = ours(name, dtype=torch.float64)
    other = theirs_of(model)
    options = {"print_every": 2, **options}
    given = config(**options)
    copy = dataclasses.replace(given)
    train(model, given, Rows())
    printed = capsys.readouterr().out
    their_config = theirs.HookedTransformerTrainConfig(**dataclasses.asdict(config(**options)))
    theirs.train(other, their_config, Rows())
    losses, their_losses = (
        [line.split("Loss") for line in text.splitlines() if "Loss" in line]
        for text in (printed, capsys.readouterr().out)
    )
    assert [said for said, _ in losses] == [said for said, _ in their_losses] != []
    assert [float(x) for _, x in losses] == pytest.approx([float(x) for _, x in their_losses])
    trained = other.state_dict()
    for key, value in model.state_dict().items():
        assert_close_to(value, trained[key], atol=1e-8, name=key)
    assert given == copy


@pytest.mark.tl
def test_the_config_as_transformer_lens():
    pytest.importorskip("transformer_lens")
    from transformer_lens import train as theirs

    got, want = (
        [(field.name, field.default) for field in dataclasses.fields(cls)]
        for cls in (HookedTransformerTrainConfig, theirs.HookedTransformerTrainConfig)
    )
    assert got == want


def test_padding_is_left_out():
    """A token that only pads is never learned."""
    toy = ours_toy()
    pad = toy.tokenizer.pad_token_id

    class Padded(Rows):
        def __getitem__(self, index):
            tokens = self.rows[index].clone()
            tokens[4:] = pad
            return {"tokens": tokens}

    train(toy, config(lr=1e-2), Padded(d_vocab=2))
    assert toy(torch.tensor([[0, 1, 0]])).argmax(-1).ne(pad).all()
    grown = toy(torch.tensor([[0, 1, 0, 1]])).softmax(-1)[0, -1, pad]
    assert grown < 0.05


# -- checkpoints ---------------------------------------------------------------------------------


def test_checkpoints_are_those_of_transformer_lens(tmp_path):
    folder = tmp_path / "not" / "there"
    model = ours("gpt2")
    train(model, config(save_every=2, save_dir=str(folder), num_epochs=1), Rows())
    assert sorted(path.name for path in folder.iterdir()) == ["model_0.pt", "model_2.pt"]
    last = torch.load(folder / "model_2.pt", weights_only=True)
    for key, value in model.state_dict().items():
        assert torch.equal(last[key], value)


def test_an_interrupted_save_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    model = ours("gpt2")
    options = {"save_every": 1, "save_dir": str(tmp_path), "num_epochs": 1}
    train(model, config(**options), Rows(n=4))
    kept = (tmp_path / "model_0.pt").read_bytes()

    def dies(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        train(model, config(**options), Rows(n=4))
    assert (tmp_path / "model_0.pt").read_bytes() == kept


def test_what_cannot_be_saved_is_said_before_training(tmp_path):
    model = ours("gpt2")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="cannot be written"):
        train(model, config(save_every=1, save_dir=str(tmp_path / "file" / "in")), Rows())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    with pytest.warns(UserWarning, match="save_every without save_dir: no checkpoint"):
        train(model, config(save_every=1, max_steps=0), Rows())
    with pytest.warns(UserWarning, match="save_dir without save_every"):
        train(model, config(save_dir=str(tmp_path), max_steps=0), Rows())


# -- wandb ---------------------------------------------------------------------------------------


def test_wandb_is_told_what_transformer_lens_tells_it(monkeypatch):
    said, started = [], []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: started.append(options)
    fake.log = said.append
    monkeypatch.setitem(sys.modules, "wandb", fake)
    given = config(wandb=True, num_epochs=2)
    train(ours("gpt2"), given, Rows())
    assert started[0]["project"] == "easy-transformer" and given.wandb_project_name is None
    assert started[0]["config"]["batch_size"] == 4
    counts = [(entry["samples"], entry["epoch"]) for entry in said]
    assert counts == [(samples, epoch) for epoch in (1, 2) for samples in (4, 8, 11)]
    assert all(isinstance(entry["train_loss"], float) for entry in said)


def test_wandb_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        train(ours("gpt2"), config(wandb=True), Rows())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_name": "Adamw"}, r"'Adamw' must be one of .*Nearest: 'Adam', 'AdamW'"),
        ({"print_every": 0}, "print_every=0 must be at least 1"),
        ({"save_every": -1}, "save_every=-1"),
    ],
)
def test_settings_out_of_range(options, message):
    with warnings.catch_warnings(), pytest.raises(ConfigError, match=message) as caught:
        train(ours("gpt2"), config(**options), Rows())
    assert isinstance(caught.value, ValueError)
