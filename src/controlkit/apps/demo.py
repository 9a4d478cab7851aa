"""generate images from a drawing with nano, in seconds

controlkit demo
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json, print_seconds

PROMPT = "sailboat, noto style, on a teal background"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("--out", default="controlkit-out/demo", metavar="DIR", help="folder for the images")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from importlib.resources import files
    from pathlib import Path

    from controlkit.files import writable_folder

    out = writable_folder(args.out)
    drawing = Path(str(files("controlkit") / "assets" / "demo" / "sailboat.png"))

    import time

    from controlkit.bases.load import load_base
    from controlkit.images import contact_sheet, read_image, write_png
    from controlkit.sampling.generate import generate
    from controlkit.sampling.request import ControlUse, GenerateRequest

    start = time.perf_counter()
    base = load_base()
    loaded = time.perf_counter() - start
    no_control = generate(GenerateRequest(prompt=PROMPT, seeds=(0,)), base=base)
    request = GenerateRequest(
        prompt=PROMPT, seeds=(0, 1, 2, 3), controls=(ControlUse(control="canny", image=str(drawing)),)
    )
    controlled = generate(request, base=base)
    controlled.save(out)
    titles = ["drawing", "condition", "no control", *(f"seed {image.seed}" for image in controlled.images)]
    images = [
        read_image(drawing),
        *controlled.conditions.values(),
        *(generated.image for generated in (*no_control.images, *controlled.images)),
    ]
    sheet = out / "sheet.png"
    write_png(sheet, contact_sheet([images], titles, cell=160))
    seconds = {
        "load nano": loaded,
        "load the control": controlled.seconds["load"],
        "compute the condition": controlled.seconds["condition"],
        "sample without control": no_control.seconds["sample"],
        "sample four under control": controlled.seconds["sample"],
    }
    if args.json:
        print_json({"out": str(out), "sheet": str(sheet), "seconds": seconds})
        return
    print_seconds(seconds)
    print(f"images: {out}")
    print(f"contact sheet: {sheet}")
    print(f'try next: controlkit generate "{PROMPT}" --control canny={drawing}@0.7:0-0.6 --seeds 4')
    print("      or: controlkit condition --list")
