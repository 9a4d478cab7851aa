"""UniControl (Qin et al. 2023, arXiv 2305.11147): one ControlNet for several conditions, chosen by a task."""

from controlkit.controls.unicontrol.network import UniControl

__all__ = ["UniControl"]
