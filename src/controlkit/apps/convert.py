"""convert a control's file or folder from one layout to another

    controlkit convert control_v11p_sd15_canny.pth canny.safetensors --to controlkit --condition canny
    controlkit convert canny.safetensors canny-diffusers --to diffusers
    controlkit convert lora.ckpt merged.safetensors --to merged --base-control ctrlora_sd15_basecn700k.ckpt

What IN is, its content says. The layouts are in docs/files.md; OUT is a folder for diffusers and peft, else a
.safetensors file. Tensors keep their dtype and files their metadata.
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json

_OPTIONS = ("base", "base_control", "dtype", "rank", "condition", "pooled", "force")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("source", metavar="IN", help="a file, a folder, or the name of a control that ships")
    parser.add_argument("out", metavar="OUT", help="the file or folder to write")
    layouts = "controlkit, diffusers, original, bare, full, difference, control-lora, peft or merged"
    parser.add_argument("--to", required=True, metavar="LAYOUT", help=layouts)
    parser.add_argument(
        "--base",
        help="the base it was made for: nano, a folder, a file, a hub id, or the settings of sd15, sd21, sdxl",
    )
    parser.add_argument("--base-control", metavar="FILE", help="an adapter's base control (default: the one beside it)")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16 (default: as the file has it)")
    parser.add_argument("--rank", type=int, help="of a Control-LoRA that is written")
    parser.add_argument("--condition", help="name of the condition that it follows, for the metadata")
    parser.add_argument(
        "--pooled",
        action="store_true",
        default=False,
        help="the ControlNet pools its residuals, as version 1.1's shuffle (implied by --condition shuffle, where the"
        " file does not say)",
    )
    parser.add_argument(
        "--force", action="store_true", default=False, help="replace a file that is there, or write into a full folder"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.formats.convert import convert

    options = {name: getattr(args, name) for name in _OPTIONS if hasattr(args, name)}
    made = convert(args.source, args.out, args.to, **options)
    facts = made.to_json()
    if args.json:
        print_json(facts)
        return
    print(
        f"{facts['kind']}: {facts['tensors']:,} tensors, {facts['parameters']:,} parameters,"
        f" {made.from_format} -> {made.to_format}"
    )
    for note in made.notes:
        print(f"note: {note}")
    print(made.path)
