"""`ActivationCache`, `FactoredMatrix` and the key-value cache."""

import torch

from tests.compat.library import Library


def _cache(use):
    """What ``use`` makes of a cache of its own."""

    def call(lens: Library):
        _, cache = lens.gpt2.run_with_cache(lens.tokens)
        return use(cache, lens)

    return call


def _one_prompt(cache, lens):
    _, single = lens.gpt2.run_with_cache(lens.tokens[:1])
    single.remove_batch_dim()
    return dict(single)


def _grad_off(cache, lens):
    try:
        cache.toggle_autodiff(False)
        return torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def _matrix(use, seed: int = 4):
    """What ``use`` makes of a factored matrix with leading axes."""

    def call(lens: Library):
        matrix = lens("FactoredMatrix")(lens.random(2, 3, 7, 4), lens.random(2, 3, 4, 5, seed=seed))
        return use(matrix)

    return call


def _square(use):
    return lambda lens: use(
        lens("FactoredMatrix")(lens.random(2, 6, 4), lens.random(2, 4, 6, seed=4))
    )


def _rebuilt(matrix):
    """The factors of a singular value decomposition are unique up to signs."""
    u, s, v = matrix.svd()
    return s, u @ torch.diag_embed(s) @ v.mT, u.shape, v.shape


def _eigenvalues(matrix):
    values = matrix.eigenvalues
    order = torch.argsort(values.real * 1000 + values.imag.abs(), dim=-1)
    return torch.take_along_dim(values, order, -1).abs()


def _past(use):
    def call(lens: Library):
        past = lens("cache.key_value_cache.TransformerLensKeyValueCache").init_cache(
            lens.gpt2.cfg, "cpu", 2
        )
        return use(past, lens)

    return call


def _frozen(past, lens):
    tokens, mask = lens.tokens[:2, :4], torch.ones(2, 4, dtype=torch.int64)
    past.freeze()
    lens.gpt2(tokens, past_kv_cache=past, attention_mask=mask)
    frozen = past[0].past_keys.shape
    past.unfreeze()
    lens.gpt2(tokens, past_kv_cache=past, attention_mask=mask)
    return past.frozen, frozen, past[0].past_keys, past.previous_attention_mask


def _entry(lens: Library):
    kind = lens("cache.key_value_cache_entry.TransformerLensKeyValueCacheEntry")
    entry = kind.init_cache_entry(lens.llama.cfg, "cpu", 2)
    shape = entry.past_keys.shape
    keys, values = entry.append(lens.random(2, 5, 2, 8), lens.random(2, 5, 2, 8, seed=9))
    return shape, keys, values, entry.past_keys, entry.frozen


CALLS = {
    "ActivationCache": {"ActivationCache": _cache(lambda cache, lens: (dict(cache), len(cache)))},
    "ActivationCache.ActivationCache": {
        "remove_batch_dim": _cache(_one_prompt),
        "to": _cache(lambda cache, lens: dict(cache.to("cpu"))),
        "toggle_autodiff": _cache(_grad_off),
        "keys": _cache(lambda cache, lens: list(cache.keys())),
        "values": _cache(lambda cache, lens: list(cache.values())),
        "items": _cache(lambda cache, lens: dict(cache.items())),
        "apply_slice_to_batch_dim": _cache(
            lambda cache, lens: dict(cache.apply_slice_to_batch_dim((0, 2)))
        ),
        "accumulated_resid": _cache(
            lambda cache, lens: (
                cache.accumulated_resid(apply_ln=True, return_labels=True),
                cache.accumulated_resid(2, incl_mid=True, pos_slice=-1),
            )
        ),
        "logit_attrs": _cache(
            lambda cache, lens: cache.logit_attrs(
                cache.accumulated_resid(), lens.tokens, lens.corrupted
            )
        ),
        "decompose_resid": _cache(lambda cache, lens: cache.decompose_resid(2, return_labels=True)),
        "compute_head_results": _cache(
            lambda cache, lens: (cache.compute_head_results(), cache["result", 1])[1]
        ),
        "stack_head_results": _cache(
            lambda cache, lens: cache.stack_head_results(
                2, return_labels=True, incl_remainder=True, apply_ln=True
            )
        ),
        "stack_activation": _cache(lambda cache, lens: cache.stack_activation("z")),
        "get_neuron_results": _cache(
            lambda cache, lens: cache.get_neuron_results(1, neuron_slice=(0, 5), pos_slice=-1)
        ),
        "stack_neuron_results": _cache(
            lambda cache, lens: cache.stack_neuron_results(
                2, neuron_slice=(0, 4), return_labels=True, incl_remainder=True
            )
        ),
        "apply_ln_to_stack": _cache(
            lambda cache, lens: cache.apply_ln_to_stack(cache.decompose_resid(1), 1)
        ),
        "get_full_resid_decomposition": _cache(
            lambda cache, lens: cache.get_full_resid_decomposition(
                1, expand_neurons=False, return_labels=True
            )
        ),
    },
    "FactoredMatrix": {
        "FactoredMatrix": _matrix(lambda m: (m.A, m.B, m.ldim, m.mdim, m.rdim, m.shape)),
    },
    "FactoredMatrix.FactoredMatrix": {
        "AB": _matrix(lambda m: m.AB),
        "BA": _square(lambda m: m.BA),
        "T": _matrix(lambda m: m.T.AB),
        "svd": _matrix(_rebuilt),
        "U": _matrix(lambda m: m.U.abs()),
        "S": _matrix(lambda m: m.S),
        "V": _matrix(lambda m: m.V.abs()),
        "Vh": _matrix(lambda m: m.Vh.abs()),
        "eigenvalues": _square(_eigenvalues),
        "norm": _matrix(lambda m: m.norm()),
        "make_even": _matrix(lambda m: (m.make_even().AB, m.make_even().A.norm(dim=-2))),
        "get_corner": _matrix(lambda m: m.get_corner(2)),
        "ndim": _matrix(lambda m: m.ndim),
        "collapse_l": _matrix(lambda m: m.collapse_l().abs()),
        "collapse_r": _matrix(lambda m: m.collapse_r().abs()),
        "unsqueeze": _matrix(lambda m: m.unsqueeze(1).AB),
        "pair": _matrix(lambda m: m.pair),
    },
    "cache.key_value_cache": {
        "TransformerLensKeyValueCache": _past(
            lambda past, lens: (len(past.entries), past.frozen, past.previous_attention_mask)
        ),
    },
    "cache.key_value_cache.TransformerLensKeyValueCache": {
        "init_cache": _past(lambda past, lens: past[1].past_keys.shape),
        "freeze": _past(_frozen),
        "unfreeze": _past(_frozen),
        "append_attention_mask": _past(
            lambda past, lens: past.append_attention_mask(torch.ones(2, 3, dtype=torch.int64))
        ),
    },
    "cache.key_value_cache_entry": {"TransformerLensKeyValueCacheEntry": _entry},
    "cache.key_value_cache_entry.TransformerLensKeyValueCacheEntry": {
        "init_cache_entry": _entry,
        "append": _entry,
    },
}
