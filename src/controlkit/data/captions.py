"""Captions for images without one, by BLIP (Li et al. 2022, arXiv 2201.12086) through transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from controlkit.conditions.models import LearnedModel, find_folder
from controlkit.data.input_images import STATE, InputImage
from controlkit.data.sources import open_image
from controlkit.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

BLIP = "Salesforce/blip-image-captioning-base"
"""Download of 990 MB."""

_MODEL = LearnedModel(hub=BLIP, licence="BSD-3-Clause", commercial=True)

_BATCH = 8
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_SPREAD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of BLIP's preprocessing, in RGB (its preprocessor_config.json)."""


class Captioner:
    """BLIP, loaded once.

    Args:
        model: model folder, or hub id.
        asked_by: what needs captions, for errors.
        parameter: the option that sets `model`, for errors.

    Raises:
        UserError: the weights are missing or cannot be loaded, or there is no such device.
    """

    def __init__(
        self,
        model: str = BLIP,
        device: str = "cpu",
        *,
        asked_by: str = "--caption blip",
        parameter: str = "--caption-model",
    ) -> None:
        import torch
        from transformers import AutoTokenizer, BlipForConditionalGeneration

        folder = find_folder(asked_by, _MODEL, None if model == BLIP else model, parameter=parameter)
        try:
            # From the folder: with a hub id, transformers would ask the network again for every file.
            self.model = BlipForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers raises all kinds of errors for mismatched settings and weights
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"the BLIP model in {folder} cannot be loaded ({reason}); download it again: {_MODEL.download}",
                "damaged-file",
            ) from error
        try:
            self.model.to(torch.device(device))
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device} is not available; use cpu or cuda", "device-unavailable") from error
        self.name = model
        self.device = device

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption per RGB image, by greedy decoding: deterministic."""
        import torch
        from PIL import Image

        side = int(self.model.config.vision_config.image_size)
        small = [np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)) for image in images]
        # pixels [0, 255] => normalised float [B, 3, side, side]
        mean, spread = np.array(_MEAN, np.float32), np.array(_SPREAD, np.float32)
        values = (np.stack(small).astype(np.float32) / 255 - mean) / spread
        pixels = torch.from_numpy(values).permute(0, 3, 1, 2).contiguous().to(self.device)
        with torch.no_grad():
            tokens = self.model.generate(pixel_values=pixels, max_new_tokens=40, do_sample=False, num_beams=1)
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def with_captions(
    images: Sequence[InputImage],
    out: Path,
    load: Callable[[], Captioner],
    model: str = BLIP,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[InputImage]:
    """Add BLIP captions to the images without one. They are stored in `out` for later runs.

    Unreadable images stay without; making their pairs reports why. The model is loaded only if needed.

    Args:
        load: creates the captioner.
        progress: called with (images done, images in total).
    """
    uncaptioned = [image for image in images if _is_uncaptioned(image)]
    path = out / STATE / "captions.jsonl"
    known = {(key, stamp): text for name, key, stamp, text in _read(path) if name == model}
    for image in uncaptioned:
        if (image.key, image.stamp()) not in known and (image.key, image.former_stamp()) in known:
            known[image.key, image.stamp()] = known[image.key, image.former_stamp()]
    todo = [image for image in uncaptioned if (image.key, image.stamp()) not in known]
    if todo:
        captioner = load()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as stream:
            stream.write("\n" if path.stat().st_size else "")
            for first in range(0, len(todo), _BATCH):
                group = list(_readable(todo[first : first + _BATCH]))
                texts = captioner([image for _, image in group]) if group else []
                for (image, _), text in zip(group, texts, strict=True):
                    known[image.key, image.stamp()] = text
                    stream.write(json.dumps([model, image.key, image.stamp(), text]) + "\n")
                stream.flush()
                progress(min(len(todo), first + _BATCH), len(todo))
    captions = {image.key: known.get((image.key, image.stamp()), "") for image in uncaptioned}
    return [
        replace(image, prompt=captions[image.key], has_default_prompt=True) if captions.get(image.key) else image
        for image in images
    ]


def _is_uncaptioned(image: InputImage) -> bool:
    try:
        return not image.caption()
    except UserError:
        return False  # making the pair reports what is wrong with the caption


def _readable(images: Sequence[InputImage]) -> Iterator[tuple[InputImage, Any]]:
    for image in images:
        try:
            yield image, open_image(image.source)
        except UserError:
            continue


def _read(path: Path) -> Iterator[tuple[str, str, str, str]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                name, key, stamp, text = json.loads(line)
            except (ValueError, TypeError):
                continue  # the truncated last line of a killed run
            yield name, key, stamp, text
