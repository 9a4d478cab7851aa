"""make training pairs from images, or check pairs; run again to resume

    controlkit pairs photos --conditions canny,palette --size 512 --out pairs
    controlkit pairs --check pairs

IMAGES are folders, globs in quotes, tar shards, or COCO annotation files. The pairs go to `pairs/pairs.jsonl`, which
`controlkit adapt` reads. The layouts that are read and checked: docs/pairs.md.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from controlkit.apps.show import add_columns, add_json, columns_of, named_columns, print_json, print_table
from controlkit.errors import UserError

if TYPE_CHECKING:
    from controlkit.data.engine import MakeReport
    from controlkit.data.input_images import InputImage
    from controlkit.data.prompts import PromptLimit

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb. Defaults of the settings are those of `MakeSettings`."""
    parser.add_argument("images", nargs="*", default=[], metavar="IMAGES", help="where the images come from")
    parser.add_argument(
        "--conditions", default="", metavar="NAME,NAME", help="what is made (controlkit condition --list)"
    )
    parser.add_argument("--out", default=None, metavar="DIR", help="folder for the pairs")
    parser.add_argument("--check", default=None, metavar="PAIRS", help="look for everything that is wrong with pairs")
    parser.add_argument("--sheet", default=None, metavar="FILE", help="with --check: PNG of some pairs, bad ones first")
    parser.add_argument(
        "--base",
        metavar="BASE",
        help="with --check: count prompts that this base cuts (default: by the 77 tokens of Stable Diffusion)",
    )
    add_columns(parser)
    parser.add_argument("--images-folder", default=None, metavar="DIR", help="where COCO's images lie")
    parser.add_argument("--size", type=int, help="scale and crop to a square of so many pixels (default: keep)")
    parser.add_argument("--buckets", action="store_true", help="scale and crop to the nearest aspect-ratio bucket")
    parser.add_argument("--copy", action="store_true", help="copy images that stay as they are")
    parser.add_argument("--seed", type=int, help="random parameters follow from it and each image's content")
    parser.add_argument("--fixed", action="store_true", help="default parameters for every image")
    parser.add_argument(
        "--caption",
        choices=("found", "blip"),
        default="found",
        help="found: .txt and .caption files, COCO, tar shards; blip: a model's for images without one",
    )
    parser.add_argument("--caption-model", default=None, metavar="FOLDER", help="BLIP: a folder or a name on the hub")
    parser.add_argument("--device", default="cpu", help="of the caption model: cpu, cuda, mps")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one for each core)")
    parser.add_argument("--shards", type=int, default=None, metavar="N", help="write N tar shards in place of files")
    parser.add_argument("--engine", default="local", help="local, or ray (Ray Data, for many machines; tar shards)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    if args.check is not None:
        if args.images or args.out:
            raise UserError("--check looks at pairs that exist; give it alone")
        _check(args)
        return
    if not args.images or not args.conditions or not args.out:
        raise UserError("give images, --conditions NAME,NAME and --out DIR; or --check PAIRS")
    if args.sheet:
        raise UserError(
            f"--sheet {args.sheet} is of --check; when the pairs are made: controlkit pairs --check {args.out} --sheet"
            f" {args.sheet}"
        )
    for option in (*named_columns(args), *(["base"] if hasattr(args, "base") else [])):
        raise UserError(f"--{option.replace('_', '-')} is of --check; images are read without it")
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least one is needed")
    _make(args)


def _make(args: argparse.Namespace) -> None:
    from controlkit.data.engine import make_pairs
    from controlkit.data.input_images import list_images
    from controlkit.data.making import MakeSettings
    from controlkit.data.readers.folders import two_captions_note

    values = {name: getattr(args, name) for name in ("size", "buckets", "copy", "seed", "fixed") if hasattr(args, name)}
    settings = MakeSettings(conditions=tuple(name for name in args.conditions.split(",") if name.strip()), **values)
    images = list_images(args.images, args.images_folder, without=args.out)
    doubled = [image.source for image in images if isinstance(image.source, Path) and _differ(image)]
    if doubled:
        print(f"note: {two_captions_note(doubled)}", file=sys.stderr)
    if args.caption == "blip":
        from controlkit.data.captions import BLIP, Captioner, with_captions

        model = args.caption_model or BLIP
        images = with_captions(
            images, Path(args.out), lambda: Captioner(model, args.device), model, progress("captions")
        )
    report = make_pairs(
        images,
        args.out,
        settings,
        workers=args.workers,
        shards=args.shards,
        engine=args.engine,
        origin=[os.path.abspath(image) for image in args.images],
        progress=progress("images"),
    )
    _tell(report, args.json)


def _differ(image: InputImage) -> bool:
    """Whether an image's .txt and .caption files hold different captions."""
    from controlkit.data.sources import captions_differ

    try:
        return bool(image.sidecars) and captions_differ(image.sidecars[0])
    except UserError:  # no text, which making its pair says
        return False


def _tell(report: MakeReport, as_json: bool) -> None:
    for name, reason in list(report.skipped.items())[:_SHOWN]:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if len(report.skipped) > _SHOWN:
        print(f"... and {len(report.skipped) - _SHOWN} more", file=sys.stderr)
    for note in report.notes[:_SHOWN]:
        print(f"note: {note}", file=sys.stderr)
    if len(report.notes) > _SHOWN:
        print(f"... and {len(report.notes) - _SHOWN} more such notes", file=sys.stderr)
    if as_json:
        print_json(vars(report))
        return
    print(f"made {report.made} pairs in {report.seconds:.1f} s, kept {report.kept}, skipped {len(report.skipped)}")
    if report.gone:
        print(f"{report.gone} pairs are not listed any more, because their images are no longer in the input")
    if report.empty_prompts:
        print(f"{report.empty_prompts} pairs have an empty prompt; put captions into .txt files, or use --caption blip")
    print(f"pairs: {report.out}")
    folder = report.out if report.out.is_dir() else report.out.parent
    print(f"try next: controlkit pairs --check {folder}")


def _check(args: argparse.Namespace) -> None:
    from controlkit.data.check import KINDS, check_pairs, check_sheet, to_json
    from controlkit.data.pairs import pairs_folder
    from controlkit.images import write_png

    names = [name for name in args.conditions.split(",") if name.strip()]
    limit = _prompt_limit(getattr(args, "base", None))
    report = check_pairs(args.check, names, columns=columns_of(args), limit=limit)
    sheet = Path(args.sheet) if args.sheet else pairs_folder(args.check) / ".controlkit" / "check.png"
    unwritable: UserError | None = None
    try:
        write_png(sheet, check_sheet(report))
    except UserError as error:  # what was found comes first, and pairs may lie where nothing can be written
        unwritable = error
    if args.json:
        print_json({**to_json(report), "sheet": None if unwritable else str(sheet)})
    else:
        for problem in report.problems:
            print(problem)
        for note in report.notes:
            print(f"note: {note}")
        if report.problems:
            rows = [(KINDS[kind], str(count)) for kind, count in report.counts.items()]
            print_table(f"{report.origin}: {report.pairs} pairs", ("problem", "how often"), rows)
        else:
            print(f"{report.origin}: {report.pairs} pairs of {', '.join(report.conditions)}, nothing wrong")
        if unwritable is None:
            print(f"sheet: {sheet}")
    if unwritable is not None:
        if args.sheet:
            raise unwritable
        print(f"no sheet: {unwritable}; name a place with --sheet", file=sys.stderr)
    if report.problems:
        raise UserError(f"{len(report.problems)} problems in {report.origin}")


def _prompt_limit(base: str | None) -> PromptLimit:
    """How much of a prompt `base` reads; every base of Stable Diffusion's size where none is named."""
    from controlkit.bases.clip_tokenizer import clip_tokenizer
    from controlkit.bases.load import load_tokenizer
    from controlkit.bases.text import cut_from
    from controlkit.data.prompts import PromptLimit

    tokenizer = clip_tokenizer() if base is None else load_tokenizer(base)
    return PromptLimit(
        reader=base or "Stable Diffusion",
        tokens=tokenizer.model_max_length,
        cut_from=lambda prompt: cut_from(tokenizer, prompt),
    )


def progress(what: str) -> Callable[[int, int], None]:
    """Tells on standard error how many are done and how long the rest takes, at most twice a second on a terminal and
    every ten seconds elsewhere."""
    live = sys.stderr.isatty()
    started = told = time.monotonic()
    first = -1

    def tell(done: int, total: int) -> None:
        nonlocal told, first
        now = time.monotonic()
        first = done if first < 0 else first
        if now - told < (0.5 if live else 10) and done < total:
            return
        told = now
        pace = (done - first) / max(now - started, 1e-9)
        left = f", {pace:.0f}/s, {_clock((total - done) / pace)} left" if pace and done < total else ""
        end = "" if live and done < total else "\n"
        print(f"{chr(13) if live else ''}{done} of {total} {what}{left}", end=end, file=sys.stderr, flush=True)

    return tell


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
