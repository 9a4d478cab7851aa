"""controlkit: spatial control of text-to-image diffusion models: make pairs, train, sample, evaluate.

    import controlkit as ck

    request = ck.GenerateRequest(prompt="a red apple", controls=(ck.ControlUse(control="canny", image="apple.png"),))
    ck.generate(request).save("images")

Names are imported on first use, so importing the package is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from controlkit._version import __version__
from controlkit.errors import Interrupted, UserError

if TYPE_CHECKING:
    from controlkit.bases.base import Base
    from controlkit.bases.load import load_base
    from controlkit.conditions import find as find_condition
    from controlkit.controls.control import Control
    from controlkit.data.cache_report import manage_cache
    from controlkit.data.check import check_pairs
    from controlkit.data.engine import make_pairs
    from controlkit.data.input_images import list_images
    from controlkit.data.making import MakeSettings
    from controlkit.data.pairs import read_pairs, split_pairs
    from controlkit.data.readers.columns import Columns
    from controlkit.evaluation.adapt import Adapted, adapt
    from controlkit.evaluation.eval_set import EvalSet, pairs_eval_set
    from controlkit.evaluation.evaluate_control import evaluate_control, evaluate_controls
    from controlkit.evaluation.report import Report
    from controlkit.evaluation.sets import evaluation_set
    from controlkit.formats.convert import convert
    from controlkit.formats.describe import describe, describe_base, describe_system
    from controlkit.formats.load import load_control, save_control
    from controlkit.nano.evaluate_base import evaluate_base
    from controlkit.sampling.generate import generate
    from controlkit.sampling.generation import Generation
    from controlkit.sampling.request import GenerateRequest
    from controlkit.sampling.residual_cache import ResidualCache
    from controlkit.sampling.saved_settings import read_settings
    from controlkit.sampling.step import Step
    from controlkit.sampling.uses import ControlUse, LoraUse
    from controlkit.training.recipe import Recipe
    from controlkit.training.recipes import build_recipe, read_recipe
    from controlkit.training.results import TrainStep
    from controlkit.training.run import run as train

_PLACES = {
    "Adapted": "evaluation.adapt:Adapted",
    "Base": "bases.base:Base",
    "Columns": "data.readers.columns:Columns",
    "Control": "controls.control:Control",
    "ControlUse": "sampling.uses:ControlUse",
    "EvalSet": "evaluation.eval_set:EvalSet",
    "GenerateRequest": "sampling.request:GenerateRequest",
    "Generation": "sampling.generation:Generation",
    "LoraUse": "sampling.uses:LoraUse",
    "MakeSettings": "data.making:MakeSettings",
    "Recipe": "training.recipe:Recipe",
    "Report": "evaluation.report:Report",
    "ResidualCache": "sampling.residual_cache:ResidualCache",
    "Step": "sampling.step:Step",
    "TrainStep": "training.results:TrainStep",
    "adapt": "evaluation.adapt:adapt",
    "build_recipe": "training.recipes:build_recipe",
    "check_pairs": "data.check:check_pairs",
    "convert": "formats.convert:convert",
    "describe": "formats.describe:describe",
    "describe_base": "formats.describe:describe_base",
    "describe_system": "formats.describe:describe_system",
    "evaluate_base": "nano.evaluate_base:evaluate_base",
    "evaluate_control": "evaluation.evaluate_control:evaluate_control",
    "evaluate_controls": "evaluation.evaluate_control:evaluate_controls",
    "evaluation_set": "evaluation.sets:evaluation_set",
    "find_condition": "conditions:find",
    "generate": "sampling.generate:generate",
    "list_images": "data.input_images:list_images",
    "load_base": "bases.load:load_base",
    "load_control": "formats.load:load_control",
    "make_pairs": "data.engine:make_pairs",
    "manage_cache": "data.cache_report:manage_cache",
    "pairs_eval_set": "evaluation.eval_set:pairs_eval_set",
    "read_pairs": "data.pairs:read_pairs",
    "read_recipe": "training.recipes:read_recipe",
    "read_settings": "sampling.saved_settings:read_settings",
    "save_control": "formats.load:save_control",
    "split_pairs": "data.pairs:split_pairs",
    "train": "training.run:run",
}

__all__ = [
    "Adapted",
    "Base",
    "Columns",
    "Control",
    "ControlUse",
    "EvalSet",
    "GenerateRequest",
    "Generation",
    "Interrupted",
    "LoraUse",
    "MakeSettings",
    "Recipe",
    "Report",
    "ResidualCache",
    "Step",
    "TrainStep",
    "UserError",
    "__version__",
    "adapt",
    "build_recipe",
    "check_pairs",
    "convert",
    "describe",
    "describe_base",
    "describe_system",
    "evaluate_base",
    "evaluate_control",
    "evaluate_controls",
    "evaluation_set",
    "find_condition",
    "generate",
    "list_images",
    "load_base",
    "load_control",
    "make_pairs",
    "manage_cache",
    "pairs_eval_set",
    "read_pairs",
    "read_recipe",
    "read_settings",
    "save_control",
    "split_pairs",
    "train",
]


_FORMER = {"judged_pairs": "pairs_eval_set", "list_pictures": "list_images", "read_drawn": "read_settings"}
"""Former name, still accepted -> name."""


if not TYPE_CHECKING:  # a type checker would take any name for one of the package

    def __getattr__(name: str) -> Any:
        name = _FORMER.get(name, name)
        if name not in _PLACES:
            raise AttributeError(f"module 'controlkit' has no attribute {name!r}")
        module, _, attribute = _PLACES[name].partition(":")
        return getattr(import_module(f"controlkit.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({name for name in globals() if name.startswith("__")} | set(__all__))
