"""compute condition images, or list the conditions

controlkit condition --list
controlkit condition canny
controlkit condition canny photo.jpg --out edges.png --set low=50 --set high=150
controlkit condition canny photos --out edges
controlkit condition all photo.jpg --out sheet.png
controlkit condition depth photo.jpg --set model=weights/dpt-large

Learned conditions download their weights from the Hugging Face hub on first use, unless they are in the folder `model`,
in $CONTROLKIT_MODELS/OWNER/NAME or in the cache of the hub. HF_HUB_OFFLINE=1 forbids the network.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.apps.show import Reported, add_json, error_json, print_facts, print_json, print_notes
from controlkit.errors import UserError

if TYPE_CHECKING:
    from controlkit.conditions import Condition
    from controlkit.data.input_images import InputImage

_COLUMNS, _TILE = 6, 168
_LISTED = 5
"""How many renamed condition images a note lists."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("name", nargs="?", default=None, help="a condition; `all` for those that need no weights")
    parser.add_argument(
        "image",
        nargs="?",
        default=None,
        help="the image, at least 16 x 16 pixels, or a folder of images; without one, the condition is described",
    )
    out = "PNG to write (default: NAME.png), or folder for a folder of images"
    parser.add_argument("--out", default=None, metavar="FILE", help=out)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings", help="set a parameter"
    )
    parser.add_argument("--list", action="store_true", default=False, help="list every condition")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit import conditions

    if args.list:
        if args.name is not None:
            raise UserError(
                f"--list lists all conditions; to describe one: controlkit condition {args.name}", "contradiction"
            )
        _list(args.json)
        return
    if args.name is None:
        raise UserError("name a condition and an image, or use --list", "missing-setting")
    _refuse_exchanged(args.name, args.image)
    if args.image is None:
        if args.name == "all" or args.out or args.settings:
            raise UserError(f"{args.name}: no image to compute it from; give one", "missing-setting")
        _describe(conditions.find(args.name), args.json)
        return
    import numpy as np
    from PIL import Image

    from controlkit.images import decode_rgb, is_flat, read_bytes, sequence_note, write_png
    from controlkit.settings import read_overrides

    if args.name == "all":
        if args.settings:
            raise UserError("all computes every condition with its defaults; name one to use --set", "contradiction")
        out = args.out or _free("conditions.png")
        _refuse_out(out, args.image)
        _sheet(args.image, out, args.json)
        return
    condition = conditions.find(args.name)
    parameters = read_overrides(args.settings)
    if os.path.isdir(args.image):
        if args.out is None:
            raise UserError(f"{args.image} is a folder; name the folder to write with --out DIR", "missing-setting")
        _folder(condition, args.image, args.out, parameters, args.json)
        return
    out = args.out or _free(f"{condition.name}.png")
    _refuse_out(out, args.image)
    data = read_bytes(args.image)
    condition_image = condition(np.asarray(decode_rgb(data, args.image)), **parameters)
    notes = sequence_note(data, args.image)
    if is_flat(condition_image):
        notes.append(f"{condition.name} of {args.image} is one flat colour: nothing was detected in the image")
    write_png(out, Image.fromarray(condition_image), {"condition": condition.name, "parameters": repr(parameters)})
    print_notes(notes)
    if args.json:
        values = {**condition.defaults, **parameters}
        print_json({"condition": condition.name, "parameters": values, "out": out, "notes": notes})
    else:
        print(out)


