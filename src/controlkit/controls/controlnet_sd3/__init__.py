"""ControlNet for the transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024), and its file formats."""

from controlkit.controls.controlnet_sd3.network import ControlNetSD3

__all__ = ["ControlNetSD3"]
