"""The base as a graph trains what it trains eagerly; here with a stand-in for CUDA's capture, on the CPU.

The stand-in has the contract of `torch.cuda.make_graphed_callables`: inputs, outputs and gradients live in fixed
buffers, and a replay runs what the capture ran.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from controlkit.data.pairs import write_pairs
from controlkit.nano import base_objective
from controlkit.sampling import graphs as sampling_graphs
from controlkit.training import control_objective, graphs
from controlkit.training.graphs import Graphs
from controlkit.training.objective import Objective
from controlkit.training.previews import preview_images
from controlkit.training.recipes import build_recipe
from controlkit.training.run import objective_of, run_recipe
from refusals import refused

CPU = torch.device("cpu")


class StandIn:
    """Captures functions; `captured` has the shapes of the inputs of each."""

    def __init__(self):
        self.captured = []
        self.replays = 0

    def __call__(self, function, inputs, *, allow_unused_input):
        assert allow_unused_input
        self.captured.append([tuple(tensor.shape) for tensor in inputs])
        is_module = isinstance(function, nn.Module)
        run = function.forward if is_module else function
        weights = tuple(function.parameters()) if is_module else ()
        gradients = [torch.empty_like(tensor) for tensor in (*inputs, *weights)]
        with torch.no_grad():
            output = run(*inputs).clone()

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *given):
                for buffer, tensor in zip(inputs, given[: len(inputs)], strict=True):
                    buffer.copy_(tensor)
                self.replays += 1
                with torch.enable_grad():
                    made = run(*inputs)
                Replay.made = made
                output.copy_(made)
                return output.detach()

            @staticmethod
            def backward(ctx, gradient):
                surface = [tensor for tensor in (*inputs, *weights) if tensor.requires_grad]
                made = iter(torch.autograd.grad(Replay.made, surface, gradient, allow_unused=True))
                found = []
                for buffer, tensor in zip(gradients, (*inputs, *weights), strict=True):
                    value = next(made) if tensor.requires_grad else None
                    found.append(None if value is None else buffer.copy_(value).detach())
                return tuple(found)

        def replay(*given):
            assert [tuple(tensor.shape) for tensor in given] == [tuple(tensor.shape) for tensor in inputs]
            wanted = [tensor.requires_grad for tensor in inputs]
            assert [tensor.requires_grad for tensor in given] == wanted
            return Replay.apply(*given, *weights)

        if not is_module:
            return replay
        function.forward = replay
        return function


@pytest.fixture
def capture(monkeypatch):
    stand_in = StandIn()
    for module in (control_objective, base_objective):
        monkeypatch.setattr(module, "Graphs", functools.partial(Graphs, capture=stand_in))
    return stand_in


@pytest.fixture
def settings(tmp_path, base_folder, icons_file):
    rng = np.random.default_rng(0)
    images = [np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((64, 64))) for _ in "1234"]
    write_pairs(tmp_path / "pairs", [(255 - image, image, f"thing {place}") for place, image in enumerate(images)])
    common = {"steps": 3, "batch_size": 2, "device": "cpu", "preview_every": 100, "learning_rate": 0.01}

    def of(system, **changes):
        out = str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        if system == "base":
            base = {"icons": str(icons_file), "start": str(base_folder), "variants": 2, "ema": 0.9}
            return build_recipe({**common, "out": out, "system": system, **base, **changes})
        data = {"icons": str(icons_file), "variants": 1} if system == "ctrlora-base" else {}
        data = data or {"pairs": str(tmp_path / "pairs")}
        names = {"conditions": ("canny", "pixel"), "rank": 2} if system == "ctrlora-base" else {}
        control = {"base": str(base_folder), "score_pictures": 1, "warmup_steps": 0}
        return build_recipe({**common, "out": out, "system": system, **control, **data, **names, **changes})

    return of


@pytest.mark.parametrize(
    ("system", "changes"),
    [
        ("controlnet", {}),
        ("controlnet", {"precision": "bf16", "gradient_accumulation_steps": 2}),
        ("t2i-adapter", {}),
        ("ctrlora-base", {}),
        ("base", {}),
        ("base", {"precision": "bf16"}),
    ],
)
def test_a_run_over_a_graph_ends_with_the_weights_of_an_eager_one(system, changes, settings, capture):
    eager = settings(system, graphs="off", **changes)
    assert run_recipe(eager).base_runs == "eager: graphs is off"
    assert not capture.captured
    graph = settings(system, graphs="on", **changes)
    assert run_recipe(graph).base_runs == "graph"
    # One graph for all steps, and, of several conditions, for all of them.
    assert len(capture.captured) == 1
    assert capture.replays == 3 * changes.get("gradient_accumulation_steps", 1)
    mine, theirs = (load_file(Path(recipe.out) / "state.safetensors") for recipe in (eager, graph))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_casts_in_a_graph_are_not_cached(settings, capture):
    objective = objective_of(settings("controlnet", precision="bf16"))
    inside = []
    predict = objective.base.unet.forward
    objective.base.unet.forward = lambda *given, **named: (
        inside.append(torch.is_autocast_cache_enabled()) or predict(*given, **named)
    )
    with torch.autocast("cpu", torch.bfloat16):
        objective.loss(0).backward()
        assert torch.is_autocast_cache_enabled()
    assert inside and not any(inside)


@pytest.mark.parametrize(
    ("system", "changes", "word"),
    [
        ("controlnet", {"gradient_checkpointing": True}, "gradient_checkpointing"),
        ("controlnet", {"sd_locked": False}, "part of the base"),
        ("controlnet-xs", {"size_ratio": 0.5}, "taps"),
        ("base", {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
    ],
)
def test_where_there_can_be_no_graph_auto_runs_eagerly_and_on_is_refused(system, changes, word, settings, capture):
    objective = objective_of(settings(system, **changes))
    assert objective.base_runs.startswith("eager: ") and word in objective.base_runs
    objective.loss(0).backward()
    assert not capture.captured
    with refused("unsupported", "graphs is on", word, "graphs=auto"):
        objective_of(settings(system, graphs="on", **changes))


def test_without_cuda_there_are_no_graphs(settings):
    assert "device is cpu" in objective_of(settings("controlnet")).base_runs
    with refused("unsupported", "device is cpu"):
        objective_of(settings("controlnet", graphs="on"))
    with refused("unknown-name", "graphs", "auto, on or off"):
        settings("controlnet", graphs="maybe")


def test_many_shapes_run_eagerly_and_say_so(capsys):
    def function(x):
        return x * 2

    for setting in ("auto", "on"):
        stand_in = StandIn()
        made = Graphs(setting, CPU, bf16=False, capture=stand_in)
        run = made.function(function)
        for size in range(1, graphs._MOST_SHAPES + 1):
            x = torch.ones(size, requires_grad=True)
            for _ in range(2):
                assert torch.equal(run(x), x * 2)
        assert made.words == "graph" and len(stand_in.captured) == graphs._MOST_SHAPES
        x = torch.ones(100)
        if setting == "on":
            with refused("unsupported", "different shapes"):
                run(x)
            continue
        for _ in range(2):
            assert torch.equal(run(x), x * 2)
        assert "different shapes" in made.words
        assert capsys.readouterr().err.count("different shapes") == 1
        with torch.no_grad():
            assert torch.equal(run(torch.ones(1)), torch.full((1,), 2.0))


def test_a_capture_that_fails_leaves_the_function_eager(capsys):
    def fails(_function, _inputs, *, allow_unused_input):
        raise RuntimeError("operation not permitted when stream is capturing")

    run = Graphs("auto", CPU, bf16=False, capture=fails).function(lambda x: x + 1)
    for _ in range(2):
        assert run(torch.zeros(1)).item() == 1
    assert capsys.readouterr().err.count("not permitted") == 1
    with refused("unsupported", "not permitted"):
        Graphs("on", CPU, bf16=False, capture=fails).function(lambda x: x + 1)(torch.zeros(1))


def test_an_objective_without_a_base_says_nothing():
    class Plain(Objective):
        loss = preview = save = None

    assert Plain.base_runs.fget(None) == ""


def test_previews_capture_no_graphs_that_would_hold_memory_beside_the_training(tiny_base, tiny_control, monkeypatch):
    graphs = sampling_graphs.Graphs(lambda *_: pytest.fail("captured"), device="cpu")
    monkeypatch.setattr(sampling_graphs, "graphs_of", lambda base: graphs)
    hint = tiny_control.encode(torch.zeros(1, 3, 64, 64), tiny_base)
    assert len(preview_images(tiny_base, tiny_control, hint, ["red apple"])) == 1
