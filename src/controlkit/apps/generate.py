"""draw pictures from a prompt, steered by controls

    controlkit generate "red apple, noto style, on a blue background" \\
        --control canny=drawing.png@0.9:0-0.8 --seeds 4 --out pictures
"""

from __future__ import annotations

import argparse
import sys

from controlkit.apps.show import add_json, print_json, print_seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb. Defaults are those of `GenerateRequest`."""
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("--base", help="nano, a diffusers folder, a single file, or a hub id (default: nano)")
    parser.add_argument(
        "--control",
        action="append",
        default=[],
        metavar="NAME_OR_FILE=IMAGE[@weight[:start-end]]",
        help="steer by this picture; may be given several times",
    )
    parser.add_argument(
        "--prepared", action="store_true", default=False, help="the images are condition images already"
    )
    parser.add_argument("--negative-prompt", help="what to draw less of")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how many pictures (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first (default: 0)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: 20)")
    parser.add_argument(
        "--guidance",
        type=float,
        help="scale of classifier-free guidance; 1 is off (default: 3 for nano, 7.5 for Stable Diffusion)",
    )
    parser.add_argument("--width", type=int, help="in pixels (default: the base's own)")
    parser.add_argument("--height", type=int, help="in pixels (default: the base's own)")
    parser.add_argument("--sampler", help="ddim, the only one so far")
    parser.add_argument("--batch-size", type=int, help="pictures drawn at once (default: 8)")
    parser.add_argument("--device", help="cpu, cuda, mps or auto (default: auto, the best that is there)")
    parser.add_argument("--precision", help="fp32, fp16, bf16 or auto (default: auto, fp16 on CUDA, else fp32)")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the pictures; what has the same names there is replaced "
        "(default: a new one each time, pictures/001, pictures/002, ...)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.errors import UserError
    from controlkit.files import output_folder
    from controlkit.sampling.request import ControlUse, GenerateRequest

    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: at least one picture has to be drawn")
    given = {
        name: getattr(args, name)
        for name in (
            "base",
            "negative_prompt",
            "steps",
            "guidance",
            "width",
            "height",
            "sampler",
            "batch_size",
            "device",
            "precision",
        )
        if hasattr(args, name)
    }
    request = GenerateRequest(
        prompt=args.prompt,
        controls=tuple(ControlUse.parse(text, prepared=args.prepared) for text in args.control),
        seeds=tuple(range(args.seed, args.seed + args.seeds)),
        **given,
    )
    with output_folder(getattr(args, "out", None), numbered_in="pictures") as out:
        from controlkit.sampling.generate import generate, refuse_overwriting

        refuse_overwriting(request, out)
        made = generate(request)
        paths = made.save(out)
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print_json({"pictures": paths, "seconds": made.seconds, "request": request.to_json()})
        return
    for path in paths:
        print(path)
    print_seconds(made.seconds)
