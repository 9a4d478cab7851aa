"""`controlkit VERB ...`: finds the verb, turns errors into sentences and exit codes.

Nothing heavy is imported before the verb runs, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from controlkit._version import __version__
from controlkit.apps import (
    adapt,
    cache,
    condition,
    convert,
    demo,
    evaluate,
    generate,
    inspect,
    pairs,
    push,
    study,
    train,
    transfer,
)
from controlkit.apps.show import print_json
from controlkit.errors import UserError, is_out_of_memory

VERBS = (demo, condition, generate, pairs, train, adapt, evaluate, study, convert, transfer, push, inspect, cache)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)", "usage")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="controlkit", description="Spatial controls for text-to-image diffusion models.")
    parser.add_argument("--version", action="version", version=f"controlkit {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        name = verb.__name__.rpartition(".")[2]
        summary, _, rest = (verb.__doc__ or "").partition("\n")
        sub = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary}\n{rest}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        verb.add_arguments(sub)
        sub.set_defaults(run=verb.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 2 for what a person has to change, 130 for Ctrl-C."""
    args = None
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
        return 0
    except UserError as error:
        print(f"controlkit: {error}{f' [{error.code}]' if error.code else ''}", file=sys.stderr)
        if getattr(args, "json", False):
            print_json({"error": {"code": error.code, "message": str(error)}})
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"controlkit: {error.strerror or error}{where}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            "controlkit: out of memory; draw fewer images at once (generate: --batch-size) or smaller ones, or take"
            " another --device",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("controlkit: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
