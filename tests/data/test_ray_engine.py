"""Pairs on Ray Data: the same bytes as without, also when a worker is killed."""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest
from pair_files import contents, write_images

from controlkit.data.engine import make_pairs
from controlkit.data.input_images import list_images
from controlkit.data.jobs import ShardJob, make_shard
from controlkit.data.making import MakeSettings
from controlkit.data.pairs import read_pairs
from controlkit.data.readers.archives import shard_name
from refusals import refused

SETTINGS = MakeSettings(conditions=("canny", "noise"), size=32)
HAS_RAY = importlib.util.find_spec("ray") is not None


def test_jobs_survive_the_way_to_another_machine(tmp_path):
    write_images(tmp_path / "in", 2)
    job = ShardJob(images=list_images([tmp_path / "in"]), settings=SETTINGS, path=tmp_path / "a.tar")
    assert ShardJob.from_json(job.to_json()) == job


@pytest.mark.skipif(HAS_RAY, reason="Ray is installed")
def test_without_ray_the_error_says_what_to_install(tmp_path):
    write_images(tmp_path / "in", 2)
    with refused("missing-package", "pip install 'controlkit[distributed]'"):
        make_pairs(list_images([tmp_path / "in"]), tmp_path / "out", SETTINGS, engine="ray")


@pytest.mark.slow  # starts Ray twice, which takes all cores for some time
@pytest.mark.skipif(not HAS_RAY, reason="needs the extra distributed")
def test_ray_makes_the_same_bytes_and_a_killed_worker_loses_and_doubles_nothing(tmp_path):
    from controlkit.data.ray_engine import run_with_ray

    write_images(tmp_path / "in", 12)
    images = list_images([tmp_path / "in"])
    make_pairs(images, tmp_path / "local", SETTINGS, shards=4, workers=1)
    report = make_pairs(images, tmp_path / "ray", SETTINGS, shards=4, workers=2, engine="ray")
    assert report.made == 12 and contents(tmp_path / "ray") == contents(tmp_path / "local")
    assert make_pairs(images, tmp_path / "ray", SETTINGS, shards=4, workers=2, engine="ray").kept == 12

    out, deaths = tmp_path / "killed", tmp_path / "deaths"
    deaths.mkdir()
    out.mkdir()
    jobs = [
        ShardJob(images=images[3 * n : 3 * n + 3], settings=SETTINGS, path=out / shard_name(n, 4)) for n in range(4)
    ]

    def make(job):
        # Two workers die, one before its shard is there and one after, before anybody has heard of it.
        number = int(job.path.name.split("-")[1])
        flag = deaths / str(number)
        if number in (1, 2) and not flag.exists():
            flag.touch()
            if number == 2:
                make_shard(job)
            os.kill(os.getpid(), signal.SIGKILL)
        return make_shard(job)

    outcomes = [outcome for group in run_with_ray(make, jobs, 2) for outcome in group]
    assert sorted(outcome.key for outcome in outcomes) == [image.key for image in images]
    assert sorted(path.name for path in deaths.iterdir()) == ["1", "2"]
    assert contents(out) == contents(tmp_path / "local")
    assert len(read_pairs(out, "canny")) == 12
