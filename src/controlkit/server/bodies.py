"""What the bodies of all APIs share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_DEPTH = 32
"""Levels of lists and objects in a body. Python's recursion ends at a few hundred."""

Number = Annotated[float, Field(allow_inf_nan=False)]


class Body(BaseModel):
    """A body whose lists and objects are nested at most `MOST_DEPTH` deep.

    Bodies name `BaseModel` as a base, too: ruff knows models by it.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _is_shallow(cls, values: Any) -> Any:
        check_depth(values)
        return values


def check_depth(values: Any) -> None:
    """Check how deep lists and objects are nested.

    Raises:
        ValueError: deeper than `MOST_DEPTH`.
    """
    level = [values] if isinstance(values, (dict, list)) else []
    for _ in range(MOST_DEPTH + 1):
        level = [
            each
            for value in level
            for each in (value.values() if isinstance(value, dict) else value)
            if isinstance(each, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"lists and objects are nested deeper than {MOST_DEPTH} levels; send a flatter body")
