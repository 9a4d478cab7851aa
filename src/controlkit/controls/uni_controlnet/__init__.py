"""Uni-ControlNet (Zhao et al. 2023, arXiv 2305.16322): a local adapter for several condition images at once, and a
global adapter for an image as a prompt. They are trained apart and used together."""

from controlkit.controls.uni_controlnet.global_adapter import GlobalAdapter
from controlkit.controls.uni_controlnet.local_adapter import LocalAdapter

__all__ = ["GlobalAdapter", "LocalAdapter"]
