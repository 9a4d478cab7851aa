"""What the bodies of all APIs share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_DEPTH = 32
"""Levels of lists and objects in a body. Python's recursion ends at a few hundred."""
MOST_ITEMS = 10_000
"""Items of all lists and objects in a body. pydantic describes each invalid one, which takes a kilobyte."""

Number = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    """A body whose lists and objects are nested at most `MOST_DEPTH` deep and have at most `MOST_ITEMS` items.

    Bodies name `BaseModel` as a base, too: ruff knows models by it.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _is_small(cls, values: Any) -> Any:
        return checked_structure(values)


def checked_structure(values: Any) -> Any:
    """`values`, checked for the number and the depth of its lists and objects.

    Raises:
        ValueError: it has more than `MOST_ITEMS` items, or is nested deeper than `MOST_DEPTH`.
    """
    level = [values] if isinstance(values, (dict, list)) else []
    items = 0
    for _ in range(MOST_DEPTH + 1):
        items += sum(len(value) for value in level)
        if items > MOST_ITEMS:
            raise ValueError(f"lists and objects have more than {MOST_ITEMS} items; send a smaller body")
        level = [
            each
            for value in level
            for each in (value.values() if isinstance(value, dict) else value)
            if isinstance(each, (dict, list))
        ]
        if not level:
            return values
    raise ValueError(f"lists and objects are nested deeper than {MOST_DEPTH} levels; send a flatter body")
