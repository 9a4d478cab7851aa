"""CtrLoRA (Xu et al., ICLR 2025, arXiv 2410.09400): one Base ControlNet with an adapter per condition."""

from controlkit.controls.ctrlora.adapter import CtrLoRA
from controlkit.controls.ctrlora.base_controlnet import BaseControlNet

__all__ = ["BaseControlNet", "CtrLoRA"]
