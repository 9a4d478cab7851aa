"""Linear approximations of autoencoders: latents to small RGB images, for previews while sampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

LatentRGB = Sequence[Sequence[float]]
"""One row `(red, green, blue)` per latent channel, and optionally one more for the offset; images are in [-1, 1]."""

SD1_LATENT_RGB: LatentRGB = (
    (0.3444, 0.1385, 0.0670),
    (0.1247, 0.4027, 0.1494),
    (-0.3192, 0.2513, 0.2103),
    (-0.1307, -0.1874, -0.7445),
)
"""Of the autoencoder of Stable Diffusion 1 and 2, as published by @torridgristle in InvokeAI (Apache-2.0)."""
SDXL_LATENT_RGB: LatentRGB = (
    (0.3816, 0.4930, 0.5320),
    (-0.3753, 0.1631, 0.1739),
    (0.1770, 0.3588, -0.2048),
    (-0.4350, -0.2644, -0.4289),
)
"""Of SDXL's, as published by @StAlKeR7779 in InvokeAI (Apache-2.0)."""
SD3_LATENT_RGB: LatentRGB = (
    (-0.0524, 0.0325, 0.0749),
    (-0.0581, 0.0076, 0.0573),
    (0.1614, 0.0127, -0.0377),
    (0.1442, 0.0846, 0.1594),
    (0.0489, 0.0056, -0.0669),
    (0.0519, 0.1922, 0.0626),
    (0.1539, 0.0482, 0.0710),
    (-0.0860, 0.0901, 0.1089),
    (-0.1240, -0.0677, 0.0034),
    (-0.0440, 0.0783, 0.0226),
    (0.0310, 0.0638, 0.0775),
    (-0.0132, 0.0855, -0.0877),
    (0.0646, 0.0591, 0.1326),
    (-0.0786, -0.0226, -0.1276),
    (-0.0992, -0.0801, -0.0626),
    (-0.0339, -0.0804, -0.0608),
)
"""Of Stable Diffusion 3's, from the same source."""
FLUX_LATENT_RGB: LatentRGB = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
    (-0.0329, -0.0718, -0.0851),
)
"""Of FLUX.1's; figures of ComfyUI (comfy/latent_formats.py, `Flux`)."""
WAN_LATENT_RGB: LatentRGB = (
    (-0.1299, -0.1692, 0.2932),
    (0.0671, 0.0406, 0.0442),
    (0.3568, 0.2548, 0.1747),
    (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328),
    (0.0296, -0.0956, -0.0665),
    (-0.3477, -0.4059, -0.2925),
    (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364),
    (-0.1293, 0.0740, 0.1636),
    (0.0680, 0.3019, 0.1128),
    (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699),
    (0.0060, -0.0633, 0.0005),
    (0.3477, 0.2275, 0.2950),
    (0.1984, 0.0913, 0.1861),
    (-0.1835, -0.0868, -0.3360),
)
"""Of Wan 2.1's, whose encoder Qwen-Image has; figures of ComfyUI (comfy/latent_formats.py, `Wan21`)."""
FLUX2_LATENT_RGB: LatentRGB = (
    (0.0058, 0.0113, 0.0073),
    (0.0495, 0.0443, 0.0836),
    (-0.0099, 0.0096, 0.0644),
    (0.2144, 0.3009, 0.3652),
    (0.0166, -0.0039, -0.0054),
    (0.0157, 0.0103, -0.0160),
    (-0.0398, 0.0902, -0.0235),
    (-0.0052, 0.0095, 0.0109),
    (-0.3527, -0.2712, -0.1666),
    (-0.0301, -0.0356, -0.0180),
    (-0.0107, 0.0078, 0.0013),
    (0.0746, 0.0090, -0.0941),
    (0.0156, 0.0169, 0.0070),
    (-0.0034, -0.0040, -0.0114),
    (0.0032, 0.0181, 0.0080),
    (-0.0939, -0.0008, 0.0186),
    (0.0018, 0.0043, 0.0104),
    (0.0284, 0.0056, -0.0127),
    (-0.0024, -0.0022, -0.0030),
    (0.1207, -0.0026, 0.0065),
    (0.0128, 0.0101, 0.0142),
    (0.0137, -0.0072, -0.0007),
    (0.0095, 0.0092, -0.0059),
    (0.0000, -0.0077, -0.0049),
    (-0.0465, -0.0204, -0.0312),
    (0.0095, 0.0012, -0.0066),
    (0.0290, -0.0034, 0.0025),
    (0.0220, 0.0169, -0.0048),
    (-0.0332, -0.0457, -0.0468),
    (-0.0085, 0.0389, 0.0609),
    (-0.0076, 0.0003, -0.0043),
    (-0.0111, -0.0460, -0.0614),
    (-0.0329, -0.0718, -0.0851),
)
"""Of FLUX.2's, for its latents ungrouped; figures of ComfyUI (comfy/latent_formats.py, `Flux2`)."""
NANO_LATENT_RGB: LatentRGB = (
    (0.5313, 0.5621, 0.2364),
    (0.8056, -0.1241, 0.3850),
    (0.4754, -0.0084, 0.2688),
    (-0.5309, -0.2112, 0.3542),
    (0.2720, 0.0500, -0.0255),
)
"""Of nano's: `fit_latent_rgb` on the evaluation images `seen`; it explains 0.90 of the variance on `held-out`."""


def fit_latent_rgb(z: Tensor, images: Tensor) -> LatentRGB:
    """The least-squares fit of images by their latents.

    Args:
        z: latents `[B, C, h, w]`.
        images: `[B, 3, H, W]` in [-1, 1]; averaged down to h x w.

    Returns:
        C + 1 rows; the last is the offset.
    """
    targets = functional.interpolate(images, z.shape[-2:], mode="area")
    rows = z.movedim(1, -1).flatten(0, -2)
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    solution: Tensor = torch.linalg.lstsq(rows, targets.movedim(1, -1).flatten(0, -2)).solution
    return tuple((red, green, blue) for red, green, blue in solution.tolist())


def latents_to_rgb(z: Tensor, latent_rgb: LatentRGB) -> Tensor:
    """Latents `[B, C, h, w]` => images `[B, 3, h, w]`, clamped to [-1, 1].

    Args:
        latent_rgb: with C or C + 1 rows.
    """
    matrix = torch.tensor(latent_rgb, device=z.device, dtype=torch.float32)
    channels = z.shape[1]
    rgb = torch.einsum("bchw,cr->brhw", z.float(), matrix[:channels])
    if len(matrix) > channels:
        rgb = rgb + matrix[channels].view(1, 3, 1, 1)
    return rgb.clamp(-1, 1)
