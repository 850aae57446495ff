"""Codes of sparse autoencoders as sites: `codes`, and what reads and writes them."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fastlens.errors import SweepError, did_you_mean
from fastlens.patching.fingerprint import weights_fingerprint
from fastlens.patching.model import PatchableModel
from fastlens.patching.runs import chosen
from fastlens.patching.sites import CODED, PER_FEATURE, SITES, Site, find_site

# Rows of the trial that an autoencoder is put to before a sweep.
TRIAL_ROWS = 4
_LAYER = re.compile(r"blocks\.(\d+)\.(.+)")
_SAE_LENS = "sae_lens.saes."


@dataclass(frozen=True, eq=False)
class Codes:
    """Codes at one place, of one or several layers. Made by `codes`.

    Attributes:
        name: What scores and messages call it.
        site: The site whose activation is encoded.
        by_layer: The autoencoder of each layer; layers may count from the end.
        decoder: The decoder's matrix, where it was given.
    """

    name: str
    site: str
    by_layer: Mapping[int, Any]
    decoder: Tensor | None = None

    def layers(self, n_layers: int) -> list[int]:
        """The layers that have an autoencoder, in the order given."""
        return chosen(list(self.by_layer), n_layers, f"{self.name}: layer")

    def found_in(self, model: PatchableModel, layers: Sequence[int]) -> Site:
        """The site with its axes, of layers that have an autoencoder.

        Raises: SweepError for a layer without one, or a site that the model lacks.
        """
        have = self.layers(model.cfg.n_layers)
        for layer in layers:
            if layer not in have:
                raise SweepError(
                    f"{self.name} has no autoencoder at layer {layer}: it has "
                    f"{', '.join(map(str, sorted(have)))}."
                )
        site = find_site(self.site, model.cfg, model.hook_dict, layers)
        return replace(site, axes=PER_FEATURE, default_by=("layer", "pos"))


def codes(
    sae: Any,
    layer: int | None = None,
    site: str | None = None,
    *,
    name: str | None = None,
    decoder: Float[Tensor, "feature d_in"] | None = None,
) -> Codes:
    """The codes of a sparse autoencoder, as a site for `sweep` and `Patch`.

    >>> sweep(model, clean, corrupted, sites=codes(sae), by=("layer", "pos", "feature"),
    ...       features=[3, 77], source="zero", metric=metric)
    >>> Patch(codes(sae, layer=8, site="resid_pre"), pos=5, feature=[3, 77], source=2.0, mode="add")

    Patched codes c' change the activation x by what they change of its reconstruction:
    ``x + decode(c') - decode(encode(x))``. What the autoencoder does not reconstruct stays as it is
    (the "error term" of SAELens), so codes that are not patched change nothing.

    At one place, patches of the activation itself act first; then those of the codes,
    autoencoder by autoencoder as the run first names them. All patches of one autoencoder act on
    one set of codes, in their order, and are decoded together.

    Args:
        sae: Anything with ``encode(x) -> codes`` and ``decode(codes) -> x`` over leading axes:
            SAELens' autoencoders, your own `torch.nn.Module`. Each row's codes must depend on that
            row alone. A dict ``layer -> autoencoder``, or a list of those that know their place,
            makes one site of several layers; they must have as many features each.
        layer, site: Where it stands, if it does not say so itself in
            ``sae.cfg.metadata.hook_name``, or somewhere else than it says. Sites are ``resid_pre``,
            ``resid_mid``, ``resid_post``, ``attn_out``, ``mlp_out`` and ``z``, whose heads are laid
            end to end.
        name: What to call it in scores; ``"resid_pre codes"``, say.
        decoder: The matrix D with ``decode(c) - decode(c') = (c - c') @ D``, if there is one, such
            as ``sae.decoder.weight.T``. SAELens' own autoencoders are known to have one, most of
            them. Only the rows of features that change are read then; without it whole codes are
            decoded, once as they were and once as they are.

    Numerics: as for other sites. Codes are made in the autoencoder's dtype. Where a code is cut off
    (a jump, a top-k), rounding decides for activations that lie on the edge.

    Cost: each distinct row is encoded once; ``[rows, features]`` is held for a few rows at a time.
    A run that leaves all codes as they were, such as the ablation of a feature that is not active,
    costs nothing beyond that.

    Raises: SweepError if it cannot encode and decode, or if no place is known; `sweep` and `plan`
        raise it if it does not fit the model.
    """
    is_several = isinstance(sae, Mapping | list | tuple)
    listed = list(sae.values() if isinstance(sae, Mapping) else sae) if is_several else [sae]
    if not listed:
        raise SweepError("there is no autoencoder. Give at least one.")
    if is_several and (layer is not None or decoder is not None):
        raise SweepError(
            "layer= and decoder= go with one autoencoder; a dict has each one's layer."
        )
    for one in listed:
        _check_kind(one)
    knows_layers = layer is not None or isinstance(sae, Mapping)
    named = [None if knows_layers and site is not None else _place_of(one) for one in listed]
    if isinstance(sae, Mapping):
        by_layer = dict(sae)
    elif layer is not None:
        by_layer = {layer: sae}
    else:
        for one, place in zip(listed, named, strict=True):
            if place is None:
                raise SweepError(
                    f"{type(one).__name__} does not say where it stands. Give layer= and site=, or "
                    f"a dict: layer -> autoencoder."
                )
        by_layer = {place[0]: one for one, place in zip(listed, named, strict=True) if place}
        if len(by_layer) < len(listed):
            raise SweepError("two of the autoencoders stand in one layer. Make a site of each.")
    said = {place[1] for place in named if place is not None}
    if site is None and len(said) != 1:
        raise SweepError(
            "the autoencoders do not say one site"
            + (f" but {', '.join(sorted(said))}" if said else "")
            + f". Give site=, one of {', '.join(CODED)}."
        )
    site = (site or said.pop()).removeprefix("hook_")
    if site not in CODED:
        raise SweepError(
            f"codes of {site} cannot be patched; those of {', '.join(CODED)} can."
            f"{did_you_mean(site, CODED)}"
        )
    return Codes(name or f"{site} codes", site, by_layer, decoder)


def _place_of(sae: Any) -> tuple[int, str] | None:
    """Layer and site that an autoencoder says it stands at.

    Raises: SweepError if it says something that cannot be patched.
    """
    cfg = getattr(sae, "cfg", None)
    metadata = getattr(cfg, "metadata", None)
    found = getattr(metadata, "hook_name", None) or getattr(cfg, "hook_name", None)
    if not isinstance(found, str):
        return None
    matched = _LAYER.fullmatch(found)
    hooks = {SITES[site].hook.removeprefix("blocks.{layer}."): site for site in CODED}
    if matched is None or matched[2] not in hooks:
        raise SweepError(
            f"{type(sae).__name__} reads {found!r}. Codes of {', '.join(hooks)} can be patched."
        )
    return int(matched[1]), hooks[matched[2]]


def _check_kind(sae: Any) -> None:
    kind = type(sae).__name__
    if not callable(getattr(sae, "encode", None)) or not callable(getattr(sae, "decode", None)):
        raise SweepError(f"{kind} has no encode and decode, so it is no autoencoder.")
    cfg = getattr(sae, "cfg", None)
    metadata = getattr(cfg, "metadata", None)
    reads, writes = (getattr(metadata, field, None) for field in ("hook_name", "hook_name_out"))
    if isinstance(writes, str) and writes != reads:
        raise SweepError(
            f"{kind} reads {reads} and writes {writes}: a transcoder, whose codes are no "
            f"reconstruction of what stands in either place."
        )
    head = getattr(metadata, "hook_head_index", None)
    if isinstance(head, int):
        raise SweepError(f"{kind} reads head {head} alone. Codes of all heads of z can be patched.")


# -- one autoencoder at one place ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PlacedCodes:
    """One autoencoder at one layer of one model, tried out.

    Attributes:
        sae: What encodes and decodes.
        name: What to call it.
        hook: The hook point whose activation it reads.
        n_features: Length of its codes.
        width: Length of what it reads: heads end to end.
        heads: Of ``z``, for an autoencoder that wants its heads apart; else None.
        matrix: The decoder, where it is known to be one matrix and a bias.
        needs_input: Decoding undoes what the last encoding did to its input, so that must have been
            of the same rows.
        like: Has its dtype and device: a weight, or the model's if it holds none.
    """

    sae: Any
    name: str
    hook: str
    n_features: int
    width: int
    heads: int | None
    matrix: Tensor | None
    needs_input: bool
    like: Tensor

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... feature"]:
        """Codes of activations, in the autoencoder's own dtype."""
        return _encoded(self.sae, x, self.heads, self.like).to(x.device)

    def decode(self, c: Float[Tensor, "... feature"]) -> Float[Tensor, "... d_in"]:
        """Activations of codes, in the autoencoder's own dtype."""
        return _decoded(self.sae, c.to(self.like.device), self.heads).to(c.device)

    @property
    def said(self) -> str:
        """It in words."""
        how = "by one matrix" if self.matrix is not None else "whole, before and after"
        return (
            f"{self.n_features:,} features of {type(self.sae).__name__} at {self.hook}, decoded "
            f"{how}"
        )

    def modules(self) -> list[nn.Module]:
        """Its modules, if it is one."""
        return list(self.sae.modules()) if isinstance(self.sae, nn.Module) else []

    def record(self) -> dict[str, Any]:
        """What tells it from others: its weights, and what it makes of numbers from a fixed seed.

        Raises: SweepError for weights that have no bytes to read.
        """
        sae, kind = self.sae, type(self.sae)
        cfg = getattr(sae, "cfg", None)
        to_dict = getattr(cfg, "to_dict", None)
        fields: Any = to_dict() if callable(to_dict) else {}
        # Where it runs changes no number, and what is no number or text may print its address.
        fields = {name: value for name, value in fields.items() if name != "device"}
        text = json.dumps(fields, sort_keys=True, default=lambda value: type(value).__name__)
        with evaluating(self.modules()), torch.no_grad():
            c = self.encode(_trial(self.width, self.like))
            # Bits may depend on threads; which features are active does not.
            active = (c != 0).sum(-1).tolist()
            if not isinstance(sae, nn.Module):
                active.append([f"{value:.3e}" for value in c.double().sum(-1).tolist()])
        return {
            "kind": f"{kind.__module__}.{kind.__qualname__}",
            "hook": self.hook,
            "features": self.n_features,
            "weights": weights_fingerprint(sae) if isinstance(sae, nn.Module) else None,
            "cfg": hashlib.sha256(text.encode()).hexdigest()[:32],
            "active": active,
        }


def placed(found: Codes, layer: int, model: PatchableModel) -> PlacedCodes:
    """The autoencoder of a layer, tried out on a few random rows.

    Raises: SweepError if it does not read and write what the model has there, if its codes hold
        NaN, or if a row's codes depend on the other rows.
    """
    cfg = model.cfg
    by_layer = dict(zip(found.layers(cfg.n_layers), found.by_layer.values(), strict=True))
    sae = by_layer[layer]
    hook = SITES[found.site].hook_name(layer)
    width = cfg.d_model
    if found.site == "z":
        width = cfg.n_heads * (cfg.d_value or cfg.d_head)
    d_in = getattr(getattr(sae, "cfg", None), "d_in", None)
    if isinstance(d_in, int) and d_in != width:
        raise SweepError(
            f"{found.name}: {type(sae).__name__} reads activations of width {d_in}; {hook} of this "
            f"model is {width} wide."
        )
    heads = None
    if found.site == "z" and getattr(sae, "hook_z_reshaping_mode", False):
        heads = cfg.n_heads
    modules = list(sae.modules()) if isinstance(sae, nn.Module) else []
    like = next((p for m in modules for p in m.parameters() if p.is_floating_point()), None)
    if like is None:
        like = torch.zeros((), dtype=cfg.dtype, device=cfg.device)
    with evaluating(modules), torch.no_grad():
        trial = _Trial(found, sae, hook, width, heads, like.detach())
        return PlacedCodes(
            *(sae, found.name, hook, trial.codes.shape[-1], width, heads),
            *(trial.matrix(found.decoder), trial.needs_input(), like.detach()),
        )


class _Trial:
    """What an autoencoder makes of a few random rows."""

    def __init__(
        self, found: Codes, sae: Any, hook: str, width: int, heads: int | None, like: Tensor
    ):
        self.sae, self.heads, self.like = sae, heads, like
        self.said = f"{found.name}: {type(sae).__name__}"
        self.x = _trial(width, like)
        try:
            self.codes = self._encode(self.x)
            self.out = _decoded(sae, self.codes, heads)
        except Exception as error:
            raise SweepError(
                f"{self.said} cannot encode and decode activations of shape {list(self.x.shape)}, "
                f"as {hook} has them: {error}"
            ) from error
        for what, tensor in (("codes", self.codes), ("reconstructions", self.out)):
            if tensor.ndim != 2 or len(tensor) != len(self.x) or not tensor.is_floating_point():
                raise SweepError(
                    f"{self.said} makes {what} of shape {list(tensor.shape)} and dtype "
                    f"{tensor.dtype} of {len(self.x)} rows; they must be floats, one row each."
                )
            if bool(tensor.isnan().any()):
                raise SweepError(f"{self.said} gives NaN. Are its weights loaded?")
        if self.out.shape[1] != width:
            raise SweepError(
                f"{self.said} writes {self.out.shape[1]} numbers for each row; {hook} of this "
                f"model is {width} wide."
            )
        alone = torch.cat([self._encode(row) for row in self.x.split(1)])
        off = int((~torch.isclose(alone, self.codes, rtol=1e-2, atol=1e-3)).sum())
        if off > max(1, 0.02 * int((alone != 0).sum())):
            raise SweepError(
                f"{self.said} gives a row other codes beside other rows (a top-k over the batch?): "
                f"a patch of one position would change the others."
            )

    def _encode(self, x: Tensor) -> Tensor:
        return _encoded(self.sae, x, self.heads, self.like)

    def needs_input(self) -> bool:
        """Whether decoding goes by what was encoded last."""
        first = self._encode(self.x)
        out = _decoded(self.sae, first, self.heads)
        self._encode(3.0 * self.x.flip(0) + 1.0)
        try:
            after_another = _decoded(self.sae, first, self.heads)
            again = _decoded(self.sae, first, self.heads)
        except Exception:
            # It takes an encoding before every decoding.
            return True
        return not (torch.equal(out, after_another) and torch.equal(out, again))

    def matrix(self, given: Tensor | None) -> Tensor | None:
        """The decoder's matrix, if it has one and it is known.

        Raises: SweepError for a given one that decoding does not agree with.
        """
        matrix = given if given is not None else self._own_matrix()
        if matrix is None or self.needs_input():
            if given is not None:
                raise SweepError(
                    f"{self.said} scales what it decodes by what it last encoded, so its decoder "
                    f"is no matrix. Leave decoder= out."
                )
            return None
        matrix = matrix.detach().to(self.codes)
        generator = torch.Generator().manual_seed(1)
        c = torch.randn(self.codes.shape, generator=generator).to(self.codes)
        fits = matrix.shape == (c.shape[1], self.x.shape[1])
        if fits:
            expected = _decoded(self.sae, c, self.heads) - _decoded(self.sae, 0 * c, self.heads)
            scale = float(expected.abs().max()) + float(self.out.abs().max())
            tolerance = 64 * torch.finfo(c.dtype).eps * scale
            fits = float((c @ matrix - expected).abs().max()) <= tolerance
        if not fits and given is not None:
            raise SweepError(
                f"{self.said}: decode(c) - decode(0) is not c @ decoder, a matrix "
                f"{list(matrix.shape)}. It must be [{c.shape[1]}, {self.x.shape[1]}]; leave it out "
                f"if decoding is not linear."
            )
        return matrix if fits else None

    def _own_matrix(self) -> Tensor | None:
        """Of an autoencoder whose decoding is known to be SAELens' own."""
        decode = getattr(type(self.sae), "decode", None)
        is_theirs = getattr(decode, "__module__", "").startswith(_SAE_LENS)
        matrix = getattr(self.sae, "W_dec", None)
        if not is_theirs or "decode" in vars(self.sae) or not isinstance(matrix, Tensor):
            return None
        if getattr(self.sae.cfg, "rescale_acts_by_decoder_norm", False):
            return matrix / matrix.norm(dim=-1, keepdim=True)
        return matrix


def _trial(width: int, like: Tensor) -> Tensor:
    """Rows of rising size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TRIAL_ROWS, width, generator=generator, dtype=torch.float64)
    x = x * torch.arange(1, TRIAL_ROWS + 1)[:, None]
    return x.to(like)


def _encoded(sae: Any, x: Tensor, heads: int | None, like: Tensor) -> Tensor:
    x = x.to(like)
    c = sae.encode(x if heads is None else x.unflatten(-1, (heads, -1)))
    if not isinstance(c, Tensor):
        raise SweepError(f"{type(sae).__name__}.encode gives a {type(c).__name__}, not a tensor.")
    return c


def _decoded(sae: Any, c: Tensor, heads: int | None) -> Tensor:
    x = sae.decode(c)
    return x if heads is None else x.flatten(-2)


@contextlib.contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode, put back as it was afterwards."""
    training = [module for module in modules if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
