"""Memory that is lent out for weights and comes back."""

import torch

from fastlens.weights.blocks import Blocks

KINDS = {0: (100_000, torch.float32), 1: (100_000, torch.float32), 2: (7, torch.bfloat16)}


def test_memory_is_used_again():
    blocks = Blocks(torch.device("cpu"))
    taken = blocks.take(KINDS)
    assert {key: (len(block), block.dtype) for key, block in taken.items()} == KINDS
    addresses = {block.data_ptr() for block in taken.values()}
    assert len(addresses) == 3
    lent = [block.t().detach() for block in taken.values()]
    del taken
    blocks.give_back([])
    assert blocks.nbytes == blocks.fitting(KINDS) == 0
    while lent:
        blocks.give_back([lent.pop()])
    assert blocks.nbytes == blocks.fitting(KINDS) == 800_014
    assert blocks.fitting({5: (100_000, torch.float32)}) == 400_000
    assert blocks.fitting({5: (100_000, torch.int32)}) == 0
    again = blocks.take(KINDS)
    assert {block.data_ptr() for block in again.values()} == addresses
    assert blocks.nbytes == 0


def test_what_somebody_looks_into_is_left_alone():
    blocks = Blocks(torch.device("cpu"))
    block = blocks.take({0: (100, torch.float32)})[0]
    view = block.view(10, 10)[3]
    blocks.give_back([block])
    assert blocks.nbytes == 0
    del view
    blocks.give_back([block])
    assert blocks.nbytes == 400
    blocks.drop()
    assert blocks.nbytes == 0
