"""Image -> condition image: one registry, one file for each kind of condition.

`find("canny")` gives a `Condition`; `registry()` gives all of them. Adding one takes one function in one
file: see `condition.py`.
"""

from controlkit.conditions.condition import Condition, find, registry

__all__ = ["Condition", "find", "registry"]
