"""transfer a control from its base to another base of the same architecture

    controlkit transfer canny --from nano --to my-nano --out canny-my-nano.safetensors

A control also runs unchanged on other bases of its family; try both.
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "control", help="a control with a copy of its base's weights, such as a ControlNet: a name or a file"
    )
    parser.add_argument("--from", dest="source", required=True, metavar="BASE", help="the base it was trained on")
    parser.add_argument("--to", dest="target", required=True, metavar="BASE", help="the base to transfer it to")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--force", action="store_true", default=False, help="replace an existing file")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from pathlib import Path

    from controlkit.bases.load import base_path, load_base
    from controlkit.controls.registry import companion_role
    from controlkit.errors import UserError
    from controlkit.files import check_overwrite, files_of
    from controlkit.formats.companions import read_checkpoint
    from controlkit.formats.load import find_control, load_control, reference_to, save_control, split_pair
    from controlkit.formats.metadata import provenance_of
    from controlkit.formats.transfer import LIMITS, dtype_of, kept_metadata, transfer

    if Path(args.out).suffix != ".safetensors":
        raise UserError(f"--out {args.out}: expected a .safetensors file", "usage")
    name, base_control = split_pair(args.control)
    path = find_control(name)
    read = [path, *([base_control] if base_control else []), base_path(args.source), base_path(args.target)]
    inputs = [file for each in read for file in files_of(each)]
    check_overwrite([Path(args.out)], inputs, force=args.force, output="another --out")
    source, target = load_base(args.source), load_base(args.target)
    for base in (source, target):
        base.check_text_to_image("transfer")
    control = load_control(args.control, source)
    if control.copied_network() is None:
        companion = control.companion is not None
        instead = f"transfer its {companion_role(type(control))}" if companion else "use it on the other base unchanged"
        raise UserError(
            f"{args.control} ({control.kind}) contains no copy of a base to transfer; {instead}", "wrong-kind"
        )
    checkpoint = read_checkpoint(path, reference_to(source))
    metadata = checkpoint.metadata
    fingerprint = metadata.get("control.base_fingerprint", source.fingerprint)
    if fingerprint != source.fingerprint:
        raise UserError(
            f"{args.control} was trained on the base {metadata.get('control.base', '')} ({fingerprint}), not on"
            f" {args.source} ({source.fingerprint}); pass its base as --from",
            "incompatible",
        )
    transferred, offset = transfer(control, source, target)
    origin = {**provenance_of(metadata), "transferred": args.control, "from": source.name, "to": target.name}
    kept, dtype = kept_metadata(metadata), dtype_of(checkpoint)
    written = save_control(args.out, transferred, target, made=origin, dtype=dtype, further=kept)
    if args.json:
        print_json({"control": str(written), **vars(offset), "limits": LIMITS})
        return
    print(
        f"{written}: {offset.moved} tensors shifted, {offset.kept} unchanged; the bases differ by {offset.distance:.1%}"
    )
    print(LIMITS)
