"""draw images from a prompt, steered by controls

    controlkit generate "red apple, noto style, on a blue background" \\
        --control canny=drawing.png@0.9:0-0.8 --seeds 4 --out images
    controlkit generate --from images/settings.json --steps 50

A control's image may have any size: it is scaled to cover the result and cut to it around its centre. --from draws
again what a settings.json (or its folder, or one of its PNGs) says; the other options override it, and --control
replaces all of its controls. Paths are tried as they are and from the folder of the settings. In place of a control's
image that is gone or has changed its saved condition image is taken; a note says so, and names a control or a base that
has changed. On the same machine's CPU a settings.json gives the same images, bit for bit.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from controlkit.apps.show import add_json, print_json, print_notes, print_seconds

if TYPE_CHECKING:
    from controlkit.sampling.request import GenerateRequest
    from controlkit.sampling.saved_settings import SavedSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb. Defaults are those of `GenerateRequest`."""
    parser.add_argument("prompt", nargs="?", help="what to draw")
    parser.add_argument(
        "--from",
        dest="drawn",
        metavar="FILE",
        help="draw again what a settings.json, the folder that it lies in, or a PNG of ours says",
    )
    parser.add_argument("--base", help="nano, a diffusers folder, a single file, or a hub id (default: nano)")
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="NAME_OR_FILE=IMAGE[@weight[:start-end]]",
        help="steer by this image, which is scaled to cover the result and cut around its centre, or by the inputs"
        " that a .json file names, for controls that take others than one image; may be given several times",
    )
    parser.add_argument(
        "--prepared", action="store_true", default=False, help="the images are condition images already"
    )
    parser.add_argument(
        "--mode",
        default=None,
        help="of the controls: balanced acts on both halves of guidance, control on the one with the prompt alone,"
        " which makes it stronger (default: control for nano, else balanced)",
    )
    parser.add_argument("--negative-prompt", help="what to draw less of")
    parser.add_argument("--seeds", type=int, metavar="N", help="how many images (default: 1)")
    parser.add_argument("--seed", type=int, help="seed of the first (default: 0)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: 20)")
    parser.add_argument(
        "--guidance",
        type=float,
        help="scale of classifier-free guidance; 1 is off (default: nano 3, SD1 and SD2 7.5, SDXL 5, SD3 7)",
    )
    parser.add_argument("--width", type=int, help="in pixels (default: the base's own)")
    parser.add_argument("--height", type=int, help="in pixels (default: the base's own)")
    parser.add_argument("--sampler", help="ddim, dpm++, dpm++-karras, unipc or euler (default: ddim; euler for SD3)")
    parser.add_argument("--batch-size", type=int, help="images drawn at once (default: 16 small ones, 4 of 512 x 512)")
    parser.add_argument("--device", help="cpu, cuda, mps or auto (default: auto, the best that is there)")
    parser.add_argument("--text-device", help="where text encoders stay, such as cpu (default: with the rest)")
    parser.add_argument("--precision", help="fp32, fp16, bf16 or auto (default: auto, fp16 on CUDA, else fp32)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the images; what has the same names there is replaced "
        "(default: a new one each time, images/001, images/002, ...)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.files import output_folder

    request, drawn = _request(args)
    with output_folder(getattr(args, "out", None), numbered_in="images") as out:
        from controlkit.sampling.generate import generate, refuse_overwriting
        from controlkit.sampling.inputs import with_named_inputs

        request = with_named_inputs(request)
        refuse_overwriting(request, out)
        made = generate(request)
        if drawn is not None:
            made.notes += drawn.differences(made)
        paths = made.save(out)
    print_notes(made.notes)
    if args.json:
        report = {"seconds": made.seconds, "request": request.to_json(), "used": made.used, "notes": made.notes}
        print_json({"images": paths, **report})
        return
    for path in paths:
        print(path)
    print_seconds(made.seconds)


_GIVEN = (
    *("prompt", "base", "negative_prompt", "steps", "guidance", "width", "height"),
    *("sampler", "batch_size", "device", "text_device", "precision"),
)


def _request(args: argparse.Namespace) -> tuple[GenerateRequest, SavedSettings | None]:
    """The request, and what it was restored from."""
    from controlkit.errors import UserError
    from controlkit.sampling.request import ControlUse, GenerateRequest
    from controlkit.sampling.saved_settings import read_settings

    if hasattr(args, "seeds") and args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: at least one image has to be drawn")
    if args.prepared and not args.control:
        raise UserError("--prepared is about the images of --control, and none is given")
    given = {name: getattr(args, name) for name in _GIVEN if hasattr(args, name)}
    uses = tuple(ControlUse.parse(text, prepared=args.prepared, mode=args.mode) for text in args.control)
    drawn = read_settings(args.drawn) if hasattr(args, "drawn") else None
    if drawn is None and given.get("prompt") is None:
        raise UserError("give a prompt, or --from FILE to draw again what it says")
    if drawn is not None and args.mode:
        drawn = drawn.in_mode(args.mode)
    if args.mode and not uses and not (drawn is not None and drawn.asked.controls):
        raise UserError("--mode is about controls, and there is none")
    before = (0,) if drawn is None else drawn.asked.seeds
    if hasattr(args, "seed") or hasattr(args, "seeds"):
        first = getattr(args, "seed", before[0])
        given["seeds"] = tuple(range(first, first + getattr(args, "seeds", len(before))))
    if drawn is None:
        return GenerateRequest(controls=uses, **given), None
    if uses:
        given["controls"] = [vars(use) for use in uses]
    return drawn.again(**given), drawn
