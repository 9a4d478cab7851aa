"""Every benchmark at toy size: what it compares is the same thing. Nothing here looks at a clock."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import adapter_training
import busy_machine
import controlnet_sampling
import controlnet_training
import ctrlora_sampling
import finetuning_cost
import measure
import memory
import startup
import what_pays


@pytest.fixture
def toy(base_folder):
    """Arguments for the tiny base."""

    def made(**changes):
        settings = {"base": str(base_folder), "size": 64, "device": "cpu", "dtype": "fp32", "rounds": 1, "warm_up": 0}
        settings |= {"random_weights": False, "out": None, "graphs": "auto", "compiled": False}
        return argparse.Namespace(**{**settings, **changes})

    return made


def test_ways_take_turns_and_ratios_are_those_of_the_rounds(monkeypatch):
    clock, calls = iter(range(1000)), []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock) ** 2)
    ways = {"a": lambda number: calls.append(f"a{number}"), "b": lambda number: calls.append(f"b{number}")}
    turns = measure.take_turns(ways, 2, warm_up=1)
    assert calls == ["a0", "b0", "b1", "a1", "a2", "b2"]
    a, b = turns.seconds["a"], turns.seconds["b"]
    assert len(a) == len(b) == 2
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    assert turns.ratio("a", "b") == {"median": sum(ratios) / 2, "lowest": min(ratios), "highest": max(ratios)}


def test_a_result_names_setting_machine_and_versions(tmp_path, toy, capsys):
    path = measure.finish("toy", toy(out=tmp_path / "a.json"), [{"seconds": 1.0}], how="counted")
    made = json.loads(path.read_text())
    assert made["machine"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert made["machine"]["processor"] and made["machine"]["threads"] == torch.get_num_threads()
    assert (made["how"], made["setting"]["size"], made["cases"]) == ("counted", 64, [{"seconds": 1.0}])


@pytest.mark.parametrize(("count", "seeds"), [(1, 1), (2, 3)])
def test_every_way_of_sampling_with_ctrlora_draws_the_same(tiny_base, count, seeds):
    controls, images, prompt = ctrlora_sampling.made_up(tiny_base, count, 64, rank=2)
    settings = {"seeds": seeds, "size": 64, "steps": 3, "rounds": 1, "warm_up": 0}
    case = ctrlora_sampling.measure_case(tiny_base, controls, images, prompt, **settings)
    assert case["largest_change_by_control"] > 1e-3
    assert max(case["largest_difference_to_plan"].values()) < 1e-4 * max(1, case["largest_change_by_control"])
    assert set(case["seconds"]) == {"base", "reference", "plan", "again"}


def test_sampling_with_a_controlnet_draws_what_diffusers_draws(toy, monkeypatch):
    def made_up(base):
        return controlnet_sampling.made_up(base, 64)

    monkeypatch.setattr(controlnet_sampling, "shipped", made_up)
    cases = controlnet_sampling.measure_all(toy(seeds=2, steps=4))
    assert [case["case"] for case in cases] == ["always", "first half", "conditional half"]
    for case in cases:
        assert case["largest_difference_of_images"] < 1e-3
        assert case["largest_change_by_control"] > 10 * case["largest_difference_of_images"]


def test_adapter_training_has_the_losses_of_the_reference(tiny_base):
    case = adapter_training.measure_steps(tiny_base, size=64, batch=2, rank=2, rounds=4, warm_up=0)
    assert_same_curves(case)


def test_controlnet_training_has_the_losses_of_diffusers_script(tiny_base):
    case = controlnet_training.measure_steps(tiny_base, size=64, batch=2, rounds=4, warm_up=0)
    assert_same_curves(case)


def assert_same_curves(case):
    assert len(case["losses"]["ours"]) == len(set(case["losses"]["ours"])) == 4
    assert case["largest_difference_of_losses"] < 1e-5
    assert case["reference_to_ours"]["median"] > 0


def test_memory_is_counted_as_it_is():
    with memory.Live() as live:
        a = torch.zeros(2**18, requires_grad=True)
        b = a * 2
        c = b.exp()  # what it saves for the backward pass stays
        d = c.exp()
        del b, c
        assert live.now == 3 * 2**20  # a, c and d
        d.sum().backward()
        assert a.grad is not None
        del d
        assert live.now == 2 * 2**20
    assert live.peak >= 4 * 2**20


def test_switches_save_memory(tiny_base, monkeypatch):
    import tiny

    monkeypatch.setattr(memory, "random_base", lambda name, dtype: tiny.build_tiny_base().to("meta"))
    reference, plain, everything = (
        memory.counted("tiny", way, size=64, batch=1, rank=2) for way in (memory.REFERENCE, memory.PLAIN, memory.ALL)
    )
    assert reference["peak"] > plain["peak"] > everything["peak"]
    assert reference["weights"] > 1.9 * plain["weights"]  # frozen ones take half, encoders nothing
    assert reference["gradients"] > plain["gradients"] == everything["gradients"]
    assert everything["rest"] < plain["rest"]


def test_graphs_keep_the_activations_of_the_base(tiny_base, monkeypatch):
    import tiny

    monkeypatch.setattr(memory, "random_base", lambda name, dtype: tiny.build_tiny_base().to("meta"))
    graphed = memory.replace(memory.PLAIN, graphs=True)
    without, with_graphs = (memory.counted("tiny", way, size=64, batch=2, rank=2) for way in (memory.PLAIN, graphed))
    for part in ("weights", "gradients", "optimiser"):
        assert with_graphs[part] == without[part]
    assert without["rest"] < with_graphs["rest"] < 2.5 * without["rest"]


def test_fine_tuning_the_base_trains_all_of_its_unet(tiny_base, monkeypatch):
    import tiny

    monkeypatch.setattr(memory, "random_base", lambda name, dtype: tiny.build_tiny_base().to("meta"))
    tuned, controlled = (memory.counted("tiny", way, size=64, batch=1, rank=2) for way in finetuning_cost.WAYS[:2])
    weights = sum(each.numel() for each in tiny_base.unet.parameters()) * 4 / memory.MEBI
    assert tuned["gradients"] == pytest.approx(weights)
    assert tuned["optimiser"] == pytest.approx(2 * weights, rel=0.01)
    assert controlled["gradients"] < weights  # half of the UNet and its own layers
    assert controlled["weights"] > tuned["weights"]


def test_memory_of_a_known_base_is_counted_without_its_weights():
    counted = memory.counted("sd15", finetuning_cost.CONTROLNET, size=64, batch=1, rank=1)
    with torch.device("meta"):
        base = memory.random_base("sd15", torch.float32)
    frozen = sum(each.numel() for network in base.networks for each in network.parameters()) * 4 / memory.MEBI
    control = 361_279_120 * 4 / memory.MEBI
    assert counted["gradients"] == pytest.approx(control)
    assert counted["weights"] == pytest.approx(frozen + control, rel=1e-3)
    assert counted["peak"] > counted["weights"] + counted["gradients"] + counted["optimiser"]


def test_the_cost_of_a_control_is_a_ratio_to_fine_tuning(toy):
    args = toy(batch=1, rank=2)
    turns = finetuning_cost.times(args, bf16=False)
    assert set(turns.seconds) == {"fine-tuning", "ControlNet", "CtrLoRA adapter"}
    assert all(len(each) == args.rounds for each in turns.seconds.values())


def test_help_starts(capsys):
    case = startup.measure_all(1, 0, only=["--help"])
    assert set(case["seconds"]) == {"--help"}
    assert case["seconds"]["--help"]["median"] > 0


def test_what_pays_compares_outputs(toy):
    rows = what_pays.measure_all(toy(batch=2, rank=2, only=None))
    names = {row["switch"] for row in rows}
    assert {"channels_last", "fused optimiser", "LoRA folded", "guidance in one batch"} <= names
    for row in rows:
        assert row["largest_relative_difference"] < (0.1 if "bf16" in row["switch"] else 1e-4), row


def test_what_a_busy_machine_costs_is_measured_beside_a_busy_process():
    case = busy_machine.measure_all(1, 0, batch=1, steps=1, demo=False, only=["one thread"])
    assert set(case["busy / alone"]) == {"train, one thread"}


def test_calls_of_a_unet_are_timed_beside_a_busy_process():
    case = busy_machine.measure_calls("nano", 32, calls=1, rounds=1, only=["one thread"])
    assert set(case["seconds"]) == {"call, one thread, alone", "call, one thread, busy"}
    assert min(case["seconds"].values()) > 0 and case["busy / alone"]["call, one thread"] > 0
