"""Steps read nothing from the device; losses are read when they are logged, and always before a state is saved."""

from __future__ import annotations

import signal

import pytest
import torch
from test_data_ahead import settings  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import Toy, toy_recipe

from controlkit.controls.ctrlora import BaseControlNet
from controlkit.controls.inputs import encode_images
from controlkit.training import trainer
from controlkit.training.readings import Readings
from controlkit.training.recipes import build_recipe
from controlkit.training.run import objective_of
from controlkit.training.state import load_state
from controlkit.training.trainer import train
from refusals import refused

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__array__")


class HostReads(TorchDispatchMode):
    """Records operations that read a number from a tensor."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("data", ["icons", "pairs", "multigen", "base", "autoencoder"])
def test_a_step_reads_nothing_from_the_device(data, settings, monkeypatch):  # noqa: F811
    """Data comes from a worker, so that all reads in this process would be of the device."""
    changes = {"snr_gamma": 5.0} if data != "autoencoder" and data != "base" else {}
    more = {"ema": 0.9, "steps": 9, "save_every": 100, "log_every": 100, "data_workers": 1}
    recipe = build_recipe({**settings(data), **changes, **more})
    objective = objective_of(recipe)
    found, steps = [], []
    step = trainer._Loop._step

    def watched(self, number):
        with HostReads() as mode, monkeypatch.context() as patch:
            for name in READS:
                original = getattr(torch.Tensor, name)

                def counted(*given, _name=name, _original=original, **named):
                    found.append(_name)
                    return _original(*given, **named)

                patch.setattr(torch.Tensor, name, counted)
            step(self, number)
        found.extend(mode.found)
        steps.append(number)

    monkeypatch.setattr(trainer._Loop, "_step", watched)
    monkeypatch.setattr(trainer, "_READ_SECONDS", 1e9)
    reads = []
    read = Readings.read
    monkeypatch.setattr(Readings, "read", lambda self: reads.append(len(steps)) or read(self))
    train(objective, recipe)
    assert len(steps) == 9
    assert found == []
    assert reads == [2, 6, 9]  # two for the estimate of the time, and the last step's


def test_numbers_come_back_by_step():
    readings = Readings()
    assert readings.read() == []
    by_time = torch.arange(6.0).reshape(3, 2)
    readings.add(4, torch.tensor(1.5), torch.tensor(2.5), by_time)
    readings.add(5, torch.tensor([3.5]), torch.tensor(4.5), None)
    first, second = readings.read()
    assert (first.step, first.loss, first.norm) == (4, 1.5, 2.5)
    assert first.by_time == by_time.tolist()
    assert (second.step, second.loss, second.norm, second.by_time) == (5, 3.5, 4.5, None)
    assert readings.read() == []


def nan(loss):
    return loss * float("nan")


def bad_gradient(loss):
    return loss + (loss - loss.detach()).sqrt()


@pytest.mark.parametrize(("what", "word"), [(nan, "the loss is nan"), (bad_gradient, "the gradient norm is nan")])
@pytest.mark.parametrize("log_every", [1, 4, 1000])
def test_numbers_that_are_not_finite_end_the_run_before_a_state_is_saved(tmp_path, what, word, log_every):
    recipe = toy_recipe(tmp_path, 20, log_every=log_every, save_every=6, preview_every=1000)
    with refused("diverged", word, "step 9", "of step 6", tmp_path / "diverged.json"):
        train(Toy(recipe, {8: what}), recipe)
    state = load_state(tmp_path / "state.safetensors")
    assert state.step == 6
    assert all(value.isfinite().all() for value in state.weights.values())
    again = Toy(recipe)
    train(again, recipe)
    assert again.steps_seen == list(range(6, 20))


def test_slow_steps_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "_READ_SECONDS", 0.0)
    recipe = toy_recipe(tmp_path, 20, log_every=1000, save_every=1000, preview_every=1000)
    toy = Toy(recipe, {8: nan})
    with refused("diverged", "step 9"):
        train(toy, recipe)
    assert toy.steps_seen == list(range(9))


def test_a_stop_reads_before_it_saves(tmp_path):
    def ctrl_c(loss):
        signal.raise_signal(signal.SIGINT)
        return loss

    recipe = toy_recipe(tmp_path, 20, log_every=1000, save_every=1000, preview_every=1000)
    with refused("diverged", "step 9"):
        train(Toy(recipe, {8: nan, 10: ctrl_c}), recipe)
    assert not (tmp_path / "state.safetensors").exists()


def test_the_watch_sees_every_step_however_rarely_it_is_read(tmp_path):
    states = []
    for log_every in (1, 7):
        recipe = toy_recipe(tmp_path / str(log_every), 60, log_every=log_every, save_every=1000, preview_every=1000)
        train(Toy(recipe), recipe)
        states.append(load_state(tmp_path / str(log_every) / "state.safetensors"))
    assert states[0].loss_monitor == states[1].loss_monitor
    for name, value in states[0].weights.items():
        assert torch.equal(states[1].weights[name], value)


def test_the_range_of_condition_images_is_checked_unless_they_were_bytes(tiny_base):
    control = BaseControlNet.for_base(tiny_base)
    images = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encode_images(control, images, tiny_base), control.encode(images.float() / 255, tiny_base))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        encode_images(control, images.float() / 127.5 - 1, tiny_base)
