"""evaluate a base or controls on held-out images

    controlkit evaluate base nano --sheet grid.png
    controlkit evaluate control canny --base nano --sheet canny.png
    controlkit evaluate control canny --prompt-mode given none automatic
    controlkit evaluate control nano/canny nano/palette nano/blur --sheet adapters.png
    controlkit evaluate control runs/mine/mine.safetensors --pairs pairs/palette
    controlkit evaluate scenes runs/nano/gligen/boxes.safetensors --icons data/nano/icons.npz

`base` needs the extra `metrics`; `scenes` needs that and rendered icons (recipes/nano/README.md, step 1).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.apps.show import add_columns, add_json, columns_of, named_columns, print_json
from controlkit.progress import is_verbose

if TYPE_CHECKING:
    from controlkit.controls.control import Control
    from controlkit.data.pair import Pair
    from controlkit.evaluation.report import Report
    from controlkit.evaluation.sets import EvaluationSet
    from controlkit.sampling.graphs import GraphReport


_CHOICES = ("base", "sets", "pairs", "share", "icons", "images", "prompt_mode", "captioner")
"""Options that select what is evaluated on what; sampling settings are in the reports."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "what",
        choices=("base", "control", "scenes"),
        help="what to evaluate: a base; controls; or a control that takes boxes, on scenes of two icons",
    )
    parser.add_argument("names", nargs="+", metavar="name", help="a base, or controls by name or file")
    parser.add_argument("--base", help="the base of the controls (default: nano)")
    parser.add_argument(
        "--sets",
        nargs="+",
        action="extend",
        help="sets of images for controls: held-out and openmoji (the default), seen, seen-again (seen, rendered anew)",
    )
    parser.add_argument("--pairs", metavar="PATH", help="evaluate on held-out pairs instead of sets")
    parser.add_argument(
        "--share",
        type=float,
        help="with --pairs: fraction of the pairs that training holds out (default: as the control records, else 0.1;"
        " 1: all pairs)",
    )
    add_columns(parser)
    parser.add_argument("--icons", help="for scenes: file of rendered icons (default: data/nano/icons.npz)")
    parser.add_argument("--images", "--pictures", type=int, help="images per set, or scenes (default: 96; of pairs 64)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: 20)")
    parser.add_argument(
        "--guidance",
        type=float,
        help="guidance scale (default: nano 3, SD1 and SD2 7.5, SDXL 5, SD3 7, FLUX.1 dev 3.5, Z-Image 5, Sana"
        " 4.5, FLUX.2 and Qwen-Image 4)",
    )
    parser.add_argument("--sampler", help="as of generate (default: ddim, of Sana dpm++, of other transformers euler)")
    parser.add_argument("--weight", type=float, help="conditioning scale of the controls (default: 1)")
    parser.add_argument(
        "--mode", help="guidance mode of the controls, as of generate (default: control for nano, else balanced)"
    )
    parser.add_argument(
        "--prompt-mode",
        nargs="+",
        action="extend",
        metavar="MODE",
        help="a row for each: given (the captions of the images), none, default, automatic (default: given)",
    )
    parser.add_argument("--captioner", help="for --prompt-mode automatic, as of generate")
    parser.add_argument(
        "--distance",
        action="store_true",
        help="for controls: also FD-lite0, the distance of the results to the targets (needs the extra metrics)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default: auto)")
    parser.add_argument("--sheet", default=None, metavar="FILE", help="also write a contact sheet as PNG")
    parser.add_argument("--seed", type=int, help="for controls: seed of the first image of each set (default: 0)")
    parser.add_argument(
        "--out",
        default=None,
        metavar="DIR",
        help="also write report.json, report.md and, for controls, scores.csv with the score of each image",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from rich import print as show

    from controlkit.errors import UserError
    from controlkit.files import writable_folder
    from controlkit.sampling.graphs import tallied
    from controlkit.sampling.request import DEFAULT_STEPS, check_sampling
    from controlkit.sampling.uses import mode_name

    names = ("steps", "guidance", "sampler", "weight", "mode", "seed", "distance")
    settings = {name: getattr(args, name) for name in names if hasattr(args, name)}
    check_sampling(settings.get("steps", DEFAULT_STEPS), settings.get("guidance"), settings.get("sampler"))
    if "mode" in settings:
        settings["mode"] = mode_name(settings["mode"])
    _add_prompt_modes(args, settings)
    if not math.isfinite(settings.get("weight", 1.0)):
        raise UserError(f"--weight {settings['weight']}: expected a finite number, such as 1.25", "out-of-range")
    if args.sheet:
        # Before minutes of sampling.
        writable_folder(Path(args.sheet).parent, "name another place with --sheet")
        if Path(args.sheet).is_dir():
            raise UserError(f"--sheet {args.sheet} is a folder; expected the name of a PNG", "wrong-kind")
        if Path(args.sheet).suffix.lower() != ".png":
            raise UserError(f"--sheet {args.sheet}: expected a name ending in .png", "wrong-kind")
    if args.out:
        writable_folder(args.out, "name another folder with --out")
    _check_seed(args)
    evaluate = {"base": _of_base, "control": _of_controls, "scenes": _of_scenes}[args.what]
    with tallied() as calls:
        reports = evaluate(args, settings)
    networks = calls()
    if args.out:
        _write(Path(args.out), reports, networks)
    if args.json:
        asked = {name: getattr(args, name) for name in ("what", "names", *_CHOICES) if hasattr(args, name)}
        values = {"asked": asked, "reports": [report.to_json() for report in reports], "sheet": args.sheet}
        print_json({**values, "out": args.out, "graphs": networks.to_json()})
        return
    for report in reports:
        show(report.table())
    if is_verbose():
        print(networks, file=sys.stderr)
    if args.sheet:
        print(f"sheet: {args.sheet}")


def _check_seed(args: argparse.Namespace) -> None:
    from controlkit.errors import UserError

    if not hasattr(args, "seed"):
        return
    if args.what != "control":
        raise UserError("--seed is for controls; other evaluations have fixed seeds", "contradiction")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed {args.seed}: expected at least 0 and below 2^32", "out-of-range")


def _write(out: Path, reports: Sequence[Report], networks: GraphReport) -> None:
    """Write report.json, report.md and scores.csv."""
    import csv
    import io

    from controlkit.files import write_atomically, write_json

    def text(name: str, content: str) -> None:
        write_atomically(out / name, lambda temporary: temporary.write_text(content, encoding="utf-8"))

    write_json(out / "report.json", {"reports": [report.to_json() for report in reports], "graphs": networks.to_json()})
    text("report.md", "\n\n".join(report.to_markdown() for report in reports) + "\n")
    rows = [row for report in reports for row in report.images]
    if rows:
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text("scores.csv", stream.getvalue())
    else:
        (out / "scores.csv").unlink(missing_ok=True)  # of an earlier report in this folder


def _add_prompt_modes(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Check --prompt-mode and --captioner and add them to `settings`."""
    from controlkit.errors import UserError
    from controlkit.sampling.request import check_prompt_mode

    modes = getattr(args, "prompt_mode", ["given"])
    for mode in modes:
        check_prompt_mode(mode)
    if repeated := next((mode for mode in modes if modes.count(mode) > 1), None):
        raise UserError(f"--prompt-mode: {repeated} repeats; name each once", "contradiction")
    if hasattr(args, "captioner"):
        if "automatic" not in modes:
            raise UserError("--captioner needs --prompt-mode automatic", "contradiction")
        settings["captioner"] = args.captioner
    if hasattr(args, "prompt_mode"):
        settings["prompt_modes"] = tuple(modes)


def _of_base(args: argparse.Namespace, settings: dict[str, Any]) -> list[Report]:
    from controlkit.bases.load import load_base
    from controlkit.errors import UserError
    from controlkit.images import write_png
    from controlkit.nano.evaluate_base import base_grid, evaluate_base

    for name in (*_CHOICES, "weight", "mode", "distance"):
        if hasattr(args, name):
            option = name.replace("_", "-")
            raise UserError(f"--{option} is for controls; a base has its own images", "contradiction")
    if len(args.names) > 1:
        raise UserError(f"expected one base, not {len(args.names)}", "usage")
    base = load_base(args.names[0], device=args.device)
    if args.sheet:
        write_png(args.sheet, base_grid(base, **settings))
    return evaluate_base(base, **settings)


def _of_scenes(args: argparse.Namespace, settings: dict[str, Any]) -> list[Report]:
    from controlkit.bases.load import load_base
    from controlkit.errors import UserError
    from controlkit.formats.load import load_control
    from controlkit.images import write_png
    from controlkit.nano.evaluate_scenes import evaluate_scenes, evaluation_scenes

    for name in ("sets", "pairs", "share", "prompt_mode", "captioner", "distance", *named_columns(args)):
        if hasattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} has no use with scenes, which are drawn", "contradiction")
    if len(args.names) > 1:
        raise UserError(f"expected one control, not {len(args.names)}", "usage")
    count = getattr(args, "images", 96)
    if count < 1:
        raise UserError(f"--images {count}: expected at least 1", "out-of-range")
    scenes = evaluation_scenes(getattr(args, "icons", "data/nano/icons.npz"), count)
    base = load_base(getattr(args, "base", "nano"), device=args.device)
    report, sheet = evaluate_scenes(base, load_control(args.names[0], base), scenes, **settings)
    if args.sheet:
        write_png(args.sheet, sheet)
    return [report]


def _of_controls(args: argparse.Namespace, settings: dict[str, Any]) -> list[Report]:
    from controlkit.bases.load import load_base
    from controlkit.errors import UserError
    from controlkit.evaluation.adapt import MAX_HELD_OUT
    from controlkit.evaluation.eval_set import pairs_eval_set
    from controlkit.evaluation.evaluate_control import evaluate_control, evaluate_controls
    from controlkit.evaluation.sets import evaluation_set
    from controlkit.formats.load import load_control
    from controlkit.images import write_png

    if hasattr(args, "icons"):
        raise UserError("--icons is for scenes", "contradiction")
    chosen = getattr(args, "sets", ["held-out", "openmoji"])
    count = getattr(args, "images", MAX_HELD_OUT if hasattr(args, "pairs") else 96)
    if count < 1:
        raise UserError(f"--images {count}: expected at least 1", "out-of-range")
    for option, names in (("--sets", chosen), ("evaluate control", args.names)):
        if repeated := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{option}: {repeated} repeats; name each once", "contradiction")
    pairs = _held_out(args, count)
    sets = [] if pairs else [_first(evaluation_set(name), count) for name in chosen]
    base = load_base(getattr(args, "base", "nano"), device=args.device)
    shared: dict[str, Any] = {}
    controls: dict[str, Control] = {}
    for name in args.names:
        control = load_control(name, base, shared=shared)
        followed = _of_the_pairs(name, control, pairs, args.pairs) if pairs else control.conditions
        if len(control.conditions) > 1:
            controls |= {f"{name}, {each}": control.for_condition(each) for each in followed}
        else:
            controls[name] = control
    if pairs:
        if len(controls) > 1:
            raise UserError(
                f"--pairs have one condition: evaluate one control, not {len(controls)} ({'; '.join(controls)})",
                "contradiction",
            )
        (control,) = controls.values()
        control.condition = control.condition or pairs[0].condition  # a base control has none
        called = "pairs" if getattr(args, "share", None) == 1 else "held-out pairs"
        report, sheet = evaluate_control(base, control, [pairs_eval_set(pairs, base.size, called)], **settings)
    elif len(controls) == 1:
        report, sheet = evaluate_control(base, next(iter(controls.values())), sets, **settings)
    else:
        report, sheet = evaluate_controls(base, controls, sets, **settings)
    if args.sheet:
        write_png(args.sheet, sheet)
    return [report]


def _of_the_pairs(name: str, control: Control, pairs: Sequence[Pair], path: str) -> list[str]:
    """The conditions of a control that the condition images of pairs may be of: one, if theirs is known.

    Raises:
        UserError: they are of none of them.
    """
    from controlkit.errors import UserError
    from controlkit.evaluation.eval_set import different_conditions

    theirs = pairs[0].condition
    followed = [each for each in control.conditions if not different_conditions(each, theirs)]
    if not followed and control.condition is None:  # names that it knows besides
        every = control.conditions_in(control.config())
        followed = [each for each in every if not different_conditions(each, theirs)]
    if control.conditions and not followed:
        ours = ", ".join(control.conditions)
        wanted = ours if len(control.conditions) == 1 else "one of these"
        raise UserError(
            f"{name} is a control of {ours}, but the condition images of {path} are {theirs}; give pairs of {wanted}:"
            f" if the folder has several conditions, --pairs PAIRS/{control.conditions[0]}",
            "contradiction",
        )
    return followed


def _first(images: EvaluationSet[Any], count: int) -> EvaluationSet[Any]:
    """The first `count` images of a set; a note says so if it has fewer."""
    if (most := len(images.examples)) < count:
        print(f"note: the set {images.name} has {most} images, fewer than {count}: all are used", file=sys.stderr)
    return images.first(count)


def _held_out(args: argparse.Namespace, count: int) -> list[Pair]:
    """The pairs of --pairs that training holds out."""
    from controlkit.data.pairs import read_pairs, split_pairs
    from controlkit.errors import UserError
    from controlkit.formats.load import recorded_held_out

    if not hasattr(args, "pairs"):
        if hasattr(args, "share"):
            raise UserError("--share needs --pairs", "contradiction")
        for option in named_columns(args):
            raise UserError(f"--{option.replace('_', '-')} needs --pairs", "contradiction")
        return []
    if hasattr(args, "sets"):
        raise UserError("--sets and --pairs exclude each other; give one", "contradiction")
    recorded = recorded_held_out(args.names[0])
    usual = 0.1 if recorded is None else recorded
    share = getattr(args, "share", usual)
    if hasattr(args, "share") and not 0 < share <= 1:
        raise UserError(f"--share {share}: expected a fraction above 0 and up to 1", "out-of-range")
    if recorded is not None and share > recorded:
        print(
            f"note: {args.names[0]} was trained with held_out {recorded:g}; --share {share:g} includes pairs that"
            " it was trained on, if it was trained on these",
            file=sys.stderr,
        )
    pairs = read_pairs(args.pairs, columns=columns_of(args))
    chosen = pairs if share == 1 else split_pairs(pairs, share)[1]
    if hasattr(args, "images") and len(chosen) < count:
        held_out = "" if share == 1 else "held-out "
        print(
            f"note: {args.pairs} has {len(chosen)} {held_out}pairs, fewer than {count}: all are used", file=sys.stderr
        )
    return chosen[:count]
