"""What tests/model/test_hooked_encoder_decoder.py does not compare."""

import copy
from unittest import mock

import torch

from tests.compat.library import Library
from tests.t5 import hf_t5, ours_t5, t5_tokenizer, theirs_t5


def _fresh(lens: Library):
    return ours_t5() if lens.is_ours else theirs_t5()


def _moved(lens: Library):
    model = _fresh(lens).to(torch.float64)
    return {key: str(value.dtype) for key, value in model.named_parameters()}


def _loaded(lens: Library):
    model = hf_t5()
    config = copy.deepcopy(model.config)
    config.architectures, config.n_positions = ["T5ForConditionalGeneration"], 40
    # TransformerLens asks the hub for the config even so.
    found = mock.patch("transformers.AutoConfig.from_pretrained", return_value=config)
    with found, lens.quiet():
        made = lens("HookedEncoderDecoder").from_pretrained(
            "t5-small", hf_model=model, tokenizer=t5_tokenizer(), device="cpu"
        )
    tokens = torch.tensor([[3, 4, 5, 1]])
    return dict(made.named_parameters()), made(tokens, decoder_input=torch.tensor([[0, 7]]))


CALLS = {
    "HookedEncoderDecoder.HookedEncoderDecoder": {
        "from_pretrained": _loaded,
        "to": _moved,
        "cpu": lambda lens: str(_fresh(lens).cpu().cfg.device),
    },
}
