"""Runs in several processes of this machine, started by torchrun or as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_LONGEST = 900
"""Seconds after which a launch counts as hung; nothing that works takes a tenth of it on a busy machine."""


def torchrun(words: Sequence[object], processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python WORDS` in several processes, with torchrun's own launcher: seconds of imports, so for slow tests."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launch, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=_LONGEST,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def together(words: Sequence[object], folder: Path, processes: int = 2, **environment: str) -> str:
    """`python WORDS` in several processes that find each other by the environment, as torchrun's do.

    When one fails, the others are ended. Returns what all of them wrote on standard error, which `folder` keeps.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    files = [folder / f"stderr-{rank}.txt" for rank in range(processes)]
    running = []
    for rank, path in enumerate(files):
        mine = {**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, **environment}
        with path.open("w") as stream:
            running.append(
                subprocess.Popen(
                    [sys.executable, *map(str, words)],
                    stdout=subprocess.DEVNULL,
                    stderr=stream,
                    env={**os.environ, **{name: str(value) for name, value in mine.items()}},
                )
            )
    hung = time.monotonic() + _LONGEST
    try:
        while any(process.poll() is None for process in running):
            assert not any(process.poll() for process in running), said(files)
            assert time.monotonic() < hung, said(files)
            time.sleep(0.02)
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in running), said(files)
    return said(files)


def said(files: Sequence[Path]) -> str:
    return "".join(path.read_text() for path in files)
