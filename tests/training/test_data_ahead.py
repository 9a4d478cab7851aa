"""Batches prepared by data workers are those of the step, bit for bit; workers end with the run, in all ways."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from toy_training import Toy, toy_recipe

from controlkit.bases.text import TokenizedPrompts
from controlkit.data.pairs import write_pairs
from controlkit.errors import Interrupted, UserError
from controlkit.training import ahead
from controlkit.training.ahead import DataAhead, in_data_worker, number_of_workers, on_device
from controlkit.training.control_objective import ControlObjective
from controlkit.training.objective import torch_generator
from controlkit.training.recipes import build_recipe
from controlkit.training.run import objective_of, run
from controlkit.training.run_folder import fingerprint
from controlkit.training.trainer import train
from refusals import refused

CPU = torch.device("cpu")
STEPS = 4


def drawing(number: int) -> tuple[np.ndarray, np.ndarray, str]:
    rng = np.random.default_rng(number)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((64, 64)))
    return 255 - image, image, f"thing {number % 4}"


@pytest.fixture
def settings(tmp_path, base_folder, icons_file):
    """Settings of a short run of every source, and of the base of icons."""
    common = {
        "out": str(tmp_path / "run"),
        "steps": STEPS,
        "batch_size": 2,
        "device": "cpu",
        "log_every": 1,
        "save_every": 2,
        "preview_every": 100,
        "gradient_accumulation_steps": 2,
    }
    control = {**common, "base": str(base_folder), "score_pictures": 1}

    def of(data):
        if data == "base":
            start = {"icons": str(icons_file), "start": str(base_folder), "variants": 2}
            return {**common, "system": "base", **start}
        if data == "autoencoder":
            network = {"channels": (8, 8, 8), "latent_channels": 2}
            return {**common, "system": "autoencoder", "icons": str(icons_file), **network}
        if data == "icons":
            several = {"conditions": ("canny", "pixel"), "rank": 2, "variants": 1}
            return {**control, "system": "ctrlora-base", "icons": str(icons_file), **several}
        if data == "pairs":
            folder = tmp_path / "pairs"
            write_pairs(folder, [drawing(number) for number in range(8)])
            lines = [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]
            for line in lines:
                line["prompt"] = [line["prompt"], "another caption"]
            (folder / "prompt.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return {**control, "system": "controlnet", "pairs": str(folder), "flip": True}
        return {**control, "system": "controlnet", "condition": "canny", "multigen": str(multigen(tmp_path))}

    return of


def multigen(folder: Path) -> Path:
    root = folder / "multigen"
    for name in ("json_files", "images", "conditions"):
        (root / name).mkdir(parents=True)
    lines = []
    for number in range(6):
        condition, image, prompt = drawing(number)
        Image.fromarray(np.concatenate([image, image[::-1]], 1)).save(root / f"images/{number}.png")
        Image.fromarray(np.concatenate([condition, condition[::-1]], 1)).save(root / f"conditions/{number}.png")
        lines.append({"source": f"./{number}.png", "control_canny": f"./{number}.png", "prompt": prompt})
    (root / "images/4.png").write_bytes(b"torn")
    path = root / "json_files/aesthetics_plus_all_group_canny_all.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def tensors_of(made):
    found = []

    def keep(value):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                keep(getattr(value, field.name))
        elif hasattr(value, "named"):
            keep(list(value.named.values()))
        else:
            for leaf in tree_leaves(value):
                if leaf is not value:
                    keep(leaf)

    keep(made)
    return found


@pytest.mark.parametrize("data", ["icons", "pairs", "multigen", "base", "autoencoder"])
def test_a_run_with_workers_is_the_run_without(data, settings, tmp_path, capfd):
    weights = []
    for workers in (0, 2):
        values = settings(data) if not weights else {**values, "out": str(tmp_path / "ahead")}  # noqa: F821
        recipe = build_recipe({**values, "data_workers": workers})
        run(recipe)
        weights.append(load_file(Path(recipe.out) / "state.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    if data == "multigen":
        assert "so far" in capfd.readouterr().err  # unreadable images, skipped by either
    # A run goes on with another number of workers, to the same weights.
    broken = build_recipe({**values, "out": str(tmp_path / "parts"), "steps": 2, "data_workers": 1})
    run(broken)
    run(dataclasses.replace(broken, steps=STEPS, data_workers=2, learning_rate=recipe.learning_rate))
    assert fingerprint(broken) == fingerprint(recipe)


@pytest.mark.parametrize("data", ["icons", "pairs", "multigen", "base", "autoencoder"])
def test_workers_prepare_what_the_step_would(data, settings):
    objective = objective_of(build_recipe(settings(data)))
    assert objective.not_ahead == ""
    made = DataAhead(objective.prepare, range(3, 9), 2)
    try:
        for step in range(3, 9):
            mine, theirs = tensors_of(objective.prepare(step)), tensors_of(made(step))
            assert len(mine) == len(theirs) > 1
            assert all(one.dtype == two.dtype and torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))
    finally:
        made.close()


def test_token_ids_from_a_worker_give_the_same_embeddings(tiny_base):
    prompts = ["a red apple", "", "a house"]
    known = TokenizedPrompts(prompts, tiny_base.tokenizers, tiny_base.tokenize(prompts))
    assert torch.equal(tiny_base.encode_text(known).tokens, tiny_base.encode_text(prompts).tokens)


def test_workers_start_at_once_and_share_memory():
    table = np.random.default_rng(0).random((1000, 1000))
    started = time.monotonic()
    made = DataAhead(lambda number: (os.getpid(), float(table[number].sum())), range(40), 2)
    try:
        got = [made(number) for number in range(40)]
    finally:
        made.close()
    assert time.monotonic() - started < 10  # a worker that imports torch takes that long by itself
    assert [total for _, total in got] == [float(row.sum()) for row in table[:40]]
    assert len({pid for pid, _ in got} - {os.getpid()}) == 2


def test_the_default_generator_does_not_notice_workers():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    made = DataAhead(lambda number: number, range(3), 1)
    made.close()
    assert torch.equal(torch.rand(2), expected)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


class Prepared(Toy):
    """A toy whose numbers come from data workers; `fails` maps steps to what happens in the worker."""

    not_ahead = ""

    def __init__(self, recipe, fails=None, at=None):
        super().__init__(recipe, at)
        self.fails = fails or {}

    def prepare(self, step):
        self.fails.get(step, lambda: None)()
        return torch.randn(16, 4, generator=torch_generator(self.recipe.seed, step)), os.getpid()

    def loss(self, step):
        self.steps_seen.append(step)
        x, self.made_by = self.prepared(step, CPU)
        return self.at.get(step, lambda value: value)((self.network(x) - x[:, :2] * 3).pow(2).mean())


def raising(error):
    def fail():
        if in_data_worker():
            raise error

    return fail


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()}


def test_an_error_in_a_worker_ends_the_run_with_its_text(tmp_path):
    before = children()
    recipe = toy_recipe(tmp_path / "a", data_workers=2)
    with refused("bad-data", "pair 7 is torn"):
        train(Prepared(recipe, {4: raising(UserError("pair 7 is torn", "bad-data"))}), recipe)
    recipe = toy_recipe(tmp_path / "b", data_workers=2)
    with pytest.raises(ValueError, match="a bug") as caught:
        train(Prepared(recipe, {4: raising(ValueError("a bug"))}), recipe)
    assert "in fail" in str(caught.value)  # the traceback of the worker
    assert children() == before


def test_a_killed_worker_ends_the_run_in_words_and_it_can_go_on(tmp_path):
    recipe = toy_recipe(tmp_path / "run", data_workers=1)

    def killed():
        if in_data_worker():
            os.kill(os.getpid(), signal.SIGKILL)

    before = children()
    with refused("out-of-memory", "data worker was killed", "data_workers"):
        train(Prepared(recipe, {4: killed}), recipe)
    assert children() == before
    whole = toy_recipe(tmp_path / "whole")
    one, two = Prepared(recipe), Prepared(whole)
    train(one, recipe)
    train(two, whole)
    assert one.made_by != os.getpid() == two.made_by
    for name, value in two.weights().items():
        assert torch.equal(one.weights()[name], value)


def test_what_needs_a_network_is_prepared_in_the_step(tmp_path):
    recipe = toy_recipe(tmp_path, data_workers=1)
    toy = Prepared(recipe, {5: raising(ahead.NotAhead())})
    train(toy, recipe)
    assert toy.made_by == os.getpid()


def test_a_damaged_row_of_the_cache_is_made_again_by_the_step(settings, capsys):
    recipe = build_recipe({**settings("pairs"), "gradient_accumulation_steps": None})
    truth = objective_of(recipe)
    objective = objective_of(recipe)
    rows = objective.source.of[recipe.condition_names[0]].latents.unflipped
    read = rows._read
    torn = {index: True for index in range(len(rows))}
    rows._read = lambda index: None if torn.get(index) else read(index)
    made = DataAhead(objective.prepare, range(1), 1)
    torn_here, rows._replace = rows._replace, lambda indices: (torn.clear(), torn_here(indices))[1]
    try:
        mine, theirs = tensors_of(truth.prepare(0)), tensors_of(made(0))
    finally:
        made.close()
    assert capsys.readouterr().err.count("damaged rows") == 1
    assert all(torch.allclose(one.float(), two.float(), atol=2e-3) for one, two in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_for_the_whole_group_saves_and_leaves_no_worker(tmp_path, number):
    recipe = toy_recipe(tmp_path / "run", 9, data_workers=2)

    def ctrl_c(loss):
        for pid in children() - before:
            os.kill(pid, number)
        signal.raise_signal(number)
        return loss

    before = children()
    with pytest.raises(Interrupted, match="step 5"):
        train(Prepared(recipe, at={4: ctrl_c}), recipe)
    assert children() == before
    continued = Prepared(recipe)
    train(continued, recipe)
    assert continued.steps_seen == [5, 6, 7, 8]


PROGRAM = """
import os, sys, time
sys.path.insert(0, {tests!r})
import torch
from test_data_ahead import Prepared, children
from toy_training import toy_recipe
from controlkit.training.trainer import train

