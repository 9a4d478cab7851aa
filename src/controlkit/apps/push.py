"""upload a control and its card to the Hugging Face hub

    controlkit push runs/mine/mine.safetensors NAME/REPOSITORY --private
    controlkit push runs/mine/mine.safetensors NAME/REPOSITORY --dry-run

Log in first (`hf auth login`), or set HF_TOKEN.
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json, print_notes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("file", help=".safetensors file of a control, with its card (NAME.md) beside it")
    parser.add_argument("repository", help="NAME/REPOSITORY on the hub; created if missing")
    parser.add_argument("--private", action="store_true", default=False, help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", default=False, help="list what would be uploaded, and end")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.formats.hub import checked_repository, left_out, push, uploads_of

    checked_repository(args.repository)
    notes = left_out(args.file)
    print_notes(notes)
    if args.dry_run:
        uploads = uploads_of(args.file)
        if args.json:
            files = {name: str(path) for name, path in uploads.items()}
            print_json({"repository": args.repository, "files": files, "notes": notes})
            return
        for name, path in uploads.items():
            size = f"{path.stat().st_size:,} bytes" if path.is_file() else "to be written"
            print(f"{path} -> {args.repository}/{name} ({size})")
        return
    address = push(args.file, args.repository, private=args.private)
    if args.json:
        print_json({"address": address, "notes": notes})
        return
    print(address)
