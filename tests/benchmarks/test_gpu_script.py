"""benchmarks/gpu.sh: the order of its parts, what a failure does, and every part at toy size."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_checks
import measure
import memory
import train_for

from controlkit.bases.load import load_base
from controlkit.training.recipes import build_recipe

ROOT = Path(__file__).parents[2]
PARTS = [
    "training_checks",
    "sampling_checks",
    "ctrlora_sampling",
    "adapter_training",
    "nano",
    "controlnet_training",
    "adapter_training_batch",
    "controlnet_sampling",
    "finetuning_cost",
]
"""Of a toy run."""


def run(out: Path, *arguments: str, python: str = sys.executable) -> tuple[int, list[dict]]:
    """Status and summary of the script."""
    command = ["sh", str(ROOT / "benchmarks/gpu.sh"), "--device", "cpu", "--out", str(out), *arguments]
    environment = {**os.environ, "PYTHON": python, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    return done.returncode, json.loads((out / "summary.json").read_text())["parts"]


@pytest.fixture
def stand_in(tmp_path) -> str:
    """A Python that writes its arguments down and fails in the training of a ControlNet; `-` runs as it is."""
    path = tmp_path / "python"
    path.write_text(
        f"""#!/bin/sh
[ "$1" = - ] && exec {sys.executable} "$@"
echo "$@" >> {tmp_path}/called
case $1 in *controlnet_training.py) echo broken; exit 3 ;; esac
"""
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_parts_run_in_order_and_one_that_fails_stops_none(stand_in, tmp_path):
    status, parts = run(tmp_path / "out", "--toy", "--train", "9", python=stand_in)
    assert status == 1
    assert [part["part"] for part in parts] == PARTS
    assert {part["part"] for part in parts if part["status"] != "done"} == {"controlnet_training"}
    called = (tmp_path / "called").read_text().splitlines()
    assert [Path(line.split()[0]).name for line in called][:5] == [
        "gpu_checks.py",
        "gpu_checks.py",
        "ctrlora_sampling.py",
        "adapter_training.py",
        "train_for.py",
    ]
    assert "--seconds 9" in called[4] and "broken" in (tmp_path / "out" / "controlnet_training.log").read_text()
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert "./summary.json" in archive.getnames()


def test_quick_runs_the_essential_and_parts_are_chosen_by_name(stand_in, tmp_path):
    status, parts = run(tmp_path / "out", "--quick", python=stand_in)
    assert (status, [part["part"] for part in parts]) == (0, PARTS[:4])
    _, parts = run(tmp_path / "out", "memory", "sampling_checks", python=stand_in)
    assert [part["part"] for part in parts] == ["sampling_checks", "memory"]


def test_what_does_not_fit_into_the_time_is_left_out(stand_in, tmp_path):
    chosen = ("training_checks", "adapter_training", "memory")
    _, parts = run(tmp_path / "out", "--limit", "5", *chosen, python=stand_in)
    assert [part["status"] for part in parts] == ["left out"] * 3
    _, parts = run(tmp_path / "out", "--limit", "60", *chosen, python=stand_in)
    assert [part["status"] for part in parts] == ["done", "done", "left out"]


def test_the_ways_of_memory_that_the_script_names_exist(tmp_path, stand_in):
    run(tmp_path / "out", "memory", python=stand_in)
    (line,) = (tmp_path / "called").read_text().splitlines()
    assert "ours, bf16, base as a graph" in line
    names = (ROOT / "benchmarks/gpu.sh").read_text().split("--only ")[-1].split("\n\n")[0]
    asked = re.findall(r'"([^"$]+)"', names[: names.index("part ")])
    assert set(asked) <= {way.name for way in memory.WAYS} and len(asked) == 6


def test_a_benchmark_runs_at_toy_size(tmp_path):
    status, parts = run(tmp_path, "--toy", "adapter_training")
    assert (status, [part["status"] for part in parts]) == (0, ["done"])
    (case,) = json.loads((tmp_path / "adapter_training.json").read_text())["cases"]
    assert case["ours_runs"].startswith("eager") and set(case["share_of_rate"]) == {"ours", "reference"}


@pytest.mark.slow
def test_every_part_runs_at_toy_size(tmp_path, icons_file):
    status, parts = run(tmp_path, "--toy", "--train", "0")
    assert (status, [part["part"] for part in parts]) == (0, [part for part in PARTS if part != "nano"])
    found = [json.loads((tmp_path / f"{part}.json").read_text())["checks"] for part in PARTS[:2]]
    checks = [check for part in found for check in part]
    assert all(check["passed"] for check in checks) and len(checks) > 15


def test_a_run_for_a_time_has_a_trial_and_the_steps_that_fit(tmp_path, icons_file):
    recipe = build_recipe(
        {
            "system": "base",
            "out": str(tmp_path / "run"),
            "icons": str(icons_file),
            "start": "nano",
            "variants": 1,
            "batch_size": 2,
            "steps": 1000,
            "warmup_steps": 0,
            "device": "cpu",
        },
        origin="test",
    )
    made = train_for.train_for(recipe, 0.0, trial=1)  # no time is left after the trial
    assert (made["steps"], made["images"]) == (4, 8)
    lines = [{"step": 10, "seconds": 9.0}, {"step": 20, "seconds": 11.0}, {"step": 30, "seconds": 40.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert train_for.seconds_of_a_step(tmp_path, 10) == 0.2
    assert load_base(tmp_path / "run" / "base").fingerprint != load_base().fingerprint
    assert train_for.steps_that_fit(10.0, 0.5, 60) == 79


def test_checks_fail_by_their_bound_and_where_a_graph_was_expected():
    eager = gpu_checks.Check("a", "eager: it was too short", 0.0, 1e-4, graph_expected=True)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert eager.passed(cpu) and not eager.passed(cuda)
    assert gpu_checks.Check("a", "graph, 20 calls", 0.0, 1e-4, graph_expected=True).passed(cuda)
    assert not gpu_checks.Check("a", "graph", 1e-3, 1e-4).passed(cuda)
    assert not gpu_checks.Check("a", "graph", float("nan"), 1e-4).passed(cpu)


def test_an_error_in_one_check_ends_no_other_but_those_that_need_it(tmp_path, monkeypatch):
    fails = gpu_checks.Check("b", "graph", 1.0, 1e-4)

    def broken():
        yield fails
        raise RuntimeError("out of\nmemory")

    made = list(gpu_checks.run_groups([("a", broken), ("b", lambda: iter([fails]))]))
    assert made[0] is made[2] is fails
    assert made[1].ran == "error: RuntimeError: out of memory" and not made[1].passed(torch.device("cpu"))
    monkeypatch.setattr(gpu_checks, "load_base", lambda *_, **__: None)
    monkeypatch.setattr(gpu_checks, "sampling_groups", lambda base: [("a", broken)])
    assert gpu_checks.main(["--device", "cpu", "--only", "sampling", "--out", str(tmp_path / "out.json")]) == 1
    assert [check["passed"] for check in json.loads((tmp_path / "out.json").read_text())["checks"]] == [False, False]


def test_a_warm_up_ends_when_no_way_gets_faster():
    now = [0.0]
    takes = iter([8.0, 1.0, 4.0, 1.0, 3.9, 1.0, 3.8, 1.0])

    def step(_: int) -> None:
        now[0] += next(takes)

    assert measure.settled({"a": step, "b": step}, "cpu", limit=100.0, clock=lambda: now[0]) == 3
    slow = iter([8.0, 4.0, 2.0])

    def ever_faster(_: int) -> None:
        now[0] += next(slow)

    assert measure.settled({"a": ever_faster}, "cpu", limit=11.0, clock=lambda: now[0]) == 2


def test_operations_are_counted_and_shares_are_of_the_rate():
    a = torch.ones(8, 8)
    assert measure.operations(lambda: a @ a) == 2 * 8**3
    turns = measure.Turns({"a": [2.0, 4.0, 3.0]}, {})
    assert measure.shares({"a": 600}, turns, 400.0) == {"a": 0.5}


def test_on_cuda_settling_is_the_warm_up(monkeypatch):
    monkeypatch.setattr(measure, "synchronise", lambda device: None)
    monkeypatch.setattr(measure, "settled", lambda ways, device: [ways["a"](0) for _ in range(2)])
    called = []
    turns = measure.take_turns({"a": called.append}, 3, device="cuda", warm_up=5)
    assert called == [0, 0, 0, 1, 2] and len(turns.seconds["a"]) == 3


def test_cases_so_far_are_kept_until_all_are_written(tmp_path):
    args = measure.parser(None, rounds=1).parse_args(["--out", str(tmp_path / "out.json")])
    measure.so_far("name", args, [{"a": 1}])
    assert json.loads((tmp_path / "out.partial.json").read_text())["cases"] == [{"a": 1}]
    measure.finish("name", args, [{"a": 1}, {"b": 2}])
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_outputs_are_compared_without_tf32():
    args = measure.parser(None, rounds=1).parse_args(["--dtype", "bf16"])
    before = torch.backends.cudnn.allow_tf32
    assert measure.compared_in_float32(args, lambda _: torch.backends.cudnn.allow_tf32) is False
    assert torch.backends.cudnn.allow_tf32 is before
