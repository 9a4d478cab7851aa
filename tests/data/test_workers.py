"""A pool of processes that hang or die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from controlkit.data import workers
from controlkit.data.workers import run_jobs, sign_of_life
from controlkit.errors import UserError
from refusals import refused


def hang_once(marker: Path, hung: Path, job: int) -> int:
    """Square a number; the first time that it is asked for the third, never come back."""
    if job == 3 and not marker.exists():
        marker.touch()
        hang(hung, 2)
    return job * job


def hang(hung: Path, job: int) -> int:
    """Never come back from the second job."""
    while job == 2:
        hung.touch()
        time.sleep(3600)
    return job


def slow(job: int) -> int:
    """Take long, but say now and then that it goes on."""
    for _ in range(12):
        time.sleep(0.05)
        sign_of_life()
    return job


def die_once(marker: Path, job: int) -> int:
    """End the process in the middle of the third job, the first time."""
    if job == 3 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def die(job: int) -> int:
    """End the process in the middle of the second job."""
    if job == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return job


def fail(job: int) -> int:
    """Fail as a job that cannot write."""
    if job == 2:
        raise UserError("cannot write 2", "write-failed")
    return job


class Clock:
    """The clock that the pool's patience is measured by. It does not go by itself, so that a busy machine, on which
    processes take long to start, does not look like one on which they hang."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, monotonic: Callable[[Clock], float]) -> None:
        self.watch: workers._Watch | None = None
        self.now = 0.0
        clock = self

        class Watch(workers._Watch):
            def __init__(self, patience: float) -> None:
                super().__init__(patience)
                clock.watch = self

        monkeypatch.setattr(workers, "_Watch", Watch)
        monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: monotonic(self)))


@pytest.fixture
def hung(tmp_path, monkeypatch) -> Path:
    """A file that a job makes before it hangs; a second goes by with each look at a pool in which one does."""
    path = tmp_path / "hung"

    def monotonic(clock: Clock) -> float:
        if clock.watch is None or clock.watch.hung:
            path.unlink(missing_ok=True)  # the next processes do not hang yet
        clock.now += path.exists()
        return clock.now

    Clock(monkeypatch, monotonic)
    return path


def test_jobs_of_a_process_that_hangs_are_done_by_another(tmp_path, capsys, hung):
    results = run_jobs(partial(hang_once, tmp_path / "marker", hung), range(6), workers=2, patience=3)
    assert sorted(results) == [0, 1, 4, 9, 16, 25]
    message = capsys.readouterr().err
    assert message.count("no process has finished anything for 3 s") == 1 and "3" in message.split(", in ")[1]


def test_a_job_that_hangs_every_time_ends_in_words(hung):
    with refused("unreadable-file", "hung 4 times", " in 2;"):
        list(run_jobs(partial(hang, hung), [1, 2], workers=2, patience=2))


def test_a_job_that_says_it_lives_may_take_as_long_as_it_likes(capsys, monkeypatch):
    """Each of the 24 signs of life comes 0.2 s after the one before; together they take longer than patience lasts."""
    Clock(monkeypatch, lambda clock: 0.0 if clock.watch is None else 0.2 * clock.watch.life.value)
    assert sorted(run_jobs(slow, [1, 2], workers=2, patience=2)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_process_that_is_killed_is_told_of(tmp_path, capsys):
    assert sorted(run_jobs(partial(die_once, tmp_path / "marker"), range(5), workers=2)) == [0, 1, 2, 3, 4]
    message = capsys.readouterr().err
    assert message.count("a process was killed") == 1 and "3" in message.split(", in ")[1]


def test_a_job_that_kills_its_process_every_time_ends_in_words():
    with refused("out-of-memory", "killed 4 times", "--workers"):
        list(run_jobs(die, [1, 2], workers=2))


def test_an_error_of_a_job_keeps_its_code():
    with refused("write-failed", "cannot write 2"):
        list(run_jobs(fail, [1, 2, 3], workers=2))


def test_a_script_without_a_guard_is_told_so_once(tmp_path):
    for number in range(8):
        Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8)).save(tmp_path / f"{number}.png")
    script = tmp_path / "script.py"
    script.write_text(
        "import controlkit as ck\n"
        f"settings = ck.MakeSettings(conditions=('canny',))\n"
        f"ck.make_pairs(ck.list_images([{str(tmp_path)!r}]), {str(tmp_path / 'out')!r}, settings, workers=2)\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.count("Traceback") == 1
    assert 'under `if __name__ == "__main__":`' in ended.stderr.splitlines()[-1]


def writing(folder: Path, job: int) -> int:
    """Write a file for as long as it takes."""
    for number in range(40 if job else 1):
        (folder / f"{job}-{number}").touch()
        time.sleep(0.05 if job else 0.3)
    return job


def test_nothing_is_written_once_a_run_has_ended(tmp_path):
    """Else a run that was interrupted leaves files after it has cleaned up."""
    results = run_jobs(partial(writing, tmp_path), [0, 1, 2, 3], 2)
    assert next(results) == 0
    results.close()
    before = sorted(tmp_path.iterdir())
    time.sleep(0.5)
    assert sorted(tmp_path.iterdir()) == before and len(before) < 80
