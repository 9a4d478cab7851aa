"""move a control from its base to another base of the same shape

    controlkit transfer canny --from nano --to my-nano --out canny-my-nano.safetensors

A control also runs on another base of its family unchanged; try both.
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("control", help="a ControlNet or a base control: a name or a file")
    parser.add_argument("--from", dest="source", required=True, metavar="BASE", help="the base it was trained on")
    parser.add_argument("--to", dest="target", required=True, metavar="BASE", help="the base it should steer")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the new control is written")
    parser.add_argument("--force", action="store_true", default=False, help="replace a file that is there")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from pathlib import Path

    from controlkit.bases.load import base_path, load_base
    from controlkit.controls.registry import companion_role
    from controlkit.errors import UserError
    from controlkit.files import files_of, refuse_replacing
    from controlkit.formats.load import find_control, load_control, save_control
    from controlkit.formats.metadata import provenance_of, read_metadata
    from controlkit.formats.transfer import LIMITS, transfer

    if Path(args.out).suffix != ".safetensors":
        raise UserError(f"--out {args.out}: the new control is a .safetensors file")
    read = [find_control(args.control), base_path(args.source), base_path(args.target)]
    refuse_replacing([Path(args.out)], [one for path in read for one in files_of(path)], force=args.force)
    source, target = load_base(args.source), load_base(args.target)
    control = load_control(args.control, source)
    if control.copied_network() is None:
        companion = control.companion is not None
        instead = f"transfer its {companion_role(type(control))}" if companion else "use it on the other as it is"
        raise UserError(f"{args.control} ({control.kind}) has no copy of a base, which is what is moved; {instead}")
    said = read_metadata(find_control(args.control)) if find_control(args.control).is_file() else {}
    mark = said.get("control.base_fingerprint", source.fingerprint)
    if mark != source.fingerprint:
        raise UserError(
            f"{args.control} was trained on the base {said.get('control.base', '')} ({mark}), not on {args.source}"
            f" ({source.fingerprint}); give that as --from"
        )
    made, offset = transfer(control, source, target)
    how = {**provenance_of(said), "transferred": args.control, "from": source.name, "to": target.name}
    path = save_control(args.out, made, target, made=how)
    if args.json:
        print_json({"control": str(path), **vars(offset), "limits": LIMITS})
        return
    print(f"{path}: {offset.moved} tensors shifted, {offset.kept} kept; the bases are {offset.distance:.1%} apart")
    print(LIMITS)
