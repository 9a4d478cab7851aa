"""show, verify or clear the cache of latents, hints and text embeddings

controlkit cache
controlkit cache --verify
controlkit cache --clear latents

The environment variable CONTROLKIT_CACHE sets its folder, CONTROLKIT_CACHE_MB its limit in megabytes (docs/cache.md).
"""

from __future__ import annotations

import argparse

from controlkit.apps.show import add_json, print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "--clear",
        nargs="?",
        const=True,
        default=False,
        metavar="KIND",
        help="remove everything, or one kind (latents, hints, texts), except what a running process uses",
    )
    parser.add_argument("--verify", action="store_true", default=False, help="check every row; remove damaged ones")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.data.cache_report import ago, manage_cache

    report = manage_cache(clear=args.clear, verify=args.verify)
    if args.json:
        print_json(report.to_json())
        return
    if report.stores:
        rows = [
            (
                store.kind,
                f"{store.made_by} {store.model[:8]}".strip(),
                store.transform,
                store.shape,
                f"{store.rows:,}",
                f"{store.bytes / 1e6:,.1f}",
                ago(store.last_used),
            )
            for store in report.stores
        ]
        print_table("Cache", ("kind", "model", "of", "row", "rows", "MB", "last used"), rows)
    print(f"{report.folder}: {report.bytes / 1e6:,.1f} of {report.limit / 1e6:,.0f} MB")
    if args.clear:
        print(f"removed: {report.removed} segments")
        if report.in_use:
            print(f"left, in use by a running process: {report.in_use} segments")
    if report.verified is not None:
        print(f"verified: {report.verified:,} rows; damaged: {len(report.damaged) or 'none'}")
        for problem in report.damaged:
            print(f"removed (computed again when needed): {problem}")
