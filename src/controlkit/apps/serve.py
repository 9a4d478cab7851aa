"""serve image generation over HTTP: A1111's API, OpenAI's and its own

    controlkit serve
    controlkit serve --base models/ --controls controls/ --loras loras/
    CONTROLKIT_TOKEN=... controlkit serve --host 0.0.0.0

The folders are listed once, at the start. Clients name models by file name, without suffix. docs/server.md says what to
enter in each client. Waiting requests are kept in a file and survive a restart.
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastapi import FastAPI

    from controlkit.server.service import Service

TOKEN = "CONTROLKIT_TOKEN"
"""Environment variable with the token, which other users of the machine cannot read off the command line."""
_LEAST_TOKEN = 12
"""Characters."""
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")

_LIMITS = {
    "body": "size of a request's body in megabytes",
    "pixels": "width times height of a result, after the second pass",
    "input_pixels": "width times height of an image that a client sends",
    "steps": "denoising steps of a request",
    "images": "images of a request",
    "controls": "controls of a request",
    "queue": "requests that wait; if there are more, the server answers 503",
    "seconds": "seconds of a request, including loading models",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb. Defaults of limits are those of `Limits`."""
    from controlkit.sampling.request import GRAPHS
    from controlkit.server.limits import Limits

    models = parser.add_argument_group("models")
    models.add_argument(
        "--base",
        dest="bases",
        action="append",
        metavar="NAME",
        help="nano, a diffusers folder, a single file, a hub id, or a folder of these; repeat. Requests that name no"
        " base use the first (default: nano)",
    )
    for name, what in (
        ("controls", "controls; repeat (with nano, its shipped controls are included)"),
        ("loras", "LoRAs; repeat"),
        ("vaes", "autoencoders; repeat"),
        ("embeddings", "textual inversions; repeat"),
    ):
        models.add_argument(
            f"--{name}", action="append", default=[], metavar="PATH", help=f"a file or a folder of {what}"
        )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="port (default: 7860, that of A1111)")
    parser.add_argument(
        "--token",
        help="what clients must send, as a bearer token or as the password of any user. Required if --host is reachable"
        f" from other machines. {TOKEN} is safer: other users of this machine can read options",
    )
    parser.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="origin whose web pages may use the server, such as http://localhost:3000; repeat (default: none)",
    )
    parser.add_argument(
        "--queue",
        metavar="FILE",
        help="file of the queue (default: controlkit/queue-PORT.sqlite in XDG_STATE_HOME, ~/.local/state)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default: auto, the best available)")
    parser.add_argument(
        "--precision", default="auto", help="fp32, fp16, bf16 or auto (default: auto, fp16 on CUDA, else fp32)"
    )
    parser.add_argument(
        "--low-memory",
        action="store_true",
        help="move text encoders off the device once prompts are encoded, and decode images one by one: the same images"
        " in less memory",
    )
    parser.add_argument(
        "--graphs",
        default="auto",
        choices=GRAPHS,
        help="CUDA graphs, which speed up small batches (default: auto, which uses them on CUDA if there are enough"
        " steps)",
    )
    limits = parser.add_argument_group("limits")
    for field in dataclasses.fields(Limits):
        name = "--keep" if field.name == "kept" else f"--max-{field.name.replace('_', '-')}"
        what = _LIMITS.get(field.name, "finished requests whose results are kept")
        limits.add_argument(
            name,
            dest=f"max_{field.name}",
            type=type(field.default),
            default=field.default,
            metavar="N",
            help=f"{what} (default: {field.default})",
        )


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    serve(args)


