"""put a trained control with its card on the Hugging Face hub

    controlkit push runs/mine/mine.safetensors NAME/REPOSITORY --private

Log in before (`hf auth login`), or set HF_TOKEN.
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("file", help="a control's .safetensors file; its card (NAME.md) lies beside it")
    parser.add_argument("repository", help="NAME/REPOSITORY on the hub; made if it is not there")
    parser.add_argument("--private", action="store_true", default=False, help="make a new repository private")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.formats.hub import push

    address = push(args.file, args.repository, private=args.private)
    if args.json:
        print_json({"address": address})
        return
    print(address)
