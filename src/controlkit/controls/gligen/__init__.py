"""GLIGEN (Li et al. 2023, arXiv 2301.07093): boxes with phrases."""

from controlkit.controls.gligen.network import GLIGEN

__all__ = ["GLIGEN"]
