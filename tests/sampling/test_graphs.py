"""Sampling with graphs: the images of eager calls, one capture for each shape, and words where there is none."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fake_graphs import CalledAgain, OnePool, graphs_on_cpu

from controlkit.controls.control import Acts
from controlkit.controls.inputs import encode_images, takes_one_image
from controlkit.controls.registry import registry
from controlkit.images import to_tensor
from controlkit.sampling.generate import generate
from controlkit.sampling.graphs import PAYS_FROM, CudaCapture, GraphReport, Graphs, NetworkCalls, graphs_of, tallied
from controlkit.sampling.loras import merged
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample
from controlkit.sampling.start_image import StartImage
from refusals import refused
from tiny import (
    OF_TRANSFORMERS,
    build_tiny_flux,
    build_tiny_flux2,
    build_tiny_qwen_image,
    build_tiny_sana,
    build_tiny_sd3,
    build_tiny_sdxl,
    build_tiny_z_image,
    tiny_of_known,
    unet_systems,
)

SETTINGS = {"prompt": "red apple", "seeds": (3, 4), "steps": 4, "guidance": 3.0}


@pytest.fixture
def use(tiny_base, tiny_control, condition_image):
    return ActiveControl(tiny_control, tiny_control.encode(to_tensor([condition_image]), tiny_base), weight=0.8)


def images(base, graphs=None, mode="on", **changes):
    """Images, and the report of the calls; without `graphs` all calls are eager."""
    calls = NetworkCalls(base, "off" if graphs is None else mode, graphs)
    made = torch.cat(list(sample(base, calls=calls, **{**SETTINGS, **changes})))
    return made, calls.report


def assert_equal(base, graphs, **changes) -> GraphReport:
    """Images with graphs are those without, bit for bit; returns the report of the calls."""
    made, report = images(base, graphs, **changes)
    assert torch.equal(made, images(base, **changes)[0])
    return report


def test_a_base_without_control(tiny_base):
    graphs = graphs_on_cpu()
    report = assert_equal(tiny_base, graphs)
    assert (report.captured, report.graph, report.eager.total()) == (1, 4, 0)
    assert (assert_equal(tiny_base, graphs, seeds=(8, 9)).captured, len(graphs)) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "guidance"),
    [({}, 1.0), ({"start": 0.25, "end": 0.75}, 3.0), ({"conditional_only": True, "weight": 0.3}, 3.0)],
)
def test_a_control_that_reads_the_noise(tiny_base, use, changes, guidance):
    """The base and the control have a graph each; the base has another where the control does not act."""
    report = assert_equal(tiny_base, graphs_on_cpu(), uses=[replace(use, **changes)], guidance=guidance)
    assert report.captured == (3 if "end" in changes else 2)
    assert report.graph == (6 if "end" in changes else 8)


def test_weights_modes_and_masks_need_no_capture(tiny_base, tiny_control, use):
    graphs = graphs_on_cpu()
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20:] = 1
    assert_equal(tiny_base, graphs, uses=[use])
    for settings in (
        {"weight": 0.4},
        {"weight": (0.1, 0.2, 0.3, 0.4, 0.5)},
        {"mask": mask},
        {"layers": (1, 0.5, 0, 0.5, 1)},
        {"mode": "soft"},
    ):
        mode = settings.pop("mode", "balanced")
        other = ActiveControl.in_mode(mode, tiny_base, control=tiny_control, hint=use.hint.flip(-1), **settings)
        assert assert_equal(tiny_base, graphs, uses=[other]).captured == 0


@pytest.mark.parametrize("capture", [CalledAgain, OnePool])
def test_several_controls_and_batches(tiny_base, use, capture):
    second = replace(use, control=copy.deepcopy(use.control), end=0.8, weight=-0.5)
    settings = {"uses": [use, second], "seeds": range(5), "batch_size": 2}
    report = assert_equal(tiny_base, graphs_on_cpu(capture()), **settings)
    # At both sizes: the base and two controls.
    assert (report.captured, report.eager.total()) == (6, 0)


@pytest.mark.parametrize(
    "kind",
    [
        name
        for name, each in unet_systems().items()
        if each.companion is None and takes_one_image(each) and len(each.inputs) == 1
    ],
)
def test_every_system_of_one_image(kind, sd1_scheduled_base, condition_image):
    base = sd1_scheduled_base
    system = registry()[kind]
    options = {"size_ratio": 0.5} if "taps" in str(system.acts).lower() else {}
    torch.manual_seed(1)
    control = system.for_base(base, **options).eval().requires_grad_(False)
    use = ActiveControl(control, control.encode(to_tensor([condition_image]), base), end=0.8)
    report = assert_equal(base, graphs_on_cpu(), uses=[use], mode="auto", steps=10)
    assert bool(report.graph) != bool(options) and ("taps" in str(report)) == bool(options)


@pytest.mark.parametrize("system", OF_TRANSFORMERS)
def test_a_control_of_a_transformer(system, condition_image):
    base = tiny_of_known(OF_TRANSFORMERS[system])
    control = registry()[system].for_base(base).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in control.parameters():
            if not parameter.any():  # what joins a new one to the base
                parameter.normal_(std=0.1)
    use = ActiveControl(control, encode_images(control, to_tensor([condition_image]), base), end=0.8)
    report = assert_equal(base, graphs_on_cpu(), uses=[use], mode="auto", steps=10)
    if Acts.TAPS in control.acts:
        assert not report.graph and "taps" in str(report)
    else:
        assert report.captured == 2  # the base and the control


@pytest.mark.parametrize(
    "build",
    [
        build_tiny_sdxl,
        build_tiny_sd3,
        build_tiny_flux,
        build_tiny_flux2,
        build_tiny_z_image,
        build_tiny_qwen_image,
        build_tiny_sana,
    ],
)
def test_other_families(build):
    assert assert_equal(build(), graphs_on_cpu(), width=64, height=64).graph == 4


@pytest.mark.parametrize("sampler", ["unipc", "dpm++-2m-sde", "heun", "plms", "euler-a"])
def test_samplers_keep_earlier_predictions(sampler, sd1_scheduled_base):
    assert assert_equal(sd1_scheduled_base, graphs_on_cpu(CalledAgain()), sampler=sampler).captured == 1


def test_an_image_to_start_from(sd1_scheduled_base):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    start = StartImage(pixels=torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64), strength=0.9, mask=mask)
    assert assert_equal(sd1_scheduled_base, graphs_on_cpu(), start=start).captured == 1


def test_weights_changed_in_place_are_read_by_the_next_replay(tiny_base, use):
    base, graphs = copy.deepcopy(tiny_base), graphs_on_cpu()
    before, _ = images(base, graphs, uses=[use])
    with torch.no_grad():
        base.unet.conv_in.weight.mul_(1.5)
    assert assert_equal(base, graphs, uses=[use]).captured == 0
    assert not torch.equal(images(base, graphs, uses=[use])[0], before)
    with merged(base, [], [("lora", 1.0)]):
        assert assert_equal(base, graphs, uses=[use]).captured == 0


def test_new_weights_are_captured_again(tiny_base, use):
    base, graphs = copy.deepcopy(tiny_base), graphs_on_cpu(CalledAgain())
    images(base, graphs, uses=[use])
    base.unet.conv_in.weight = torch.nn.Parameter(base.unet.conv_in.weight * 1.5, requires_grad=False)
    assert assert_equal(base, graphs, uses=[use]).captured == 1  # the control's own graph remains
    other = replace(use, control=copy.deepcopy(use.control))
    assert assert_equal(base, graphs, uses=[other]).captured == 1


def test_few_steps_are_eager_until_calls_have_added_up(tiny_base):
    graphs = graphs_on_cpu(CalledAgain())
    settings = {"mode": "auto", "steps": PAYS_FROM // 2, "seeds": [1]}
    first = assert_equal(tiny_base, graphs, **settings)
    assert (first.graph, dict(first.eager)) == (0, {"too few steps to pay for a capture": PAYS_FROM // 2})
    assert "too few steps" in str(first)
    assert assert_equal(tiny_base, graphs, **settings).graph == PAYS_FROM // 2
    assert assert_equal(tiny_base, graphs_on_cpu(CalledAgain()), **{**settings, "mode": "on"}).graph == PAYS_FROM // 2
    # Later batches of the same size count.
    assert (
        assert_equal(
            tiny_base, graphs_on_cpu(CalledAgain()), **{**settings, "seeds": [1, 2, 3], "batch_size": 1}
        ).captured
        == 1
    )


def test_the_last_used_graphs_are_kept(tiny_base):
    graphs = graphs_on_cpu(CalledAgain(), limit=2)
    sizes = [(64, 64), (64, 32), (32, 64)]
    for width, height in sizes:
        assert assert_equal(tiny_base, graphs, width=width, height=height).captured == 1
    assert len(graphs) == 2
    assert assert_equal(tiny_base, graphs, width=64, height=32).captured == 0
    assert assert_equal(tiny_base, graphs, width=64, height=64).captured == 1
    assert assert_equal(tiny_base, graphs, width=64, height=32).captured == 0


def test_graphs_beyond_the_limit_of_memory_are_dropped(tiny_base):
    graphs = graphs_on_cpu(CalledAgain(bytes_each=2**20), megabytes=1.5)
    for count, width in ((1, 64), (2, 32), (1, 48)):
        report = assert_equal(tiny_base, graphs, width=width)
        assert (len(graphs), report.bytes // 2**20) == (count, count)
    assert "graphs hold 1 MiB" in str(report) and 1 <= report.to_json()["mib"] < 1.1


def test_memory_of_a_dropped_graph_stays_in_the_pool(tiny_base):
    graphs = graphs_on_cpu(CalledAgain(bytes_each=2**20), limit=1)
    reports = [assert_equal(tiny_base, graphs, width=width) for width in (64, 32)]
    assert len(graphs) == 1 and [report.bytes // 2**20 for report in reports] == [1, 2]
    graphs.clear()
    assert graphs.bytes == 0


def test_the_branches_of_guidance_do_not_share_memory_where_each_has_its_own_call(sd1_scheduled_base, condition_image):
    base, graphs = sd1_scheduled_base, graphs_on_cpu(OnePool())
    torch.manual_seed(0)
    control = registry()["controlnet"].for_base(base, sd_locked=False).eval().requires_grad_(False)
    for parameter in control.parameters():
        parameter += 0.02 * torch.randn(parameter.shape)
    hint = control.encode(to_tensor([condition_image]), base)
    use = ActiveControl(control, hint, conditional_only=True)
    for guidance in (1.0, 3.0):  # the graph with the control's decoder is the first, and replayed last
        assert assert_equal(base, graphs, uses=[use], guidance=guidance).eager.total() == 0


class FakeCuda:
    """What `CudaCapture` calls of `torch.cuda`, on the CPU: captured functions run once, and nothing is replayed."""

    class CUDAGraph:
        def replay(self):
            """Nothing."""

    def __init__(self, monkeypatch):
        self.pools, self.current, self.fails = [], "own", False
        monkeypatch.setattr(torch.cuda, "CUDAGraph", self.CUDAGraph)
        for name in ("synchronize", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
        monkeypatch.setattr(torch.cuda, "Stream", torch.cuda.current_stream)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    @contextmanager
    def stream(self, stream):
        before = self.current
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, *, pool, capture_error_mode):
        self.pools.append(pool)
        self.current = "of the capture"
        yield
        if self.fails:  # as in torch, where the end of an invalid capture raises before the stream is restored
            raise RuntimeError("operation not permitted when stream is capturing")
        self.current = "own"


def test_captures_share_a_pool_while_one_of_its_graphs_is_alive_and_a_failed_one_ends_it(monkeypatch):
    cuda, capture = FakeCuda(monkeypatch), CudaCapture()
    inputs = {"x": torch.zeros(1)}
    kept = [capture(dict, inputs), capture(dict, inputs)]
    assert cuda.pools[0] is cuda.pools[1]
    del kept[0]
    kept.append(capture(dict, inputs))
    assert cuda.pools[2] is cuda.pools[0]
    kept.clear()
    kept.append(capture(dict, inputs))
    assert cuda.pools[3] is not cuda.pools[0]
    cuda.fails = True
    with pytest.raises(RuntimeError, match="capturing"):
        capture(dict, inputs)
    cuda.fails = False
    assert cuda.current == "own"
    kept.append(capture(dict, inputs))
    assert cuda.pools[4] is cuda.pools[3] and cuda.pools[5] is not cuda.pools[3]


def test_a_failed_capture_is_not_tried_again(tiny_base):
    class Failing:
        tried = 0

        def __call__(self, function, inputs):
            self.tried += 1
            raise RuntimeError("operation not permitted when stream is capturing\nlater lines")

    capture = Failing()
    graphs = graphs_on_cpu(capture)
    for _ in range(2):
        report = assert_equal(tiny_base, graphs, mode="auto", steps=8)
        assert dict(report.eager) == {"capture failed: operation not permitted when stream is capturing": 8}
    assert capture.tried == 1
    with refused("unsupported", "not permitted", "auto"):
        images(tiny_base, graphs_on_cpu(Failing()))


def test_networks_in_training_and_hooked_ones_are_eager(tiny_base, use):
    settings = {"mode": "auto", "steps": 8}
    control = copy.deepcopy(use.control).requires_grad_(True)
    report = assert_equal(tiny_base, graphs_on_cpu(CalledAgain()), uses=[replace(use, control=control)], **settings)
    assert dict(report.eager) == {"a network in training": 8} and report.graph == 8
    seen = []
    handle = tiny_base.unet.mid_block.register_forward_hook(lambda *_: seen.append(1))
    report = assert_equal(tiny_base, graphs_on_cpu(CalledAgain()), **settings)
    assert "hooks on a UNetMidBlock2DCrossAttn" in str(report) and len(seen) == 16
    with refused("unsupported", "hooks"):
        images(tiny_base, graphs_on_cpu(CalledAgain()), mode="on")
    handle.remove()


def test_without_cuda_all_is_eager_and_on_is_refused(tiny_base):
    made, report = images(tiny_base, Graphs(), mode="auto")
    assert torch.equal(made, images(tiny_base)[0])
    assert (report.graph, dict(report.eager)) == (0, {"graphs need CUDA, the device is cpu": 4})
    with refused("unsupported", "CUDA", "cpu", "auto"):
        NetworkCalls(tiny_base, "on")
    with refused("unknown-name", "sometimes"):
        NetworkCalls(tiny_base, "sometimes")


def test_low_memory_has_graphs_only_if_asked(tiny_base):
    for mode, expected in (("auto", 0), ("on", 4)):
        calls = NetworkCalls(tiny_base, mode, graphs_on_cpu(CalledAgain()), low_memory=True)
        list(sample(tiny_base, calls=calls, **SETTINGS))
        assert (calls.report.graph, calls.report.eager["low memory"]) == (expected, 4 - expected)


def test_on_is_refused_for_taps(sd1_scheduled_base, condition_image):
    control = registry()["controlnet-xs"].for_base(sd1_scheduled_base, size_ratio=0.5).eval().requires_grad_(False)
    use = ActiveControl(control, control.encode(to_tensor([condition_image]), sd1_scheduled_base))
    with refused("unsupported", control.title, "taps"):
        images(sd1_scheduled_base, graphs_on_cpu(CalledAgain()), mode="on", uses=[use])
    graphs = graphs_on_cpu(CalledAgain())
    assert images(sd1_scheduled_base, graphs, uses=[replace(use, weight=0)])[1].graph == 4


def test_graphs_are_kept_with_the_base(tiny_base):
    base = copy.deepcopy(tiny_base)
    assert graphs_of(base) is graphs_of(base) is not graphs_of(tiny_base)


def test_a_request_reports_its_calls(tiny_base):
    generation = generate(GenerateRequest(prompt="red apple", steps=3), base=tiny_base)
    assert generation.graphs.eager.total() == 3
    both = generate(GenerateRequest(prompt="red apple", steps=3, vary=({"guidance": [1, 2]},)), base=tiny_base)
    assert both.graphs.to_json()["why"] == {"graphs need CUDA, the device is cpu": 6}
    with refused("unsupported", "CUDA"):
        generate(GenerateRequest(prompt="red apple", graphs="on"), base=tiny_base)
    with refused("unknown-name", "maybe"):
        GenerateRequest(prompt="red apple", graphs="maybe")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnCuda:
    @pytest.fixture
    def cuda(self, sd1_scheduled_base, tiny_control, condition_image):
        base, control = copy.deepcopy((sd1_scheduled_base, tiny_control))
        base.to("cuda")
        control.to("cuda")
        hint = control.encode(to_tensor([condition_image]).cuda(), base)
        return base, ActiveControl(control, hint, weight=0.8, end=0.8)

    def test_images_are_those_of_eager_calls(self, cuda):
        base, use = cuda
        for _ in range(2):
            made, report = images(base, graphs_of(base), uses=[use])
            assert (made - images(base, uses=[use])[0]).abs().max() < 1e-4
        assert (report.captured, report.eager.total()) == (0, 0)
        assert report.graph and graphs_of(base).bytes

    @pytest.mark.parametrize("sampler", ["ddim", "unipc", "euler", "euler-a", "dpm++-2m-sde", "heun", "plms", "lcm"])
    @pytest.mark.parametrize("mode", ["off", "on"])
    def test_no_step_waits(self, cuda, sampler, mode):
        base, use = cuda

        def on_step(step):
            torch.cuda.set_sync_debug_mode("default" if step.step == step.steps else "error")

        settings = {**SETTINGS, "sampler": sampler, "uses": [use]}
        try:
            list(sample(base, calls=NetworkCalls(base, mode), **settings))  # captures
            list(sample(base, calls=NetworkCalls(base, mode), on_step=on_step, **settings))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_calls_are_tallied_over_everything_that_is_sampled(tiny_base):
    graphs = graphs_on_cpu()
    with tallied() as whole:
        images(tiny_base, graphs)
        with tallied() as part:
            images(tiny_base)
    images(tiny_base)
    assert (part().graph, part().eager) == (0, {"graphs off": 4})
    assert (whole().graph, whole().captured, whole().eager) == (4, 1, {"graphs off": 4})
