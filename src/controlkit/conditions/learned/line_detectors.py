"""Line art by informative drawings; anime line art, straight lines and PiDiNet's edges by controlnet_aux."""

from __future__ import annotations

import numpy as np

from controlkit.conditions.condition import BLACK, chance, condition, uniform
from controlkit.conditions.fidelity import EDGE_F1, PSNR
from controlkit.conditions.learned.controlnet_aux import annotate
from controlkit.conditions.learned.edges import strokes_along
from controlkit.conditions.learned.inputs import AT_RESOLUTION, back_to_size, pixels_of, to_resolution
from controlkit.conditions.models import LearnedModel, find_folder, load_network
from controlkit.conditions.pixels import three_channels, to_uint8

LINEART = LearnedModel(
    hub="lllyasviel/Annotators", licence="MIT", commercial=True, files=("sk_model.pth", "sk_model2.pth")
)
LINEART_ANIME = LearnedModel(
    hub="lllyasviel/Annotators", licence="MIT", commercial=True, extra="annotators", files=("netG.pth",)
)
MLSD = LearnedModel(
    hub="lllyasviel/Annotators",
    licence="Apache-2.0",
    commercial=True,
    extra="annotators",
    files=("mlsd_large_512_fp32.pth",),
)
PIDINET = LearnedModel(
    hub="lllyasviel/Annotators",
    licence="PiDiNet's own, for research",
    commercial=False,
    extra="annotators",
    files=("table5_pidinet.pth",),
)


@condition(
    "lineart",
    summary="white line art on black (informative drawings, fine or coarse)",
    background=BLACK,
    aliases=("lineart_realistic", "lineart_drawing"),
    fidelity=PSNR,
    random={"coarse": chance(0.5)},
    limits={"resolution": (64, 4096)},
    requires=LINEART,
    channels=1,
    input_size=AT_RESOLUTION,
)
def lineart(image: np.ndarray, *, coarse: bool = False, resolution: int = 512, model: str | None = None) -> np.ndarray:
    """A line drawing (Chan, Durand and Isola 2022), inverted to white on black as for ControlNet.

    CtrLoRA, annotator/lineart, trains with `coarse` in half of the images.

    Args:
        coarse: the drawing with fewer lines (`sk_model2.pth`).
        resolution: short side of the network's input, in pixels.
        model: a folder with `sk_model.pth` and `sk_model2.pth`, or another model on the hub with these files.
    """
    import torch

    from controlkit.conditions.learned.networks import LineDrawing

    folder = find_folder("lineart", LINEART, model)
    network = load_network("lineart", folder / LINEART.files[coarse], LineDrawing)
    pixels = pixels_of(to_resolution(image, resolution)) / 255
    with torch.inference_mode():
        drawing = network(pixels.to(next(network.parameters()).device))[0, 0].cpu().numpy()
    return three_channels(to_uint8(255 * (1 - back_to_size(drawing, *image.shape[:2]))))


@condition(
    "lineart_anime",
    summary="white line art on black, for anime (Anime2Sketch)",
    background=BLACK,
    aliases=("anime2sketch",),
    fidelity=PSNR,
    limits={"resolution": (64, 4096)},
    requires=LINEART_ANIME,
    channels=1,
    input_size=AT_RESOLUTION,
)
def lineart_anime(image: np.ndarray, *, resolution: int = 512, model: str | None = None) -> np.ndarray:
    """Anime2Sketch's drawing at sides that are multiples of 256, inverted to white on black.

    Args:
        resolution: short side of the network's input, in pixels.
        model: a folder with `netG.pth`, or another model on the hub with that file.
    """
    return annotate("lineart_anime", LINEART_ANIME, "LineartAnimeDetector", image, resolution, model)


@condition(
    "mlsd",
    summary="straight white lines on black (M-LSD large)",
    background=BLACK,
    aliases=("hough", "m_lsd"),
    fidelity=EDGE_F1,
    random={"score": uniform(0.1, 2.0), "distance": uniform(0.1, 20.0)},
    limits={"score": (0, 2), "distance": (0, 100), "resolution": (64, 4096)},
    requires=MLSD,
    channels=1,
    values=(0, 255),
    input_size=AT_RESOLUTION,
)
def mlsd(
    image: np.ndarray,
    *,
    score: float = 0.1,
    distance: float = 0.1,
    resolution: int = 512,
    model: str | None = None,
) -> np.ndarray:
    """Line segments a pixel wide, at the network's resolution (Gu et al. 2022).

    Defaults: ControlNet 1.0. CtrLoRA trains with a score of 0.1 to 2 and a distance of 0.1 to 20.

    Args:
        score: minimum score of a segment.
        distance: minimum length of a segment, in pixels of half the resolution.
        resolution: short side of the network's input, in pixels.
        model: a folder with `mlsd_large_512_fp32.pth`, or another model on the hub with that file.
    """
    lines = annotate("mlsd", MLSD, "MLSDdetector", image, resolution, model, thr_v=score, thr_d=distance)
    # Scaling leaves grey along the lines.
    return np.where(lines > 63, np.uint8(255), np.uint8(0))


@condition(
    "pidinet",
    summary="soft white edges on black (PiDiNet)",
    background=BLACK,
    aliases=("softedge_pidinet", "softedge_pidi", "pidi"),
    fidelity=PSNR,
    random={"safe": chance(0.75)},
    limits={"resolution": (64, 4096)},
    requires=PIDINET,
    channels=1,
    input_size=AT_RESOLUTION,
)
def pidinet(image: np.ndarray, *, safe: bool = False, resolution: int = 512, model: str | None = None) -> np.ndarray:
    """Edges by pixel difference networks (Su et al. 2021), ControlNet 1.1's default for soft edges.

    Args:
        safe: three levels only, as for 75 % of ControlNet 1.1's soft edges in training.
        resolution: short side of the network's input, in pixels.
        model: a folder with `table5_pidinet.pth`, or another model on the hub with that file.
    """
    return annotate("pidinet", PIDINET, "PidiNetDetector", image, resolution, model, safe=safe)


@condition(
    "scribble_pidinet",
    summary="broad white strokes on black (the ridges of PiDiNet's edges)",
    background=BLACK,
    aliases=("fake_scribble_pidinet", "scribble_pidi"),
    fidelity=EDGE_F1,
    random={"safe": chance(0.5)},
    limits={"resolution": (64, 4096)},
    requires=PIDINET,
    channels=1,
    values=(0, 255),
    input_size=AT_RESOLUTION,
)
def scribble_pidinet(
    image: np.ndarray, *, safe: bool = False, resolution: int = 512, model: str | None = None
) -> np.ndarray:
    """`pidinet` as strokes, as `scribble_hed` of HED; ControlNet 1.1 has both.

    Args:
        safe: as for `pidinet`.
        resolution: as for `pidinet`.
        model: as for `pidinet`.
    """
    edges = annotate("scribble_pidinet", PIDINET, "PidiNetDetector", image, resolution, model, safe=safe)
    return strokes_along(edges[..., 0] / np.float32(255), *image.shape[:2])