def _folder(condition: Condition, folder: str, out: str, parameters: dict[str, Any], as_json: bool) -> None:
    """Write the condition image of every image below a folder, as PNG files with the same paths."""
    import numpy as np
    from PIL import Image

    from controlkit.data.input_images import CONDITION_IMAGES, list_images
    from controlkit.data.sources import read_file
    from controlkit.files import writable_folder
    from controlkit.images import decode_rgb, is_flat, sequence_note, write_png
    from controlkit.progress import Progress

    if os.path.exists(out) and (not os.path.isdir(out) or os.path.samefile(out, folder)):
        what = "the input folder" if os.path.isdir(out) else "a file"
        raise UserError(f"--out {out} is {what}; choose another folder for the condition images", "would-overwrite")
    notes: list[str] = []
    images = list_images([folder], without=out, notes=notes)
    if not os.path.isdir(out) or not os.listdir(out):
        writable_folder(Path(out) / CONDITION_IMAGES)
    for image in images:
        if (path := Path(out) / f"{image.key}.png").exists() and (found := _condition_in(path)) != condition.name:
            made = "`controlkit condition` did not write it" if found is None else f"is of the condition {found}"
            raise UserError(f"{path} exists, and {made}; choose another --out", "would-overwrite")
    progress = Progress("images", len(images), always=True)
    skipped: dict[str, str] = {}
    first: UserError | None = None
    flat = 0
    for done, image in enumerate(images, 1):
        opened = False
        try:
            data = read_file(image.source)
            pixels = np.asarray(decode_rgb(data, str(image.source)))
            opened = True
            condition_image = condition(pixels, **parameters)
        except UserError as error:
            # A link may lead nowhere; a missing file of the condition concerns all images.
            is_missing = error.code == "missing-file" and not opened
            if not is_missing and error.code not in ("bad-image", "damaged-file", "unreadable-file", "wrong-size"):
                raise
            first = first or error
            skipped[image.name] = str(error)
            continue
        finally:
            progress(done)
        flat += is_flat(condition_image)
        notes += sequence_note(data, image.name)
        text = {"condition": condition.name, "parameters": repr(parameters)}
        write_png(Path(out) / f"{image.key}.png", Image.fromarray(condition_image), text)
    written = len(images) - len(skipped)
    notes += _renamed([image for image in images if image.name not in skipped])
    notes += [f"{flat} of {written} condition images are one flat colour: nothing was detected"] if flat else []
    print_notes(notes)
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    failure = None if first is None else UserError(f"{len(skipped)} of {len(images)} images were skipped", first.code)
    if as_json:
        facts: dict[str, Any] = {"condition": condition.name, "parameters": {**condition.defaults, **parameters}}
        facts |= {"out": out, "written": written, "skipped": skipped, "notes": notes}
        print_json(facts if failure is None else {**facts, "error": error_json(failure)})
    else:
        print(out)
    if failure is not None:
        raise Reported(str(failure), failure.code)


def _renamed(images: Sequence[InputImage]) -> list[str]:
    """A note if condition images have other names than their image files, without the suffix."""
    others = [
        f"{image.name} -> {image.key}.png"
        for image in images
        if isinstance(image.source, Path) and image.key != image.name.rpartition(".")[0]
    ]
    if not others:
        return []
    more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
    return [f"condition images with other names than their images: {', '.join(others[:_LISTED])}{more}"]


