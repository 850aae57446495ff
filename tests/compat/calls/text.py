"""`HookedTransformer` on text, with the packaged toy model's tokenizer, and loading."""

from unittest import mock

from tests.compat.library import Library
from tests.toy import ours_toy
from tests.weights.checkpoints import hf_model

TEXT = "the cat sat on the mat"


def _toy(use):
    return lambda lens: use(lens.toy)


def _some_word(model) -> str:
    """A text that is one token of the toy model."""
    return model.tokenizer.decode([model.to_tokens(TEXT)[0, 1].item()])


def _with_tokenizer(lens: Library):
    model = lens.fresh("gpt2", d_vocab=lens.toy.cfg.d_vocab)
    model.set_tokenizer(ours_toy().tokenizer, default_padding_side="left")
    return model.tokenizer.padding_side, model.cfg.tokenizer_prepends_bos, model.to_tokens(TEXT)


def _loaded(method: str, **options):
    """A tiny GPT-2 of transformers, given as ``hf_model``."""

    def call(lens: Library):
        model = hf_model("gpt2")
        model.config.n_ctx = model.config.n_positions
        model.config.architectures = ["GPT2LMHeadModel"]
        # TransformerLens asks the hub for the config even so.
        found = mock.patch("transformers.AutoConfig.from_pretrained", return_value=model.config)
        with found, lens.quiet():
            made = getattr(lens("HookedTransformer"), method)(
                "gpt2", hf_model=model, tokenizer=ours_toy().tokenizer, device="cpu", **options
            )
        state = {key: value for key, value in made.state_dict().items() if "mask" not in key}
        return made.cfg.normalization_type, made.cfg.d_vocab, state, made(lens.tokens)

    return call


CALLS = {
    "HookedTransformer.HookedTransformer": {
        "set_tokenizer": _with_tokenizer,
        "to_tokens": _toy(
            lambda model: (
                model.to_tokens(TEXT),
                model.to_tokens([TEXT, "the"], padding_side="left"),
                model.to_tokens(TEXT, prepend_bos=False),
            )
        ),
        "to_string": _toy(
            lambda model: (
                model.to_string(model.to_tokens(TEXT)),
                model.to_string(model.to_tokens(TEXT)[0]),
            )
        ),
        "to_str_tokens": _toy(
            lambda model: (
                model.to_str_tokens(TEXT),
                model.to_str_tokens(model.to_tokens(TEXT, prepend_bos=False)),
                model.to_str_tokens([TEXT, "the"]),
            )
        ),
        "to_single_token": _toy(lambda model: model.to_single_token(_some_word(model))),
        "to_single_str_token": _toy(lambda model: model.to_single_str_token(5)),
        "get_token_position": _toy(
            lambda model: (
                model.get_token_position(_some_word(model), TEXT),
                model.get_token_position(_some_word(model), TEXT, mode="last"),
            )
        ),
        "from_pretrained": _loaded("from_pretrained"),
        "from_pretrained_no_processing": _loaded(
            "from_pretrained_no_processing", first_n_layers=2, default_prepend_bos=False
        ),
    },
}