def serve(args: argparse.Namespace, page: Callable[[FastAPI, Service], object] | None = None, path: str = "") -> None:
    """Serve until the process is stopped.

    Args:
        page: mounts a web page in the application.
        path: that of the page, printed with the address.

    Raises:
        UserError: a package is missing, or an argument cannot be used.
    """
    from controlkit.errors import UserError
    from controlkit.files import locked, writable_folder

    try:
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UserError(
            f"the server needs {error.name}; run: pip install 'controlkit[serve]'", "missing-package"
        ) from error
    token = getattr(args, "token", None) or os.environ.get(TOKEN) or None
    _check_access(args.host, token)
    origins = tuple(_origin(each) for each in args.cors)
    _check_execution(args.device, args.precision)

    from controlkit.server.app import create_app
    from controlkit.server.catalogue import list_models
    from controlkit.server.limits import Limits
    from controlkit.server.logs import log_json_lines
    from controlkit.server.service import Settings
    from controlkit.server.spec import Execution

    limits = Limits(**{field.name: getattr(args, f"max_{field.name}") for field in dataclasses.fields(Limits)})
    catalogue = list_models(
        bases=getattr(args, "bases", None) or ["nano"],
        controls=args.controls,
        loras=args.loras,
        vaes=args.vaes,
        embeddings=args.embeddings,
    )
    for note in catalogue.skipped:
        print(f"not offered: {note}", file=sys.stderr)
    with _listening(args.host, args.port) as sock:
        port = sock.getsockname()[1]
        queue = Path(args.queue) if hasattr(args, "queue") else state_folder() / f"queue-{port}.sqlite"
        writable_folder(queue.parent, "give --queue another file")
        settings = Settings(
            catalogue=catalogue,
            queue=queue,
            limits=limits,
            token=token,
            origins=origins,
            hosts=(*_LOCAL_NAMES, args.host) if _is_local(args.host) else None,
            execution=Execution(
                device=args.device,
                precision=args.precision,
                low_memory=getattr(args, "low_memory", False),
                graphs=args.graphs,
            ),
        )
        with locked(queue.with_name(f"{queue.name}.lock"), f"another server uses {queue}; give --queue another file"):
            log_json_lines("warning" if args.quiet else "info")
            config = uvicorn.Config(
                create_app(settings, page),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
            )
            print(f"http://{_shown(args.host)}:{port}{path}", flush=True)
            uvicorn.Server(config).run(sockets=[sock])


def _check_access(host: str, token: str | None) -> None:
    from controlkit.errors import UserError

    if token is None:
        if not _is_local(host):
            raise UserError(
                f"--host {host} lets other machines in; set {TOKEN} (for instance to the output of openssl rand -hex"
                " 16), or leave --host out",
                "missing-setting",
            )
        return
    if len(token) < _LEAST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(
            f"the token must have at least {_LEAST_TOKEN} characters, all ASCII and none a space", "out-of-range"
        )


def _origin(text: str) -> str:
    """An origin as browsers send it: in lower case, and without a slash at its end.

    Raises:
        UserError: it is no origin, so that no browser would send it.
    """
    from controlkit.errors import UserError

    origin = text.strip().lower().removesuffix("/")
    if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
        raise UserError(
            f"--cors {text}: expected an origin, scheme and host without a path, such as http://localhost:3000",
            "wrong-type",
        )
    return origin


def _check_execution(device: str, precision: str) -> None:
    """Check `--device` and `--precision` now: requests would fail one by one.

    Raises:
        UserError: there is no such device or precision.
    """
    import torch

    from controlkit.bases.devices import choose_device, choose_dtype
    from controlkit.errors import UserError

    chosen = choose_device(device)
    choose_dtype(precision, chosen)
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(f"--device {device}: torch finds {count} CUDA devices here; try cpu", "device-unavailable")


def _is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(host: str, port: int) -> socket.socket:
    """A listening socket: clients may connect from now on, and are answered once the server has started.

    Raises:
        UserError: there is no such port, or the address is taken or not of this machine.
    """
    from controlkit.errors import UserError

    if not 0 <= port <= 65535:  # getaddrinfo would take it modulo 2^16
        raise UserError(f"--port {port}: expected 0 to 65535; 0 is any free port", "out-of-range")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        raise UserError(f"cannot listen on {host}, port {port}: {error}; give another --port", "in-use") from error
    return sock


def state_folder() -> Path:
    """Where the server keeps its queues, and the page its runs."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "controlkit"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