def _condition_in(path: Path) -> str | None:
    """The condition of a PNG file of this command; None if it is another file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            name = image.info.get("condition")
            return None if name is None else str(name)
    except OSError:
        return None


def _sheet(image: str, out: str, as_json: bool) -> None:
    """Write a contact sheet of every condition that needs neither weights nor annotations."""
    import numpy as np
    from PIL import Image

    from controlkit import conditions
    from controlkit.images import contact_sheet, decode_rgb, is_flat, read_bytes, sequence_note, write_png

    data = read_bytes(image)
    original = decode_rgb(data, image)
    images, flat = {"image": original}, []
    for condition in conditions.registry().values():
        if condition.requires is None and not condition.provided:
            condition_image = condition(np.asarray(original))
            images[condition.name] = Image.fromarray(condition_image)
            flat += [condition.name] if is_flat(condition_image) else []
    tiles = [contact_sheet([[tile]], column_titles=[name], cell=_TILE) for name, tile in images.items()]
    rows = [tiles[first : first + _COLUMNS] for first in range(0, len(tiles), _COLUMNS)]
    width, height = tiles[0].size
    sheet = Image.new("RGB", (width * _COLUMNS, height * len(rows)), "white")
    for number, tile in enumerate(tiles):
        sheet.paste(tile, (width * (number % _COLUMNS), height * (number // _COLUMNS)))
    write_png(out, sheet)
    notes = sequence_note(data, image)
    if flat:
        notes.append(f"one flat colour, because nothing was detected in {image}: {', '.join(flat)}")
    print_notes(notes)
    if as_json:
        print_json({"conditions": list(images)[1:], "out": out, "notes": notes})
    else:
        print(out)


def _free(out: str) -> str:
    """The name of the output where none was given, if there is no such file."""
    if os.path.exists(out):
        raise UserError(f"{out} already exists; name the file to write with --out", "would-overwrite")
    return out


def _refuse_out(out: str, image: str) -> None:
    """Refuse to write over the image, or to another format than PNG."""
    if os.path.exists(out) and os.path.exists(image) and os.path.samefile(out, image):
        raise UserError(f"--out {out} is the input image; choose another name", "would-overwrite")
    if os.path.splitext(out)[1].lower() not in ("", ".png"):
        raise UserError(f"--out {out}: condition images are written as PNG; expected a name ending in .png", "usage")


def _refuse_exchanged(name: str, image: str | None) -> None:
    """Refuse an image in place of the condition, and a folder for a sheet."""
    from controlkit import conditions

    if os.path.isfile(name) and name not in conditions.registry() and not (image and os.path.exists(image)):
        first = image or "NAME"
        raise UserError(
            f"{name} is a file, not a condition; the condition comes first: controlkit condition {first} {name}",
            "usage",
        )
    if name == "all" and image and os.path.isdir(image):
        raise UserError(
            f"{image} is a folder; `all` makes a sheet of one image: pass an image, or name one condition", "wrong-kind"
        )


def _list(as_json: bool) -> None:
    from controlkit import conditions

    everything = conditions.registry().values()
    if as_json:
        print_json([_facts(c) for c in everything])
        return
    rows = [("name", "needs", "description")]
    rows += [(c.name, "a model" if c.requires else "nothing", c.summary) for c in everything]
    first, second = (max(len(row[place]) for row in rows) + 2 for place in (0, 1))
    # Lines are cut on a terminal only, so that grep finds every word.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for name, needs, summary in rows:
        line = f"{name:<{first}}{needs:<{second}}{summary}"
        print(line if width is None or len(line) <= width else f"{line[: max(first, width - 1)].rstrip()}…")


def _facts(c: Condition) -> dict[str, object]:
    """All facts about a condition, for programs."""
    from controlkit.conditions.condition import LEAST_SIDE

    return {
        "name": c.name,
        "aliases": list(c.aliases),
        "summary": c.summary,
        "parameters": c.defaults,
        "training": {name: str(draw) for name, draw in c.random.items()},
        "limits": {name: list(limits) for name, limits in c.limits.items()},
        "channels": c.channels,
        "range": [0, 255],
        "values": None if c.values is None else list(c.values),
        "mirrors": c.mirrors,
        "finished_mirrors": c.mirror_finished is not None,
        "cuts": c.croppable,
        "resize": c.resize,
        "background": list(c.background),
        "least_side": LEAST_SIDE,
        "greatest_side": c.greatest_side,
        "seen": c.input_size,
        "fidelity": c.fidelity.name,
        "needs": c.requires.as_json() if c.requires else None,
    }


def _describe(c: Condition, as_json: bool) -> None:
    """Describe one condition."""
    if as_json:
        print_json(_facts(c))
        return
    facts = [("summary", c.summary)]
    if c.aliases:
        facts.append(("aliases", ", ".join(c.aliases)))
    for name, default in c.defaults.items():
        details = [f"default {default!r}"]
        if name in c.limits:
            details.append("from {} to {}".format(*c.limits[name]))
        if name in c.random:
            details.append(f"in training {c.random[name]}")
        facts.append((f"parameter {name}", "; ".join(details)))
    facts += [
        ("channels", "1, repeated as RGB" if c.channels == 1 else "RGB"),
        ("values", "0 to 255" if c.values is None else ", ".join(map(str, c.values))),
        ("size", f"{_sizes(c)}; the condition image has the same. Computed {c.input_size}"),
        ("flip", _flip(c)),
        ("crop", "cropped with its image" if c.croppable else "best recomputed from the cropped image"),
        ("scaling", "nearest pixel, as colours are labels" if c.resize == "nearest" else "smooth"),
        ("transparency", f"shown on {_colour(c.background)}"),
        ("score", c.fidelity.name),
        ("needs", str(c.requires or "nothing")),
    ]
    print_facts(c.name, facts)


def _colour(colour: tuple[int, int, int]) -> str:
    return {(0, 0, 0): "black", (255, 255, 255): "white"}.get(colour, "red {}, green {}, blue {}".format(*colour))


def _sizes(c: Condition) -> str:
    from controlkit.conditions.condition import LEAST_SIDE

    least = f"at least {LEAST_SIDE} x {LEAST_SIDE}"
    return least if c.greatest_side is None else f"{least}, sides up to {c.greatest_side}"


def _flip(c: Condition) -> str:
    from controlkit.conditions.condition import left_right

    if c.mirror_finished is None:
        return "condition images cannot be flipped: their colours encode left and right"
    if c.mirror_finished is not left_right:
        return "flipped with its image, and its vectors mirrored"
    return "flipped with its image" + ("" if c.mirrors else "; recomputed, random parts or annotations stay in place")