def say(loss):
    print(*children(), flush=True)
    time.sleep(120)

recipe = toy_recipe({out!r}, 50, data_workers=2)
train(Prepared(recipe, at={{4: say}}), recipe)
"""


def test_no_worker_outlives_a_killed_run(tmp_path):
    program = PROGRAM.format(tests=str(Path(__file__).parent), out=str(tmp_path / "run"))
    tests = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": tests}
    )
    assert process.stdout is not None
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2 and not any(map(gone, workers))
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: all(map(gone, workers)))
    recipe = toy_recipe(tmp_path / "run", 9)
    toy = Prepared(recipe)
    train(toy, recipe)  # the folder is free
    assert toy.steps_seen[0] == 3


def test_how_many_workers(monkeypatch):
    monkeypatch.setattr(ahead, "cores", lambda: 16)
    cuda = torch.device("cuda")
    assert number_of_workers(None, cuda) == 8
    assert number_of_workers(None, CPU) == 0
    assert number_of_workers(5, CPU) == 5
    assert number_of_workers(0, cuda) == 0
    assert number_of_workers(None, cuda, "it cannot") == 0
    with refused("unsupported", "data_workers is 2", "it cannot", "data_workers=0"):
        number_of_workers(2, cuda, "it cannot")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert number_of_workers(None, cuda) == 3
    monkeypatch.setattr(ahead, "cores", lambda: 1)
    assert number_of_workers(None, cuda) == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert number_of_workers(None, cuda) == 0
    with refused("unsupported", "forked"):
        number_of_workers(1, CPU)


def test_workers_for_an_objective_without_prepared_batches_are_refused(tmp_path):
    recipe = toy_recipe(tmp_path, data_workers=1)
    with refused("unsupported", "data_workers is 1"):
        train(Toy(recipe), recipe)
    with refused("out-of-range", "data_workers"):
        toy_recipe(tmp_path, data_workers=-1)


def test_conditions_that_networks_compute_stay_in_the_step(settings):
    values = {**settings("icons"), "conditions": ("canny", "depth")}
    source = build_recipe(values).source(build_recipe(values))
    assert not source.prepares_ahead
    assert build_recipe(settings("icons")).source(build_recipe(settings("icons"))).prepares_ahead


def test_everything_in_a_batch_is_moved(settings):
    objective = objective_of(build_recipe(settings("pairs")))
    assert isinstance(objective, ControlObjective)
    made = on_device(objective.prepare(0), torch.device("meta"))
    assert {tensor.device.type for tensor in tensors_of(made)} == {"meta"}
    assert made.drawn.t.shape == (2,) and made.condition == "identity"
