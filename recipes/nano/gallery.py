"""Sheets of what `generate` can do, drawn by nano: docs/images/generate.png.

    python recipes/nano/gallery.py --icons data/nano/icons.npz --out docs/images/generate.png

Rows: img2img, inpainting, masks of controls, two LoRAs of the base, a second pass. The LoRAs are trained here with peft
on grey and on coarse copies of the training icons, a few minutes each on one core, and written to `--work` in peft's
format; those that are there are used. A step of `make.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from controlkit.bases.load import load_base
from controlkit.files import write_json
from controlkit.images import contact_sheet, to_tensor, write_png
from controlkit.nano.icons import TRAINED_STYLES, IconSets, draw
from controlkit.progress import Progress
from controlkit.sampling.generate import generate
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.uses import ControlUse, LoraUse

RANK, BATCH, RATE = 16, 16, 2e-3
DRAWING = "src/controlkit/assets/demo/sailboat.png"
CELL = 128


def grey(image: np.ndarray) -> np.ndarray:
    """Without colour, `uint8 [H, W, 3]`."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def coarse(image: np.ndarray) -> np.ndarray:
    """In squares of 8 pixels."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (width // 8, height // 8), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_NEAREST)


LOOKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"grey": grey, "coarse": coarse}


def train_lora(look: Callable[[np.ndarray], np.ndarray], icons: str, steps: int, folder: Path) -> None:
    """Train a LoRA of nano's UNet on drawings that `look` has changed."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    base = load_base()
    known = IconSets(icons).select(styles=TRAINED_STYLES, held_out=False, drawable=True, sets=3)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"])
    inject_adapter_in_model(config, base.unet)
    trained = [weight for name, weight in base.unet.named_parameters() if "lora_" in name]
    for weight in trained:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    progress = Progress("LoRA steps")
    for step in range(steps):
        drawings = [draw(known[int(index)], rng) for index in rng.integers(len(known), size=BATCH)]
        z = base.encode_image(to_tensor([look(each.image) for each in drawings]) * 2 - 1)
        noise = torch.randn(z.shape)
        t = base.schedule.draw_times(BATCH, torch.Generator().manual_seed(step))
        text = base.encode_text([each.caption for each in drawings])
        x_t = base.schedule.add_noise(z, noise, t)
        loss = functional.mse_loss(base.predict(x_t, t, text), base.schedule.target(z, noise, t))
        loss.backward()
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        progress(step + 1, steps)
    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(base.unet)
    save_file(
        {f"base_model.model.{name}": value for name, value in weights.items()}, folder / "adapter_model.safetensors"
    )
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK})


def drawn(prompt: str, **settings: object) -> Image.Image:
    """The image of seed 3, or of the one given."""
    (one,) = generate(GenerateRequest(**{"prompt": prompt, "seeds": (3,), **settings})).images  # type: ignore[arg-type]
    return one.image


def rows_of(work: Path) -> dict[str, list[tuple[str, Image.Image]]]:
    """Title of a row -> its images with titles."""
    photo = Image.open(DRAWING).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    sails = np.zeros((64, 64), np.uint8)
    sails[2:44] = 255
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    files = {name: work / f"{name}.png" for name in ("photo", "sails", "left", "right")}
    for path, image in zip(files.values(), (photo, sails, left, 255 - left), strict=True):
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path)
    image, mask = str(files["photo"]), str(files["sails"])
    red = "sailboat, noto style, on a red background"
    canny = ControlUse(control="canny", image=DRAWING)
    teal = "sailboat, noto style, on a teal background"
    loras = {name: LoraUse(file=str(work / name)) for name in LOOKS}
    apple = "red apple, noto style, on a yellow background"

    def half(side: str, control: str) -> ControlUse:
        return ControlUse(control=control, image=DRAWING, mask=str(files[side]))

    return {
        "img2img": [
            ("image", photo),
            *((f"strength {value:g}", drawn(red, image=image, strength=value)) for value in (0.6, 0.8, 0.9)),
        ],
        "inpainting": [
            ("image", photo),
            ("mask", Image.fromarray(sails).convert("RGB")),
            ("rocket", drawn("rocket, noto style, on a white background", image=image, mask=mask, mask_blur=1)),
            ("sailboat, canny", drawn(teal, image=image, mask=mask, mask_blur=1, controls=(canny,))),
        ],
        "masks of controls": [
            ("canny", drawn(teal, controls=(canny,))),
            ("canny, left half", drawn(teal, controls=(half("left", "canny"),))),
            ("canny, right half", drawn(teal, controls=(half("right", "canny"),))),
            ("no control", drawn(teal)),
        ],
        "LoRAs": [
            ("none", drawn(apple)),
            ("grey", drawn(apple, loras=(loras["grey"],))),
            ("coarse", drawn(apple, loras=(loras["coarse"],))),
            ("both", drawn(apple, loras=tuple(loras.values()))),
        ],
        "second pass": [
            ("64 x 64", drawn(teal, controls=(canny,))),
            *(
                (
                    f"to {round(64 * factor)}, strength {strength:g}",
                    drawn(teal, controls=(canny,), hires=factor, hires_strength=strength),
                )
                for factor, strength in ((1.5, 0.5), (2.0, 0.4), (2.0, 0.7))
            ),
        ],
    }


def sheet_of(rows: dict[str, list[tuple[str, Image.Image]]]) -> Image.Image:
    """The rows below one another, each with titles of its own."""
    parts = [
        contact_sheet([[image for _, image in row]], [title for title, _ in row], [f"{name:18}"], cell=CELL)
        for name, row in rows.items()
    ]
    width = max(part.width for part in parts)
    sheet = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (width - part.width, top))
        top += part.height
    return sheet


def main() -> None:
    """Train what is missing and draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", default="data/nano/icons.npz", help="from step 1 of README.md")
    parser.add_argument("--work", type=Path, default=Path("runs/nano/gallery"))
    parser.add_argument("--steps", type=int, default=900, help="of each LoRA")
    parser.add_argument("--out", type=Path, default=Path("docs/images/generate.png"))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    for name, look in LOOKS.items():
        if not (args.work / name / "adapter_config.json").is_file():
            train_lora(look, args.icons, args.steps, args.work / name)
    write_png(args.out, sheet_of(rows_of(args.work)))


if __name__ == "__main__":
    main()
