"""Optimisers by their names in recipes."""

from __future__ import annotations

import torch
from torch import nn

from controlkit.errors import UserError
from controlkit.training.recipe import Recipe


def build_optimizer(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with moments in float32 or in 8 bits (Dettmers et al. 2022).

    Raises:
        UserError: `adamw8bit` without a working bitsandbytes.
    """
    settings = {
        "lr": recipe.learning_rate,
        "betas": (0.9, recipe.beta2),
        "weight_decay": recipe.weight_decay,
    }
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings, fused=True)  # type: ignore[arg-type]
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer=adamw8bit needs bitsandbytes, which is not installed: pip install 'controlkit[lowmem]', or set"
            " optimizer=adamw",
            "missing-package",
        ) from error
    except (RuntimeError, OSError) as error:
        raise UserError(f"bitsandbytes does not work here ({error}); set optimizer=adamw", "unsupported") from error
    return AdamW8bit(parameters, **settings)
