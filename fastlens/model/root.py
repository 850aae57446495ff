"""What `HookedTransformer`, `HookedEncoder` and `HookedEncoderDecoder` share."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlens.cache import ActivationCache
from fastlens.config import HookedTransformerConfig
from fastlens.devices import move_to_and_update_config
from fastlens.errors import ConfigError, FlagError, TokenError
from fastlens.hooks.capture import CapturePlan, CaptureSpec
from fastlens.hooks.derived import CacheDict
from fastlens.hooks.point import HookFunction, HookPoint
from fastlens.hooks.root import HookedRootModule, NamesFilter
from fastlens.model.capture_plan import transformer_plan
from fastlens.model.stop_early import layers_needed
from fastlens.settings import HF_TOKEN
from fastlens.store.entries import fresh

T = TypeVar("T", bound="TransformerRoot")

# The end of a hook's name -> the config flag without which the place does not exist.
FLAG_OF_PLACE = {
    "hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_attn_in": "use_attn_in",
    "hook_mlp_in": "use_hook_mlp_in",
}


def named_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """The Hugging Face tokenizer of that name or folder.

    Raises: TokenError if it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=trust_remote_code, token=HF_TOKEN.get() or None
        )
    except (OSError, ValueError) as error:
        raise TokenError(
            f"cfg.tokenizer_name={name!r} gave no tokenizer: {error} Pass tokenizer=, or set "
            f"cfg.tokenizer_name=None and d_vocab to use tokens only."
        ) from error


