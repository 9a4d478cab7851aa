"""Mixed precision in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from controlkit.training.recipe import Recipe


def uses_bf16(recipe: Recipe, device: torch.device) -> bool:
    """Whether a recipe computes in bf16 on `device`."""
    if recipe.precision == "auto":
        return has_fast_bf16(device)
    return recipe.precision == "bf16"


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices faster in bf16: a CUDA device that supports it, or a CPU with AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def attention_precision(
    device: torch.device, *, bf16: bool, recomputed: bool = False
) -> AbstractContextManager[object]:
    """A block of forward and backward passes whose attention runs in the precision that suits the device.

    That is autocast's, except on the CPU: there the backward pass of torch's fused kernel takes ten times as long in
    bf16 as in fp32 if sequences are short (`benchmarks/what_pays.py`; torch 2.13), so attention stays in fp32.

    Args:
        recomputed: whether activations are computed again in the backward pass. torch does that outside such a block,
            so they keep autocast's precision.
    """
    return _AttentionInFP32() if bf16 and device.type == "cpu" and not recomputed else nullcontext()


class _AttentionInFP32(TorchFunctionMode):
    """Computes scaled dot-product attention in fp32, also under autocast; its output keeps the type of the query."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        with torch.autocast(query.device.type, enabled=False):
            found = func(*map(_in_fp32, args), **{name: _in_fp32(value) for name, value in kwargs.items()})
        return found.to(query.dtype)


def _in_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
