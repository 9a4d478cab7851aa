"""convert a control between file formats

    controlkit convert control_v11p_sd15_canny.pth canny.safetensors --to controlkit --condition canny
    controlkit convert canny.safetensors canny-diffusers --to diffusers
    controlkit convert lora.ckpt merged.safetensors --to merged --base-control ctrlora_sd15_basecn700k.ckpt

The format of IN is detected. docs/files.md lists all formats; OUT is a folder for diffusers, diffusers-unet and peft,
else a .safetensors file. Tensors keep their dtype, and files their metadata.
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json, print_notes

_OPTIONS = ("base", "base_control", "dtype", "rank", "condition", "kind", "pooled", "decoder", "force")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("source", metavar="IN", help="a file, a folder, or the name of a shipped control")
    parser.add_argument("out", metavar="OUT", help="the file or folder to write")
    formats = "controlkit, diffusers, original, bare, full, difference, control-lora, peft, diffusers-unet or merged"
    parser.add_argument("--to", required=True, metavar="FORMAT", help=formats)
    parser.add_argument(
        "--base",
        help="base of the control: nano, a folder, a file, a hub id, or sd15, sd21, sdxl for their configuration",
    )
    parser.add_argument("--base-control", metavar="FILE", help="base control of an adapter (default: beside it)")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (default: that of the file)")
    parser.add_argument("--rank", type=int, help="rank of a Control-LoRA to write")
    parser.add_argument("--condition", help="name of the condition, for the metadata")
    parser.add_argument("--kind", help="system of the control to read, if the file contains several")
    parser.add_argument(
        "--pooled",
        action="store_true",
        default=False,
        help="the ControlNet pools its residuals, as the shuffle of version 1.1 (--condition shuffle implies it, unless"
        " the file records the contrary)",
    )
    parser.add_argument(
        "--decoder",
        action="store_true",
        default=False,
        help="keep the decoder of the Stable Diffusion in the file, which was trained along with the control",
    )
    parser.add_argument(
        "--force", action="store_true", default=False, help="replace an existing file, or write into a non-empty folder"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.formats.convert import convert

    options = {name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)}
    converted = convert(args.source, args.out, args.to, **options)
    facts = converted.to_json()
    if args.json:
        print_json(facts)
        return
    print(
        f"{facts['kind']}: {facts['tensors']:,} tensors, {facts['parameters']:,} parameters,"
        f" {converted.from_format} -> {converted.to_format}"
    )
    print_notes(converted.notes)
    print(converted.path)
