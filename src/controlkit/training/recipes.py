"""Recipes: every setting of a training run, typed, read from YAML.

A recipe file names its `system` and sets its settings. Unknown keys, wrong types and contradictions are errors before
anything is loaded. Recipes of controls have settings of three kinds: those of all of them (`recipe.ControlRecipe`),
those of the system, which stand with it (`Control.trainings`), and those of the source of data, which stand with it
(`sources.source.Source.Settings`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from controlkit.bases.defaults import NANO_DEFAULTS, defaults_in
from controlkit.errors import UserError, nearest
from controlkit.settings import build_settings, check_keys, read_overrides
from controlkit.training.recipe import ControlRecipe, Recipe, SeveralConditions


def adapter_settings(base: str) -> dict[str, Any]:
    """Settings of an adapter that depend on its base, where none are given.

    What the base's folder says, as nano's does (docs/ctrlora.md); else those of Xu et al. 2025 (section 4.1), with
    batches of 4.
    """
    defaults = NANO_DEFAULTS if base == "nano" else defaults_in(Path(base))
    if isinstance(own := defaults.get("adapter"), dict):
        return dict(own)
    paper = {"rank": 128, "learning_rate": 1e-5, "batch_size": 4, "min_lr_rate": 1.0, "warmup_steps": 0, "beta2": 0.999}
    return {**paper, "steps": 1000, "preview_every": 500, "precision": "auto"}


_OTHERS = {
    "autoencoder": "controlkit.nano.recipes:AutoencoderRecipe",
    "base": "controlkit.nano.recipes:BaseRecipe",
}
"""Recipes that train no control: system -> `module:class`, imported when it is asked for."""


@cache
def recipes() -> dict[str, type[Recipe]]:
    """Every `system` that `controlkit train` trains -> the class of its recipes."""
    from controlkit.controls.registry import registry, trainings_of

    made: dict[str, type[Recipe]] = {system: resolve_name(place) for system, place in _OTHERS.items()}
    for kind in registry().values():
        for training in trainings_of(kind):
            for system in (training.system, *training.also):
                if system in made:
                    raise UserError(f"{kind.title} trains as {system!r}, which another system does already")
                made[system] = control_recipe = _recipe_of(kind, training, system)
                by_source(control_recipe)  # refuses settings that clash
    return made


def _recipe_of(kind: Any, training: Any, system: str) -> type[ControlRecipe]:
    """The recipes of one `Training` of a system, whatever the source of their data."""
    doc = training.doc or f"{kind.title}."
    facts = {"system": system, "training": training, "control_class": kind, "__doc__": doc, "__module__": __name__}
    return type(f"{''.join(part.title() for part in system.split('-'))}Recipe", (ControlRecipe,), facts)


def by_source(kind: type[Recipe]) -> dict[str, type[ControlRecipe]]:
    """Name of a source -> class of a system's recipes from it; empty where the data is not a matter of choice."""
    if not issubclass(kind, ControlRecipe):
        return {}
    from controlkit.training.sources.registry import sources

    return {name: _from_source(kind, source) for name, source in sources().items()}


def with_source(kind: type[ControlRecipe], settings: Mapping[str, Any]) -> type[ControlRecipe]:
    """The class of recipes of a system whose source is named among `settings`.

    Raises:
        UserError: none is, or several are.
    """
    from controlkit.training.sources.registry import sources

    named = [name for name in sources() if settings.get(name) is not None]
    if len(named) != 1:
        *most, last = sources()
        given = f", not {' and '.join(named)}" if named else ""
        raise UserError(f"give either {', '.join(most)} or {last}, where the data comes from{given}")
    return _from_source(kind, sources()[named[0]])


@cache
def _from_source(kind: type[ControlRecipe], source: Any) -> type[ControlRecipe]:
    """The class of a system's recipes from one source. Defaults of the system win over those of the source."""
    training = kind.training
    condition = SeveralConditions if training.several else source.one_condition
    own = () if training.options is None else (training.options,)
    facts = {"__doc__": kind.__doc__, "__module__": __name__, "__annotations__": {}, "source": source}
    _refuse_clashes(kind.control_class, own, (source.Settings, condition))
    name = f"{kind.__name__}From{source.name.title()}"
    # A dataclass hands down what it inherits, too, so the one that changes defaults of every recipe has to come first.
    return dataclass(frozen=True, kw_only=True)(type(name, (*own, source.Settings, condition, kind), facts))


def _refuse_clashes(kind: Any, own: tuple[type, ...], shared: tuple[type[ControlRecipe], ...]) -> None:
    """A setting of a system may give one of every recipe another default, and mean nothing else by it."""
    common = {field.name: str(field.type) for part in shared for field in dataclasses.fields(part)}
    for options in own:
        for field in dataclasses.fields(options):
            theirs = common.get(field.name, str(field.type))
            if str(field.type) not in (theirs, theirs.removesuffix(" | None")):
                raise UserError(
                    f"{kind.title} has a setting {field.name} ({field.type}), which means something else in every"
                    f" recipe ({theirs}); call it otherwise"
                )


def recipe_class(system: str) -> type[Recipe]:
    """The class of the recipes of a system; systems of controls are loaded only if it is none of the others.

    Raises:
        UserError: there is no such system.
    """
    if system in _OTHERS:
        return resolve_name(_OTHERS[system])
    if system not in recipes():
        raise UserError(f"system is {system!r}{nearest(system, list(recipes()))}")
    return recipes()[system]


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `key=value` overrides laid over it.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (with the nearest known ones), a value has
            the wrong type, or two settings contradict each other.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except FileNotFoundError as error:
        files = [*Path(path).parent.glob("*.yaml"), *Path("recipes").rglob("*.yaml")]
        known = [*recipes(), *dict.fromkeys(map(str, sorted(files)))]
        raise UserError(f"cannot read the recipe {path}: there is no such file{nearest(str(path), known)}") from error
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # a date that there is not is a ValueError
        raise UserError(f"the recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"the recipe {path} must be a mapping of settings, not {type(values).__name__}")
    values.update(read_overrides(overrides))
    return build_recipe(values, origin=str(path))


def build_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A `Recipe` of the class that `values["system"]` names, from plain values; `origin` stands in errors."""
    values = dict(values)
    system = values.pop("system", None)
    if not isinstance(system, str):
        raise UserError(f"{origin}: system is {system!r}{nearest(str(system), list(recipes()))}")
    try:
        kind = recipe_class(system)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    origin = f"{origin}: system {system}"
    if issubclass(kind, ControlRecipe):
        choice = by_source(kind)
        values = {key: value for key, value in values.items() if key not in choice or value is not None}
        check_keys(values, {field.name for one in choice.values() for field in dataclasses.fields(one)}, origin)
        try:
            kind = with_source(kind, values)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
    return build_settings(kind, values, origin)
