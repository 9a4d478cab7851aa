"""Recipes: typed settings of training runs, read from YAML.

A recipe file has a `system` and its settings. Unknown keys, wrong types and contradictions are errors before anything
is loaded. Recipes of controls combine the settings of all controls (`recipe.ControlRecipe`), of the system
(`Control.trainings`) and of the source of data (`sources.source.Source.Settings`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from controlkit.bases.defaults import NANO_DEFAULTS, defaults_in
from controlkit.errors import UserError, nearest
from controlkit.settings import YAMLReader, build_settings, check_keys, read_overrides
from controlkit.training.recipe import ControlRecipe, Recipe, SeveralConditions


def adapter_settings(base: str) -> dict[str, Any]:
    """Default settings of an adapter, by its base.

    They come from the base's folder, as for nano (docs/ctrlora.md), or else from Xu et al. 2025 (section 4.1), with a
    batch size of 4.
    """
    defaults = NANO_DEFAULTS if base == "nano" else defaults_in(Path(_without_tilde(base)))
    if isinstance(own := defaults.get("adapter"), dict):
        return dict(own)
    paper = {"rank": 128, "learning_rate": 1e-5, "batch_size": 4, "min_lr_rate": 1.0, "warmup_steps": 0, "beta2": 0.999}
    return {**paper, "steps": 1000, "preview_every": 500, "precision": "auto"}


_OTHERS = {
    "autoencoder": "controlkit.nano.recipes:AutoencoderRecipe",
    "base": "controlkit.nano.recipes:BaseRecipe",
}
"""Recipes that train no control: system -> `module:class`, imported on demand."""


def recipes() -> dict[str, type[Recipe]]:
    """Every `system` of `controlkit train` -> the class of its recipes."""
    from controlkit.controls.registry import registry

    return _recipes_of(tuple(registry().values()))  # a notebook may register a system again


@lru_cache(maxsize=1)
def _recipes_of(kinds: tuple[Any, ...]) -> dict[str, type[Recipe]]:
    from controlkit.controls.registry import trainings_of

    classes: dict[str, type[Recipe]] = {system: resolve_name(place) for system, place in _OTHERS.items()}
    for kind in kinds:
        for training in trainings_of(kind):
            for system in (training.system, *training.also):
                if system in classes:
                    raise UserError(f"two systems train as {system!r}; {kind.title} is one", "plugin-failed")
                classes[system] = control_recipe = _recipe_of(kind, training, system)
                by_source(control_recipe)  # checks for conflicting settings
    return classes


def _recipe_of(kind: Any, training: Any, system: str) -> type[ControlRecipe]:
    """The recipe class of one `Training` of a system, for data of any source."""
    doc = training.doc or f"{kind.title}."
    facts = {"system": system, "training": training, "control_class": kind, "__doc__": doc, "__module__": __name__}
    return type(f"{''.join(part.title() for part in system.split('-'))}Recipe", (ControlRecipe,), facts)


def by_source(kind: type[Recipe]) -> dict[str, type[ControlRecipe]]:
    """Name of a source -> recipe class of a system with it; empty for systems without a choice of source."""
    if not issubclass(kind, ControlRecipe):
        return {}
    from controlkit.training.sources.registry import sources

    return {name: _from_source(kind, source) for name, source in sources().items()}


def with_source(kind: type[ControlRecipe], settings: Mapping[str, Any]) -> type[ControlRecipe]:
    """The recipe class of a system with the source named among `settings`.

    Raises:
        UserError: none or several are named.
    """
    from controlkit.training.sources.registry import sources

    named = [name for name in sources() if settings.get(name) is not None]
    if len(named) != 1:
        *most, last = sources()
        expected = f"set one of {', '.join(most)} or {last}, the source of data"
        if named:
            raise UserError(f"{expected}, not {' and '.join(named)}", "contradiction")
        raise UserError(expected, "missing-setting")
    return _from_source(kind, sources()[named[0]])


@cache
def _from_source(kind: type[ControlRecipe], source: Any) -> type[ControlRecipe]:
    """The recipe class of a system with one source. Defaults of the system override those of the source."""
    training = kind.training
    condition = SeveralConditions if training.several else source.one_condition
    own = () if training.options is None else (training.options,)
    facts: dict[str, Any] = {"__doc__": kind.__doc__, "__module__": __name__, "__annotations__": {}, "source": source}
    if hasattr(training.options, "__post_init__"):
        facts["__post_init__"] = _checked_by(training.options)
    _check_conflicts(kind.control_class, own, (source.Settings, condition))
    name = f"{kind.__name__}From{source.name.title()}"
    # Dataclasses pass on inherited defaults, too, so those that change defaults of every recipe come first.
    return dataclass(frozen=True, kw_only=True)(type(name, (*own, source.Settings, condition, kind), facts))


def _checked_by(options: Any) -> Callable[[Any], None]:
    """`__post_init__` of recipes whose options have one themselves, which would replace that of the other settings."""

    def check(recipe: ControlRecipe) -> None:
        super(options.__mro__[-2], recipe).__post_init__()
        made = options(**recipe.options)
        for field in dataclasses.fields(options):  # which it may have put into another form
            object.__setattr__(recipe, field.name, getattr(made, field.name))

    return check


def _check_conflicts(kind: Any, own: tuple[type, ...], shared: tuple[type[ControlRecipe], ...]) -> None:
    """Settings of a system may change defaults of common settings, but not their types."""
    common = {field.name: str(field.type) for part in shared for field in dataclasses.fields(part)}
    for options in own:
        for field in dataclasses.fields(options):
            expected = common.get(field.name, str(field.type))
            if str(field.type) not in (expected, expected.removesuffix(" | None")):
                raise UserError(
                    f"the setting {field.name} of {kind.title} is {field.type}, but {expected} in every recipe; rename"
                    " it",
                    "plugin-failed",
                )


def recipe_class(system: str) -> type[Recipe]:
    """The recipe class of a system. Systems of controls are imported only if it is one.

    Raises:
        UserError: there is no such system.
    """
    if system in _OTHERS:
        return resolve_name(_OTHERS[system])
    if system not in recipes():
        raise UserError(f"system is {system!r}{nearest(system, list(recipes()))}", "unknown-name")
    return recipes()[system]


class _NoDuplicates(YAMLReader):
    """`YAMLReader` in which a repeated key is an error, not the last of its values."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is set twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the YAML file `path`, with `key=value` overrides.

    Raises:
        UserError: the file is missing or not YAML, a key is unknown (the message has the nearest), a value has the
            wrong type, or two settings contradict each other.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        values = yaml.load(text, _NoDuplicates)
    except FileNotFoundError as error:
        files = [*Path(path).parent.glob("*.yaml"), *Path("recipes").rglob("*.yaml")]
        known = [*recipes(), *dict.fromkeys(map(str, sorted(files)))]
        raise UserError(f"there is no recipe {path}{nearest(str(path), known)}", "missing-file") from error
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}", "unreadable-file") from error
    except (yaml.YAMLError, ValueError) as error:  # an impossible date is a ValueError
        reason = " ".join(str(error).split())
        raise UserError(f"the recipe {path} is not valid YAML: {reason}", "damaged-file") from error
    if not isinstance(values, dict):
        raise UserError(f"the recipe {path} must be a mapping of settings, not {type(values).__name__}", "wrong-type")
    values.update(read_overrides(overrides))
    return build_recipe(values, origin=str(path))


def _without_tilde(value: Any) -> Any:
    """The value of a setting, with the home folder in place of `~`: no text but a path begins so."""
    return os.path.expanduser(value) if isinstance(value, str) and (value + "/").startswith("~/") else value


def build_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A recipe of the system `values["system"]` from plain values; errors begin with `origin`.

    A path may begin with `~`, the home folder.
    """
    values = {key: _without_tilde(value) for key, value in values.items()}
    system = values.pop("system", None)
    if not isinstance(system, str):
        raise UserError(f"{origin}: system is {system!r}{nearest(str(system), list(recipes()))}", "missing-setting")
    try:
        kind = recipe_class(system)
    except UserError as error:
        raise UserError(f"{origin}: {error}", error.code) from error
    origin = f"{origin}: system {system}"
    if issubclass(kind, ControlRecipe):
        choice = by_source(kind)
        values = {key: value for key, value in values.items() if key not in choice or value is not None}
        check_keys(values, {field.name for recipe in choice.values() for field in dataclasses.fields(recipe)}, origin)
        try:
            kind = with_source(kind, values)
        except UserError as error:
            raise UserError(f"{origin}: {error}", error.code) from error
    return build_settings(kind, values, origin)
