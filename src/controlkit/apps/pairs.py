"""make training pairs from images, or check pairs; run again to resume

    controlkit pairs photos --conditions canny,palette --size 512 --out pairs
    controlkit pairs --check pairs

IMAGES are folders, globs in quotes, tar shards, COCO annotation files, Parquet files with images, folders of
`save_to_disk`, or datasets of the Hugging Face hub (hf://datasets/OWNER/NAME). The pairs are listed in
`pairs/pairs.jsonl`, which `controlkit adapt` reads. docs/pairs.md has all formats.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from controlkit.apps.show import (
    Reported,
    add_columns,
    add_json,
    columns_of,
    error_json,
    named_columns,
    print_json,
    print_notes,
    print_table,
)
from controlkit.errors import UserError
from controlkit.progress import Progress

if TYPE_CHECKING:
    from controlkit.data.engine import MakeReport
    from controlkit.data.input_images import InputImage
    from controlkit.data.prompts import PromptLimit

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb. Defaults of settings are those of `MakeSettings`."""
    parser.add_argument("images", nargs="*", default=[], metavar="IMAGES", help="source of the images")
    parser.add_argument(
        "--conditions", default="", metavar="NAME,NAME", help="conditions to compute (controlkit condition --list)"
    )
    parser.add_argument("--out", default=None, metavar="DIR", help="folder for the pairs")
    parser.add_argument("--check", default=None, metavar="PAIRS", help="report all problems of existing pairs")
    parser.add_argument(
        "--strict",
        action="store_true",
        default=False,
        help="with --check: empty prompts and condition images of another size are problems, not notes",
    )
    parser.add_argument("--sheet", default=None, metavar="FILE", help="with --check: PNG of some pairs, bad ones first")
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="with --check: count prompts that this base truncates (default: the 77 tokens of Stable Diffusion)",
    )
    add_columns(parser)
    parser.add_argument("--images-folder", default=None, metavar="DIR", help="folder of the images of COCO annotations")
    parser.add_argument("--size", type=int, help="scale and crop to a square of this side (default: keep)")
    parser.add_argument("--tiles", action="store_true", help="with --size: cut large images into squares of that side")
    parser.add_argument("--buckets", action="store_true", help="scale and crop to the nearest aspect-ratio bucket")
    parser.add_argument(
        "--copy", action="store_true", help="also copy unchanged images to --out (default: refer to them)"
    )
    parser.add_argument(
        "--seed", type=int, help="seed of random parameters, together with the content of each image (default: 0)"
    )
    parser.add_argument("--fixed", action="store_true", help="use default parameters for every image")
    parser.add_argument(
        "--caption",
        choices=("found", "blip"),
        default=argparse.SUPPRESS,
        help="found: .txt and .caption files, COCO, tar shards; blip: also caption images without one (default: as"
        " OUT was made before, else found)",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        help="prompt of images without a caption; {name} is the name of the file, {folder} that of its folder (default:"
        " as OUT was made before, else empty)",
    )
    parser.add_argument(
        "--caption-model", default=None, metavar="FOLDER", help="for --caption blip: a folder or a hub id"
    )
    parser.add_argument("--device", default="cpu", help="device of the caption model: cpu, cuda, mps (default: cpu)")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    parser.add_argument("--shards", type=int, default=None, metavar="N", help="write N tar shards instead of files")
    parser.add_argument(
        "--engine", default="local", help="local, or ray (Ray Data, for many machines; needs --shards) (default: local)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    if args.check is not None:
        if args.images or args.out:
            raise UserError("--check reads existing pairs and excludes IMAGES and --out", "contradiction")
        for option in _of_making(args):
            raise UserError(f"--{option} is for making pairs; --check reads existing ones", "contradiction")
        _check(args)
        return
    if not args.images or not args.conditions or not args.out:
        raise UserError("give IMAGES, --conditions NAME,NAME and --out DIR; or --check PAIRS", "missing-setting")
    if args.sheet:
        raise UserError(
            f"--sheet {args.sheet} needs --check; once the pairs exist: controlkit pairs --check {args.out} --sheet"
            f" {args.sheet}",
            "contradiction",
        )
    others = [name for name, given in (("base", hasattr(args, "base")), ("strict", args.strict)) if given]
    of_pairs = [option for option in named_columns(args) if option.startswith("conditioning")]
    for option in (*of_pairs, *others):
        raise UserError(f"--{option.replace('_', '-')} needs --check", "contradiction")
    prompts = _prompts_of(args)
    if prompts["caption"] != "blip":
        for option in ("caption-model", "device"):
            if option in _of_making(args):
                raise UserError(f"--{option} needs --caption blip", "contradiction")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: expected at least 1", "out-of-range")
    _make(args, prompts)


def _of_making(args: argparse.Namespace) -> list[str]:
    """The options on the command line that are for making pairs only, without `--`."""
    defaults: dict[str, object] = {
        **dict.fromkeys(("size", "tiles", "buckets", "copy", "seed", "fixed", "prompt")),
        **dict.fromkeys(("images_folder", "caption", "caption_model", "workers", "shards")),
        **{"device": "cpu", "engine": "local"},
    }
    given = [name for name, default in defaults.items() if getattr(args, name, default) != default]
    return [name.replace("_", "-") for name in given]


def _prompts_of(args: argparse.Namespace) -> dict[str, str | None]:
    """Where prompts come from: what was given, else what the folder was made with before."""
    from controlkit.data.engine import recorded_prompts

    values: dict[str, str | None] = {"caption": "found", "caption_model": None, "prompt": None}
    values |= recorded_prompts(args.out)
    if getattr(args, "caption", None) == "found":
        values["caption_model"] = None
    given = {name: getattr(args, name, None) for name in values}
    return values | {name: value for name, value in given.items() if value is not None}


def _make(args: argparse.Namespace, prompts: Mapping[str, str | None]) -> None:
    from controlkit.data.engine import make_pairs
    from controlkit.data.input_images import list_images, with_prompts, with_tiles
    from controlkit.data.making import MakeSettings
    from controlkit.data.readers.folders import two_captions_note
    from controlkit.data.readers.image_tables import is_hub_dataset

    names = ("size", "tiles", "buckets", "copy", "seed", "fixed")
    values = {name: getattr(args, name) for name in names if hasattr(args, name)}
    settings = MakeSettings(conditions=tuple(name for name in args.conditions.split(",") if name.strip()), **values)
    notes: list[str] = []
    images = list_images(args.images, args.images_folder, without=args.out, notes=notes, columns=columns_of(args))
    doubled = [image.source for image in images if isinstance(image.source, Path) and _differ(image)]
    notes += [two_captions_note(doubled)] if doubled else []
    print_notes(notes)
    if prompts["caption"] == "blip":
        from controlkit.data.captions import BLIP, Captioner, with_captions

        model = prompts["caption_model"] or BLIP
        images = with_captions(
            images, Path(args.out), lambda: Captioner(model, args.device), model, Progress("captions", always=True)
        )
    if settings.tiles:
        images = with_tiles(images, settings.size or 0)
    if prompts["prompt"] is not None:
        images = with_prompts(images, prompts["prompt"])
    report = make_pairs(
        images,
        args.out,
        settings,
        workers=args.workers,
        shards=args.shards,
        engine=args.engine,
        origin=[image if is_hub_dataset(image) else os.path.abspath(image) for image in args.images],
        prompts=prompts,
        progress=Progress("images", always=True),
    )
    _show(report, args.json)


def _differ(image: InputImage) -> bool:
    """Whether the .txt and .caption files of an image differ."""
    from controlkit.data.sources import captions_differ

    try:
        return bool(image.sidecars) and captions_differ(image.sidecars[0])
    except UserError:  # not text; reported with its pair
        return False


def _show(report: MakeReport, as_json: bool) -> None:
    for name, reason in list(report.skipped.items())[:_SHOWN]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if len(report.skipped) > _SHOWN:
        print(f"... and {len(report.skipped) - _SHOWN} more: {report.skipped_list}", file=sys.stderr)
    for note in report.notes[:_SHOWN]:
        print(f"note: {note}", file=sys.stderr)
    if len(report.notes) > _SHOWN:
        print(f"... and {len(report.notes) - _SHOWN} more notes", file=sys.stderr)
    if as_json:
        print_json(vars(report))
        return
    print(f"made {report.made} pairs in {report.seconds:.1f} s, kept {report.kept}, skipped {len(report.skipped)}")
    if report.gone:
        print(f"{report.gone} pairs are no longer listed: their images left the input")
    if report.empty_prompts:
        print(
            f"{report.empty_prompts} pairs have an empty prompt; add captions in .txt files,"
            " --prompt TEXT for all of them, or --caption blip"
        )
    print(f"pairs: {report.out}")
    folder = report.out if report.out.is_dir() else report.out.parent
    print(f"try next: controlkit pairs --check {folder}")


def _check_sheet_name(sheet: Path, pairs: Path) -> None:
    """Check that a sheet is written over no file of the pairs.

    Raises:
        UserError: it is, or its name does not end in .png.
    """
    if sheet.suffix.lower() != ".png":
        raise UserError(f"--sheet {sheet}: expected a name ending in .png", "usage")
    target, folder = sheet.resolve(), pairs.resolve()
    below = target.relative_to(folder).parts if target.is_relative_to(folder) else ()
    if len(below) > 1 and not below[0].startswith(".") and sheet.exists():
        raise UserError(f"--sheet {sheet} is an image of the pairs; choose another name", "would-overwrite")


def _check(args: argparse.Namespace) -> None:
    from controlkit.data.check import KINDS, check_pairs, check_sheet, to_json
    from controlkit.data.pairs import pairs_folder
    from controlkit.images import write_png

    names = [name for name in args.conditions.split(",") if name.strip()]
    limit = _prompt_limit(getattr(args, "base", None))
    if args.sheet:
        _check_sheet_name(Path(args.sheet), pairs_folder(args.check))
    report = check_pairs(args.check, names, columns=columns_of(args), limit=limit, strict=args.strict)
    sheet = Path(args.sheet) if args.sheet else pairs_folder(args.check) / ".controlkit" / "check.png"
    unwritable: UserError | None = None
    try:
        write_png(sheet, check_sheet(report))
    except UserError as failure:  # findings are printed first; pairs may be on a read-only disk
        unwritable = failure
    error = unwritable if args.sheet else None
    if error is None and report.problems:
        error = UserError(f"{len(report.problems)} problems in {report.origin}", "bad-data")
    if args.json:
        values = {**to_json(report), "sheet": None if unwritable else str(sheet)}
        print_json(values if error is None else {**values, "error": error_json(error)})
    else:
        for problem in report.problems:
            print(problem)
        for note in report.notes:  # findings of the check, which --quiet keeps
            print(f"note: {note}")
        if report.problems:
            rows = [(KINDS[kind], str(count)) for kind, count in report.counts.items()]
            print_table(f"{report.origin}: {report.pairs} pairs", ("problem", "count"), rows)
        else:
            print(f"{report.origin}: {report.pairs} pairs of {', '.join(report.conditions)}, nothing wrong")
        if unwritable is None:
            print(f"sheet: {sheet}")
    if unwritable is not None and not args.sheet:
        print(f"no sheet: {unwritable}; name a place with --sheet", file=sys.stderr)
    if error is not None:
        raise Reported(str(error), error.code)


def _prompt_limit(base: str | None) -> PromptLimit:
    """How much of a prompt `base` reads; by default the 77 tokens of Stable Diffusion."""
    from controlkit.bases.clip_tokenizer import clip_tokenizer
    from controlkit.bases.meta import prompt_reader
    from controlkit.bases.text import CLIP_TOKENS, cut_from
    from controlkit.data.prompts import PromptLimit

    if base is not None:
        reading = prompt_reader(base)
        return PromptLimit(reader=base, tokens=reading.prompt_tokens, cut_from=reading.cut_from)
    tokenizer = clip_tokenizer()
    return PromptLimit(
        reader="Stable Diffusion", tokens=CLIP_TOKENS, cut_from=lambda prompt: cut_from(tokenizer, prompt)
    )
