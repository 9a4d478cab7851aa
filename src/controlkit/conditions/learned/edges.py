"""HED: soft edges, sketches and scribbles."""

from __future__ import annotations

import cv2
import numpy as np

from controlkit.conditions.condition import BLACK, chance, condition, uniform_int
from controlkit.conditions.edges import dark_strokes
from controlkit.conditions.fidelity import DARK_EDGE_F1, EDGE_F1, PSNR
from controlkit.conditions.learned.inputs import AT_RESOLUTION, back_to_size, pixels_of, to_resolution
from controlkit.conditions.models import LearnedModel, find_folder, load_network
from controlkit.conditions.pixels import three_channels, to_uint8

HED_MODEL = LearnedModel(
    hub="lllyasviel/Annotators", licence="Apache-2.0", commercial=True, files=("ControlNetHED.pth",)
)


@condition(
    "hed",
    summary="soft white edges on black (HED, retrained for ControlNet)",
    background=BLACK,
    aliases=("softedge_hed", "softedge", "soft_edge"),
    fidelity=PSNR,
    limits={"resolution": (64, 4096)},
    requires=HED_MODEL,
    channels=1,
    input_size=AT_RESOLUTION,
)
def hed(image: np.ndarray, *, safe: bool = False, resolution: int = 512, model: str | None = None) -> np.ndarray:
    """Edges that a person would outline. lllyasviel/ControlNet, annotator/hed.

    Args:
        safe: three levels only, `floor(3 x) / 2`, as for 75 % of ControlNet 1.1's soft edges in training.
        resolution: short side of the network's input, in pixels.
        model: a folder with `ControlNetHED.pth`, or another model on the hub with that file.
    """
    edges = _edges("hed", image, resolution, model)
    if safe:
        edges = np.minimum(np.floor(edges * 3) / 2, 1)
    return three_channels(to_uint8(255 * back_to_size(edges, *image.shape[:2])))


@condition(
    "hedsketch",
    summary="dark pencil strokes on white (thresholded HED; CtrLoRA's sketch)",
    aliases=("sketch_hed",),
    fidelity=DARK_EDGE_F1,
    random={"threshold": uniform_int(110, 159)},
    limits={"threshold": (1, 255), "resolution": (64, 4096)},
    requires=HED_MODEL,
    channels=1,
    input_size=AT_RESOLUTION,
)
def hedsketch(
    image: np.ndarray, *, threshold: int = 134, resolution: int = 512, model: str | None = None
) -> np.ndarray:
    """HED's edges above `threshold` of 255, dark on white, softened. CtrLoRA, annotator/hedsketch.

    The reference samples its threshold at random even in evaluation; here it is a parameter, lowered by a quarter, up
    to five times, while less than 0.5 % of the pixels are dark.

    Args:
        threshold: of 255.
        resolution: as for `hed`.
        model: as for `hed`.
    """
    edges = back_to_size(_edges("hedsketch", image, resolution, model), *image.shape[:2])
    return three_channels(dark_strokes(255 * edges, threshold))


@condition(
    "scribble_hed",
    summary="broad white strokes on black (the ridges of HED; ControlNet's fake scribble)",
    background=BLACK,
    aliases=("fake_scribble_hed",),
    fidelity=EDGE_F1,
    random={"safe": chance(0.5)},
    limits={"resolution": (64, 4096)},
    requires=HED_MODEL,
    channels=1,
    values=(0, 255),
    input_size=AT_RESOLUTION,
)
def scribble_hed(
    image: np.ndarray, *, safe: bool = False, resolution: int = 512, model: str | None = None
) -> np.ndarray:
    """The ridges of HED's edges, broadened. lllyasviel/ControlNet, gradio_fake_scribble2image.

    Edges are blurred by 3 pixels of `resolution`, thinned to maxima above 127 across one of four directions, blurred
    by 3 again and thresholded at 4. (CtrLoRA's sketch, dark on white, is `hedsketch`.)

    Args:
        safe: as for `hed`, before the thinning.
        resolution: as for `hed`.
        model: as for `hed`.
    """
    edges = _edges("scribble_hed", image, resolution, model)
    if safe:
        edges = np.minimum(np.floor(edges * 3) / 2, 1)
    return strokes_along(edges, *image.shape[:2])


def strokes_along(edges: np.ndarray, height: int, width: int) -> np.ndarray:
    """Broad white strokes on black `uint8 [height, width, 3]` along the ridges of edges `[h, w]` in [0, 1]."""
    strokes = cv2.GaussianBlur(ridges(255 * edges), (0, 0), 3.0) > 4
    scaled = back_to_size(np.where(strokes, np.uint8(255), np.uint8(0)), height, width)
    return three_channels(np.where(scaled > 127, np.uint8(255), np.uint8(0)))


def ridges(edges: np.ndarray, threshold: float = 127, sigma: float = 3.0) -> np.ndarray:
    """Ridges of `[H, W]` (0 to 255) as lines of one pixel, 255 on black, `uint8 [H, W]`."""
    smooth = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), sigma)
    diagonal = np.eye(3, dtype=np.uint8)
    horizontal = np.zeros((3, 3), np.uint8)
    horizontal[1] = 1
    ridge = np.zeros(edges.shape, bool)
    for line in (horizontal, horizontal.T, diagonal, diagonal[::-1]):
        ridge |= cv2.dilate(smooth, np.ascontiguousarray(line)) == smooth
    return np.where(ridge & (smooth > threshold), np.uint8(255), np.uint8(0))


def _edges(name: str, image: np.ndarray, resolution: int, override: str | None) -> np.ndarray:
    """`float32 [h, w]` in [0, 1], at the network's resolution."""
    import torch

    from controlkit.conditions.learned.networks import HED

    network = load_network(name, find_folder(name, HED_MODEL, override) / HED_MODEL.files[0], HED)
    pixels = pixels_of(to_resolution(image, resolution))
    with torch.inference_mode():
        return network(pixels.to(network.norm.device))[0, 0].cpu().numpy()
