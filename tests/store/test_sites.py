"""Sites as text."""

import pytest

from fastlens.errors import HookNameError, ShapeError
from fastlens.store.sites import Site, heads_of, parse_sites
from tests.toy import ours_toy


def test_names_layers_and_heads():
    model = ours_toy()
    found = parse_sites("resid_post:-1, pattern:0:[0, 2],hook_embed,blocks.1.hook_mlp_out", model)
    assert found == [
        Site("blocks.1.hook_resid_post", 1),
        Site("blocks.0.attn.hook_pattern", 0, (0, 2)),
        Site("hook_embed", None),
        Site("blocks.1.hook_mlp_out", 1),
    ]
    assert heads_of(found, model) == {0: [0, 2]}
    assert heads_of(found[:1], model) is None
    assert parse_sites([str(site) for site in found[2:]], model) == found[2:]


@pytest.mark.parametrize(
    ("sites", "match"),
    [
        ("", "none is named"),
        ("resid_post:0,resid_post:0", "one twice"),
        ("resid_post:[0", "makes no sense"),
        ("resid_post:9", "layers 0 to 1"),
        ("resid_post:0:[1]", "has none"),
        ("pattern:0:[1],z:0:[2]", "different heads"),
        ("pattern:0:[1],z:0", "different heads"),
    ],
)
def test_what_makes_no_sense(sites: str, match: str):
    with pytest.raises(ShapeError, match=match):
        parse_sites(sites, ours_toy())


def test_a_place_that_is_not_there():
    with pytest.raises(HookNameError, match="Nearest"):
        parse_sites("resid_pots:0", ours_toy())