class TransformerRoot(HookedRootModule):
    """A hooked model with a config.

    Its runs give an `ActivationCache`, config flags switch hook points on, and ``cfg.device`` and
    ``cfg.dtype`` follow the model when it is moved or cast.
    """

    cfg: HookedTransformerConfig

    # -- hooks -------------------------------------------------------------------------------

    def run_with_cache(  # type: ignore[override]
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        store: str | Path | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """One forward and its activations, as an `ActivationCache`.

        With ``return_cache_object=False`` as a plain dict, which stores every one of them.

        With ``store``, a new or empty folder, each activation is written there as it passes and the
        cache reads it from there: one is in memory at a time. `ActivationCache.open` opens the
        folder later. Every activation asked for is stored, none derived.

        See `HookedRootModule.run_with_cache` for ``names_filter``, ``pos_slice``, ``heads``,
        ``device``, ``dtype``, ``incl_bwd``, ``lazy``, ``into`` and the rest; further arguments go
        to `forward`.

        Attention stays fused. Patterns and scores, what norms normalise, ``resid_mid`` and neurons'
        activations are computed from captured activations when they are first read: the cache
        needs about half the memory of storing them, and at long contexts a small part of it.

        With ``return_type=None`` a `HookedTransformer` runs no layer behind the last place that is
        captured or hooked, and no unembedding.
        """
        kwargs["lazy"] = kwargs.get("lazy", True) and return_cache_object
        if store is not None:
            if kwargs.get("into") is not None:
                raise ConfigError("store= and into= both say where activations go: give one.")
            key = {"model": self.cfg.model_name, "has_batch_dim": not remove_batch_dim}
            kwargs["into"] = fresh(store, key)
        try:
            output, cache = super().run_with_cache(
                *model_args, remove_batch_dim=remove_batch_dim, **kwargs
            )
        finally:
            if store is not None:
                kwargs["into"].store.close()
        if return_cache_object:
            cache = ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)
        return output, cache

    def _run_captured(self, *model_args: Any, **model_kwargs: Any) -> Any:
        # A forward of somebody else's may do anything with its layers' outputs.
        if not getattr(self, "ends_in_norm", False):
            return self(*model_args, **model_kwargs)
        given = inspect.signature(self.forward).bind(*model_args, **model_kwargs).arguments
        # Later tokens would miss keys and values of layers that were not run.
        may_stop = given.get("stop_at_layer") is None and given.get("past_kv_cache") is None
        if given.get("return_type", "logits") is None and may_stop:
            layers = layers_needed(self)
            if layers is not None:
                given.pop("stop_at_layer", None)
                self(**given, stop_at_layer=layers)
                return None
        return self(*model_args, **model_kwargs)

    def capture_plan(
        self,
        names_filter: NamesFilter,
        spec: CaptureSpec,
        incl_bwd: bool = False,
        lazy: bool = False,
        stays: bool = False,
        into: CacheDict | None = None,
    ) -> CapturePlan:
        """Stores what must be, and derives the rest; see `fastlens.model.capture_plan`."""
        names = self._names_matching(names_filter)
        # Gradients are taken at the places themselves.
        by_hooks = incl_bwd or stays
        return transformer_plan(self, names, spec, incl_bwd, lazy, by_hooks=by_hooks, into=into)

    def required_flag(self, name: str) -> str | None:
        """The config flag without which the place ``name`` never fires, or None."""
        return FLAG_OF_PLACE.get(name.rsplit(".", 1)[-1])

    def is_switched_off(self, name: str) -> bool:
        """Whether a config flag keeps the place ``name`` from firing now."""
        flag = self.required_flag(name)
        return flag is not None and not getattr(self.cfg, flag)

    def check_hooks_to_add(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: HookFunction,
        dir: str = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """Refuse a hook on a place that is switched off: it would never run."""
        if self.is_switched_off(hook_point_name):
            flag = self.required_flag(hook_point_name)
            raise FlagError(
                f"a hook was asked for at {hook_point_name!r}, which does not fire while "
                f"cfg.{flag} is False. Call model.set_{flag}(True) first, or name the place in "
                f"run_with_hooks, hooks() or run_with_cache, which switch it on for that run."
            )

    def _switch_on(self, names: list[str]) -> Callable[[], Any]:
        flags = {self.required_flag(name) for name in names if self.is_switched_off(name)}
        before = {flag: getattr(self.cfg, flag) for flag in flags if flag is not None}

        restore = partial(vars(self.cfg).update, before)
        try:
            for flag in before:
                getattr(self, f"set_{flag}")(True)
        except BaseException:
            restore()
            raise
        return restore

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Compute each head's output by itself, for ``hook_result``."""
        self.cfg.use_attn_result = use_attn_result

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Give every head its own copy of the residual stream for q, k and v."""
        self.cfg.use_split_qkv_input = use_split_qkv_input

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Let ``hook_mlp_in`` edit what the MLP reads. Refused for attention-only models."""
        if self.cfg.attn_only and use_hook_mlp_in:
            raise FlagError("hook_mlp_in: this model is attn_only, so it has no MLPs.")
        self.cfg.use_hook_mlp_in = use_hook_mlp_in

    # -- moving ------------------------------------------------------------------------------

    def to(  # type: ignore[override]
        self: T, device_or_dtype: torch.device | str | torch.dtype, print_details: bool = True
    ) -> T:
        """Move or cast the model and keep ``cfg.device`` or ``cfg.dtype`` in step."""
        return move_to_and_update_config(self, device_or_dtype, print_details)

    def _cast(self: T, dtype: torch.dtype) -> T:
        return self.to(dtype, print_details=False)

    def double(self: T) -> T:
        """Cast to float64."""
        return self._cast(torch.float64)

    def float(self: T) -> T:
        """Cast to float32."""
        return self._cast(torch.float32)

    def half(self: T) -> T:
        """Cast to float16."""
        return self._cast(torch.float16)

    def bfloat16(self: T) -> T:
        """Cast to bfloat16."""
        return self._cast(torch.bfloat16)

    def cuda(self: T, device: int | torch.device | str | None = None) -> T:  # type: ignore[override]
        """Move to a CUDA device."""
        return self.to(f"cuda:{device}" if isinstance(device, int) else device or "cuda")

    def cpu(self: T) -> T:
        """Move to the CPU."""
        return self.to("cpu")

    def mps(self: T) -> T:
        """Move to Apple's GPU. Not run there by us; compare with the CPU before you trust it."""
        return self.to("mps")
