"""Conditions: functions from an image to a condition image, in one registry.

`find("canny")` returns a `Condition`, `registry()` all of them. A new one is one function in one file: see
`condition.py`.
"""

from controlkit.conditions.condition import Condition, find, registry

__all__ = ["Condition", "find", "registry"]
