"""A list of modules is one, whatever it says of its elements."""

import pytest
import torch.nn as nn

from fastlens.compat.utilities.typed_module_list import TypedModuleList

COMPARED = ["transformer_lens.utilities.typed_module_list.TypedModuleList"]


@pytest.mark.tl
def test_as_transformer_lens(theirs):
    found, wanted = (
        List[nn.Linear](nn.Linear(2, n) for n in range(1, 4))
        for List in (TypedModuleList, theirs("typed_module_list").TypedModuleList)
    )
    assert isinstance(found, nn.ModuleList)
    assert [module.out_features for module in found] == [1, 2, 3]
    assert repr(found) == repr(wanted) and list(found.state_dict()) == list(wanted.state_dict())
    assert type(found[1:]) is TypedModuleList and len(found[1:]) == len(wanted[1:]) == 2
