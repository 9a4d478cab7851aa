"""generate 20 images from a drawing with nano

controlkit demo
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from controlkit.apps.show import add_json, print_json, print_seconds

PROMPT = "sailboat, noto style, on a teal background"
SEEDS = (0, 1, 2, 3)
ROWS: dict[str, dict[str, float]] = {
    "no control": {},
    "ControlNet: canny": {"canny": 1.0},
    "CtrLoRA adapter: scribble": {"nano/scribble": 1.0},
    "two adapters: scribble, palette": {"nano/scribble": 0.8, "nano/palette": 0.6},
    "colouring: grayscale": {"nano/grayscale": 1.0},
}
"""Title of a row -> its controls with their weights."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("--out", default="controlkit-out/demo", metavar="DIR", help="folder for the images")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from importlib.resources import files

    from controlkit.files import writable_folder

    out = writable_folder(args.out)
    drawing = Path(str(files("controlkit") / "assets" / "demo" / "sailboat.png"))

    import time

    from PIL import Image

    from controlkit.bases.load import load_base
    from controlkit.images import contact_sheet, read_image, write_png
    from controlkit.sampling.generate import generate
    from controlkit.sampling.request import GenerateRequest
    from controlkit.sampling.uses import ControlUse

    start = time.perf_counter()
    base = load_base()
    seconds = {"load nano": time.perf_counter() - start}
    rows: list[list[Image.Image]] = []
    white = Image.new("RGB", (base.size, base.size), "white")
    for title, controls in ROWS.items():
        start = time.perf_counter()
        uses = (ControlUse(control=name, image=str(drawing), weight=weight) for name, weight in controls.items())
        made = generate(GenerateRequest(prompt=PROMPT, seeds=SEEDS, controls=tuple(uses)), base=base)
        made.save(out / title.partition(":")[0].replace(" ", "-"))
        conditions = [*made.conditions.values()] or [read_image(drawing)]
        rows.append([*conditions, *[white] * (2 - len(conditions)), *(one.image for one in made.images)])
        seconds[title] = time.perf_counter() - start
    sheet = out / "sheet.png"
    columns = ["from the drawing", "", *(f"seed {seed}" for seed in SEEDS)]
    write_png(sheet, contact_sheet(rows, columns, [*ROWS], cell=144))
    if args.json:
        print_json({"out": str(out), "sheet": str(sheet), "seconds": seconds})
        return
    print_seconds(seconds)
    print(f"images: {out}")
    print(f"contact sheet: {sheet}")
    print("try next:")
    for line in _next(drawing):
        print(f"  {line}")


def _next(drawing: Path) -> list[str]:
    """Commands to try after the demo, as they work in the shell that called it."""
    program = "controlkit" if shutil.which("controlkit") else shlex.quote(os.path.relpath(sys.argv[0]))
    image = shlex.quote(str(drawing))
    return [
        f'{program} generate "{PROMPT}" --control canny={image}@0.7:0-0.6 --seeds 4',
        f'{program} generate "house, noto style" --control nano/silhouette={image} --seeds 4',
        f"{program} condition all {image} --out conditions.png",
    ]
