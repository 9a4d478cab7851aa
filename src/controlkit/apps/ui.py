"""serve the same with a web page: generate, make pairs, train, compare

    controlkit ui
    controlkit ui --base models/ --controls controls/

The page is part of `controlkit serve`, which has the same arguments: it uses the same queue and worker, and the APIs
answer beside it. docs/ui.md describes it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from controlkit.apps import serve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    serve.add_arguments(parser)
    parser.add_argument(
        "--work",
        metavar="DIR",
        help="folder for uploaded pairs and runs (default: controlkit/ui in XDG_STATE_HOME, ~/.local/state)",
    )


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    from controlkit.errors import UserError
    from controlkit.files import writable_folder

    try:
        from controlkit.ui.files import use_private_folder

        use_private_folder()  # before Gradio is imported
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"the page needs {error.name}; run: pip install 'controlkit[ui]'", "missing-package") from error
    from controlkit.ui.page import PATH, mount
    from controlkit.ui.runs import Workplace

    work = writable_folder(Path(args.work) if hasattr(args, "work") else serve.state_folder() / "ui", "give --work")
    place = Workplace(work)
    place.adapters.mkdir(exist_ok=True)
    place.keep_finished()
    args.controls = [*args.controls, str(place.adapters)]
    serve.serve(args, lambda app, service: mount(app, service, work), path=PATH)
