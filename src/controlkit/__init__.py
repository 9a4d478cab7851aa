"""controlkit: make, train, run and judge spatial controls for text-to-image diffusion models.

    import controlkit as ck

    drawn = ck.generate(
        ck.GenerateRequest(prompt="a red apple", controls=(ck.ControlUse(control="canny", image="apple.png"),))
    )
    drawn.save("pictures")

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from controlkit._version import __version__
from controlkit.errors import UserError

if TYPE_CHECKING:
    from controlkit.bases.load import load_base
    from controlkit.checkpoints.controls import load_control, save_control
    from controlkit.checkpoints.convert import convert
    from controlkit.checkpoints.describe import describe
    from controlkit.conditions import find as find_condition
    from controlkit.data.cache_report import manage_cache
    from controlkit.data.engine import make_pairs
    from controlkit.data.pairs import read_pairs
    from controlkit.evaluation.adapt import adapt
    from controlkit.evaluation.base import evaluate_base
    from controlkit.evaluation.control import evaluate_control
    from controlkit.sampling.generate import generate
    from controlkit.sampling.request import ControlUse, GenerateRequest
    from controlkit.training.recipe import read_recipe
    from controlkit.training.run import run as train

_PLACES = {
    "ControlUse": "sampling.request:ControlUse",
    "GenerateRequest": "sampling.request:GenerateRequest",
    "adapt": "evaluation.adapt:adapt",
    "convert": "checkpoints.convert:convert",
    "describe": "checkpoints.describe:describe",
    "evaluate_base": "evaluation.base:evaluate_base",
    "evaluate_control": "evaluation.control:evaluate_control",
    "find_condition": "conditions:find",
    "generate": "sampling.generate:generate",
    "load_base": "bases.load:load_base",
    "load_control": "checkpoints.controls:load_control",
    "make_pairs": "data.engine:make_pairs",
    "read_pairs": "data.pairs:read_pairs",
    "read_recipe": "training.recipe:read_recipe",
    "save_control": "checkpoints.controls:save_control",
    "manage_cache": "data.cache_report:manage_cache",
    "train": "training.run:run",
}

__all__ = [
    "ControlUse",
    "GenerateRequest",
    "UserError",
    "__version__",
    "adapt",
    "convert",
    "describe",
    "evaluate_base",
    "evaluate_control",
    "find_condition",
    "generate",
    "load_base",
    "load_control",
    "make_pairs",
    "manage_cache",
    "read_pairs",
    "read_recipe",
    "save_control",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'controlkit' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(f"controlkit.{module}"), attribute)
