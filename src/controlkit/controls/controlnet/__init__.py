"""ControlNet (Zhang, Rao and Agrawala, ICCV 2023, arXiv 2302.05543) and its file formats."""

from controlkit.controls.controlnet.network import ControlNet

__all__ = ["ControlNet"]
