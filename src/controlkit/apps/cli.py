"""`controlkit VERB ...`: run a verb; print errors as sentences and turn them into exit codes.

Nothing heavy is imported before the verb runs, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from controlkit import progress
from controlkit._version import __version__
from controlkit.apps import (
    adapt,
    cache,
    condition,
    convert,
    demo,
    evaluate,
    generate,
    habits,
    inspect,
    pairs,
    push,
    serve,
    study,
    train,
    transfer,
    ui,
)
from controlkit.apps.show import Reported, error_json, print_json
from controlkit.apps.signals import Terminated, interruptible
from controlkit.errors import Code, Interrupted, UserError, is_out_of_memory, nearest

VERBS = (
    demo,
    condition,
    generate,
    pairs,
    train,
    adapt,
    evaluate,
    study,
    convert,
    transfer,
    push,
    inspect,
    cache,
    serve,
    ui,
)
_SPINS = 2000
"""Turns of an OpenMP thread's waiting loop before it sleeps, a few microseconds each hundred."""
SHELLS = ("bash", "zsh", "tcsh")
_VERB_HABITS = {
    "annotate": "condition",
    "api": "serve",
    "draw": "generate",
    "export": "convert",
    "finetune": "adapt",
    "img2img": "generate",
    "infer": "generate",
    "inpaint": "generate",
    "list": "inspect",
    "paint": "generate",
    "preprocess": "condition",
    "sample": "generate",
    "server": "serve",
    "txt2img": "generate",
    "upload": "push",
}
"""Verbs of other tools -> ours."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        # Abbreviated, an option that a verb lacks is taken for another one: `--condition` for a column.
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)", "usage")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Answer a wrong choice, also a wrong verb, with the nearest."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        if action.dest != "verb":
            what = action.option_strings[0] if action.option_strings else action.dest
            raise UserError(f"{what}: unknown value {str(value)!r}{nearest(str(value), choices)}", "usage")
        habit = _VERB_HABITS.get(str(value))
        hint = f"; did you mean {habit}?" if habit else nearest(str(value), choices)
        raise UserError(f"there is no verb {str(value)!r}{hint}", "usage")


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *values: Any) -> None:
        try:
            import shtab
        except ImportError as error:
            message = "tab completion needs shtab; run: pip install 'controlkit[completion]'"
            raise UserError(message, "missing-package") from error
        print(shtab.complete(parser, shell=values[1]))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = _Parser(
        prog="controlkit",
        description="Spatial controls for text-to-image diffusion models.",
        epilog="Begin with: controlkit demo. Examples of a verb: controlkit VERB --help. Documentation: docs/.",
    )
    parser.add_argument("--version", action="version", version=f"controlkit {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        metavar="SHELL",
        help="print a script for tab completion in bash, zsh or tcsh",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
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
        amount = sub.add_mutually_exclusive_group()
        for flags, what in (
            (("-q", "--quiet"), "print only results and errors: no progress, no notes"),
            (("-v", "--verbose"), "print progress also where standard error is not a terminal"),
        ):
            amount.add_argument(*flags, action="store_true", default=False, help=what)
        sub.set_defaults(run=verb.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (docs/errors.md): 0, 2 for an error that the user can fix, 128 + signal.

    Args:
        argv: the command line after the name of the program; default: that of this process.
    """
    if argv is None:
        share_processors()
    with interruptible(restore=argv is not None):
        words = sys.argv[1:] if argv is None else list(argv)
        try:
            return _run(words)
        except KeyboardInterrupt as error:
            terminated = isinstance(error, Terminated)
            progress.end_line()
            print(f"controlkit: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
            return 143 if terminated else 130


def share_processors() -> None:
    """Let idle OpenMP threads sleep soon, before torch reads how long they spin.

    By default GNU's OpenMP spins for milliseconds. If another process is busy, the awaited thread may not run
    meanwhile, and with kernels as small as nano's nearly all time is spent so (docs/benchmarks.md, "A busy machine").
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(_SPINS)


def _run(words: Sequence[str]) -> int:
    as_json = "--json" in words
    try:
        parser = build_parser()
        args = _parse(parser, [_expanded(word) for word in words])
        if args.verb is None:
            parser.print_help()
            return 0
        with _verbosity(quiet=args.quiet, verbose=args.verbose):
            args.run(args)
        return 0
    except Interrupted as error:
        _report(UserError(str(error), "interrupted"), as_json)
        return 128 + error.signal
    except UserError as error:
        _report(error, as_json and not isinstance(error, Reported))
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _report(UserError(f"{error.strerror or error}{where}", _code_of(error)), as_json)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "use a smaller --batch-size, smaller images, or another --device"
        _report(UserError(f"out of memory; {advice}", "out-of-memory"), as_json)
        return 2


def _expanded(word: str) -> str:
    """`--out=~/x` with the home folder in place of `~`, which shells leave there."""
    option, equals, value = word.partition("=")
    at_home = equals and option.startswith("--") and value.startswith("~/")
    return f"{option}={os.path.expanduser(value)}" if at_home else word


def _parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    try:
        return parser.parse_args(words)
    except UserError as error:
        (verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        if error.code == "usage" and (answer := habits.explain(verbs.choices, words)):
            raise UserError(answer, "usage") from error
        raise


@contextlib.contextmanager
def _verbosity(*, quiet: bool, verbose: bool) -> Iterator[None]:
    progress.set_verbose(verbose)
    try:
        if not quiet:
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        progress.set_verbose(False)


def _report(error: UserError, as_json: bool) -> None:
    progress.end_line()
    print(f"controlkit: {error}{f' [{error.code}]' if error.code else ''}", file=sys.stderr)
    if as_json:
        print_json({"error": error_json(error)})


def _code_of(error: OSError) -> Code:
    if isinstance(error, FileNotFoundError):
        return "missing-file"
    return "write-failed" if error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT) else "unreadable-file"


if __name__ == "__main__":
    sys.exit(main())
