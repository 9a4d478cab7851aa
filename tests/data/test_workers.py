"""A pool of processes that hang or die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlkit.data.workers import run_jobs, sign_of_life
from controlkit.errors import UserError


def hang_once(marker: Path, job: int) -> int:
    """Square a number; the first time that it is asked for the third, never come back."""
    if job == 3 and not marker.exists():
        marker.touch()
        time.sleep(3600)
    return job * job


def hang(job: int) -> int:
    """Never come back from the second job."""
    while job == 2:
        time.sleep(3600)
    return job


def slow(job: int) -> int:
    """Take longer than patience lasts, but say now and then that it goes on."""
    for _ in range(12):
        time.sleep(0.25)
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


def test_jobs_of_a_process_that_hangs_are_done_by_another(tmp_path, capsys):
    results = run_jobs(partial(hang_once, tmp_path / "marker"), range(6), workers=2, patience=3)
    assert sorted(results) == [0, 1, 4, 9, 16, 25]
    told = capsys.readouterr().err
    assert "no process has finished anything for 3 s" in told and "3" in told.split(", in ")[1]


def test_a_job_that_hangs_every_time_ends_in_words():
    began = time.monotonic()
    with pytest.raises(UserError, match=r"processes hung 4 times in a row, .* in 2; run again without these files"):
        list(run_jobs(hang, [1, 2], workers=2, patience=2))
    assert time.monotonic() - began < 60


def test_a_job_that_says_it_lives_may_take_as_long_as_it_likes(capsys):
    assert sorted(run_jobs(slow, [1, 2], workers=2, patience=2)) == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_process_that_is_killed_is_told_of(tmp_path, capsys):
    assert sorted(run_jobs(partial(die_once, tmp_path / "marker"), range(5), workers=2)) == [0, 1, 2, 3, 4]
    told = capsys.readouterr().err
    assert told.count("a process was killed") == 1 and "3" in told.split(", in ")[1]


def test_a_job_that_kills_its_process_every_time_ends_in_words():
    with pytest.raises(UserError, match="processes were killed 4 times in a row, perhaps for want of memory"):
        list(run_jobs(die, [1, 2], workers=2))


def test_a_script_without_a_guard_is_told_so_once(tmp_path):
    for number in range(8):
        Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8)).save(tmp_path / f"{number}.png")
    script = tmp_path / "script.py"
    script.write_text(
        "import controlkit as ck\n"
        f"settings = ck.MakeSettings(conditions=('canny',))\n"
        f"ck.make_pairs(ck.list_pictures([{str(tmp_path)!r}]), {str(tmp_path / 'out')!r}, settings, workers=2)\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.count("Traceback") == 1
    assert 'put what it does under `if __name__ == "__main__":`' in ended.stderr.splitlines()[-1]
