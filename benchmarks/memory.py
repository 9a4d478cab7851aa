"""Peak memory of a training step, and what each switch saves of it.

    python benchmarks/memory.py --device cuda          # measured: torch.cuda.max_memory_allocated
    python benchmarks/memory.py                        # counted, without running a step: minutes, under 2 GB
    python benchmarks/memory.py --base sd15 --size 512 --batch 1 --only "ours, bf16, base as a graph" --out graph.json

One step each of: training a CtrLoRA adapter as the reference does (gradients for the base control and the UNet's
decoder, autoencoder and text encoder in memory, float32), ours with one switch after another, and a whole ControlNet
with and without all switches, for comparison. Weights are random and always of full size.

*Counted* is not measured. Tensors without data (torch's FakeTensorMode) go through the same code, and every storage
that is alive counts with its size; the peak is that of a second step, when the optimiser's state is there. Norms
compute in float32 as autocast has it on CUDA. The allocator's fragments, the CUDA context (some hundred MB) and
workspaces of libraries are not in it.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import measure
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from controlkit.bases.base import Base
from controlkit.bases.random import random_base
from controlkit.controls.control import Control
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.training.graphs import Capture, Graphs
from controlkit.training.memory import checkpoint_activations

MEBI = 2**20


@dataclass(frozen=True)
class Way:
    """How a step is taken."""

    name: str
    control: str = "adapter"
    """`adapter`, `controlnet`, or `none` to fine-tune the whole UNet without a control."""
    wasteful: bool = False
    """Gradients for weights that do not train, as in the reference."""
    bf16: bool = False
    """Arithmetic in bf16 (autocast)."""
    encoders_aside: bool = False
    """Autoencoder and text encoder are not on the device."""
    frozen_bf16: bool = False
    """Frozen weights stored in bf16."""
    checkpointing: bool = False
    eight_bit: bool = False
    """AdamW with moments of 8 bits."""
    graphs: bool = False
    """The base runs as CUDA graphs, whose pool of memory lasts from step to step."""


REFERENCE = Way("as the reference does", wasteful=True)
PLAIN = Way("ours, bf16", bf16=True, encoders_aside=True, frozen_bf16=True)
ALL = replace(PLAIN, name="all switches", checkpointing=True, eight_bit=True)
WAYS = (
    REFERENCE,
    Way("without gradients that no one uses"),
    Way("+ text encoder and autoencoder aside", encoders_aside=True),
    Way("+ bf16 arithmetic", encoders_aside=True, bf16=True),
    replace(PLAIN, name="+ frozen weights in bf16"),
    replace(ALL, name="+ gradient checkpointing", eight_bit=False),
    replace(ALL, name="+ 8-bit optimiser"),
    replace(PLAIN, name="ours, bf16, base as a graph", graphs=True),
    Way("ControlNet, float32, nothing saved", control="controlnet"),
    replace(PLAIN, name="ControlNet, bf16", control="controlnet"),
    replace(PLAIN, name="ControlNet, bf16, base as a graph", control="controlnet", graphs=True),
    replace(ALL, name="ControlNet, all switches", control="controlnet"),
    Way("fine-tuning the base, float32, nothing saved", control="none"),
)
"""Each of the adapter's without a graph has what the one above it has, and one thing more."""


class Live(TorchDispatchMode):
    """Counts the bytes of every storage that is alive, from the operation that makes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and value.device.type != "meta":
                self._add(value.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen[key] = weakref.ref(storage, lambda _: self._drop(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        self.now -= size
        del self._seen[key]


class CountedGraph:
    """Stands in for `torch.cuda.make_graphed_callables`: holds the memory of a graph, and computes nothing.

    The graphs of the forward and the backward pass share one pool, as large as both passes need at once. Their outputs
    are part of it.
    """

    def __init__(self, live: Live) -> None:
        self._live = live

    def __call__(self, function: Any, inputs: tuple[Tensor, ...], *, allow_unused_input: bool) -> Callable[..., Tensor]:
        live = self._live
        before, peak, live.peak = live.now, live.peak, live.now
        output = function(*inputs)
        trained = [tensor for tensor in inputs if tensor.requires_grad]
        gradients = torch.autograd.grad(output, trained, torch.ones_like(output), allow_unused=allow_unused_input)
        output = output.detach()
        pool = live.peak - before
        results = [output, *(gradient for gradient in gradients if gradient is not None)]
        rest = torch.empty(pool - sum(tensor.numel() * tensor.element_size() for tensor in results), dtype=torch.uint8)
        live.peak = max(peak, live.now)
        of_inputs = iter(gradients)
        filled = [next(of_inputs) if tensor.requires_grad else None for tensor in inputs]

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *_: Tensor) -> Tensor:
                ctx.pool = rest
                return output.detach()

            @staticmethod
            def backward(ctx: Any, *_: Any) -> Any:
                return tuple(None if gradient is None else gradient.detach() for gradient in filled)

        return Replay.apply


class AdamW8bit(torch.optim.Optimizer):
    """What bitsandbytes' AdamW8bit holds, and no arithmetic: two bytes a weight, and two scales for 256 of them.

    Tensors of less than 4,096 values have moments in float32.
    """

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Allocate what the first step allocates."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if self.state[parameter]:
                continue
            count = parameter.numel()
            kind = torch.uint8 if count >= 4096 else torch.float32
            moments = {name: torch.empty(count, dtype=kind, device=parameter.device) for name in ("state1", "state2")}
            if kind == torch.uint8:
                blocks = -(-count // 256)
                for name in ("absmax1", "absmax2"):
                    moments[name] = torch.empty(blocks, device=parameter.device)
            self.state[parameter] = moments


@dataclass
class Built:
    """A base and a control that trains on it."""

    base: Base
    control: Control | None
    """None if the base is fine-tuned."""
    way: Way

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return list(self.base.unet.parameters()) if self.control is None else self.control.trainable_parameters()

    def modules(self) -> Iterator[nn.Module]:
        """All that is on the device in a step."""
        yield self.base.unet
        if self.control is not None:
            yield self.control
        if not self.way.encoders_aside:
            yield from (self.base.vae, *self.base.text_encoders)


def build(base: Base, way: Way, rank: int) -> Built:
    """Networks of one way, on the device and in the dtypes that it has in a step."""
    control: Control | None = None
    if way.control == "adapter":
        shared = BaseControlNet.for_base(base)
        shared.add_adapter("measured", rank)
        shared.train_adapter("measured")
        if way.wasteful:
            shared.network.requires_grad_(True)
            base.unet.up_blocks.requires_grad_(True)
        if way.frozen_bf16:
            nn.Module.to(shared.network, torch.bfloat16)
        control = CtrLoRA(shared, "measured")
    elif way.control == "controlnet":
        control = ControlNet.for_base(base).train().requires_grad_(True)
    else:
        base.unet.train().requires_grad_(True)
    if way.frozen_bf16:
        for network in base.networks:
            nn.Module.to(network, torch.bfloat16)
    if way.checkpointing and control is not None:
        checkpoint_activations(base, control)
    return Built(base, control, way)


def predict_of(built: Built, device: torch.device, capture: Capture | None = None) -> Callable[..., Tensor]:
    """`Base.predict` of a way, as graphs where it says so."""
    if not built.way.graphs:
        return built.base.predict
    return Graphs("on", device, bf16=built.way.bf16, capture=capture).base(built.base)


def take_step(
    built: Built, optimizer: torch.optim.Optimizer, predict: Any, latent: int, batch: int, autocast: Any
) -> None:
    """One step from a latent, a hint and an embedding; what the numbers are does not matter here.

    Args:
        predict: `Base.predict`, or its graphs.
    """
    base, device = built.base, built.parameters[0].device

    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device)

    z, t = empty(batch, base.latent_channels, latent, latent), torch.ones(batch, dtype=torch.long, device=device)
    with device:
        text = base.zero_text().expand(batch)
    with autocast():
        residuals = None
        if built.control is not None:
            side = latent * base.factor
            classic = isinstance(built.control, ControlNet)
            hint = built.control.encode(empty(batch, 3, side, side), base) if classic else empty(*z.shape)
            residuals = built.control(z, t, text, hint)
        loss = (predict(z, t, text, residuals).float() - z).pow(2).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def counted(name: str, way: Way, *, size: int, batch: int, rank: int) -> dict[str, float]:
    """Peak and parts in MiB, counted without running.

    The parts are those at the end of a step; what is left of the peak is activations, and copies for autocast.
    """
    with torch.device("meta"):
        built = build(random_base(name, torch.float32), way, rank)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        live = stack.enter_context(Live())
        stack.enter_context(norms_in_float32())
        for module in built.modules():
            _materialise(module)
        _select_again(built.control)
        weights = live.now
        kind: Callable[..., torch.optim.Optimizer] = _eight_bit if way.eight_bit else _adamw
        optimizer = kind(built.parameters)

        def autocast() -> Any:
            return torch.autocast("cpu", torch.bfloat16, enabled=way.bf16)

        predict = predict_of(built, torch.device("cpu"), CountedGraph(live))
        for _ in range(2):
            live.peak = live.now
            take_step(built, optimizer, predict, size // built.base.factor, batch, autocast)
        gradients = sum(p.grad.numel() * p.grad.element_size() for p in _with_gradients(built))
        state = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
        peak = live.peak
    rest = peak - weights - gradients - state
    parts = {"peak": peak, "weights": weights, "gradients": gradients, "optimiser": state, "rest": rest}
    return {part: value / MEBI for part, value in parts.items()}


def measured(name: str, way: Way, *, size: int, batch: int, rank: int) -> dict[str, float]:
    """Peak in MiB by CUDA's allocator."""
    gc.collect()  # graphs of the way before
    torch.cuda.empty_cache()
    with torch.device("cuda"):  # where a billion random numbers take no time
        base = random_base(name, torch.float32).to("cuda")
    built = build(base, way, rank)
    if way.encoders_aside:
        for network in (base.vae, *base.text_encoders):
            network.to("cpu")
    if way.eight_bit:
        from bitsandbytes.optim import AdamW8bit as Quantised

        optimizer = Quantised(built.parameters)
    else:
        optimizer = torch.optim.AdamW(built.parameters, fused=True)

    def autocast() -> Any:
        return torch.autocast("cuda", torch.bfloat16, enabled=way.bf16)

    predict = predict_of(built, torch.device("cuda"))
    torch.cuda.empty_cache()
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        take_step(built, optimizer, predict, size // base.factor, batch, autocast)
    torch.cuda.synchronize()
    return {"peak": torch.cuda.max_memory_allocated() / MEBI}


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """Norms as autocast has them on CUDA; on the CPU it leaves their dtype alone."""
    group, layer = F.group_norm, F.layer_norm

    def as_float(value: Tensor | None) -> Tensor | None:
        return value.float() if value is not None and torch.is_autocast_enabled("cpu") else value

    def group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        return group(as_float(x), groups, as_float(weight), as_float(bias), eps)

    def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        return layer(as_float(x), shape, as_float(weight), as_float(bias), eps)

    F.group_norm, F.layer_norm = group_norm, layer_norm
    try:
        yield
    finally:
        F.group_norm, F.layer_norm = group, layer


def _materialise(module: nn.Module) -> None:
    """Weights that are on no device, put on the (pretended) CPU."""
    made: dict[int, Tensor] = {}

    def real(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return made[id(tensor)]

    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                owner._parameters[name] = nn.Parameter(real(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.device.type == "meta":
                owner._buffers[name] = real(buffer)


def _select_again(control: Control | None) -> None:
    """An adapter's layers hold on to what is active in them."""
    if isinstance(control, CtrLoRA):
        control.base_control.select(None)
        control.base_control.select(control.adapter)


def _with_gradients(built: Built) -> list[nn.Parameter]:
    return [p for module in built.modules() for p in module.parameters() if p.grad is not None]


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, fused=True)


def _eight_bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return AdamW8bit(parameters, {"lr": 1e-5})


def main() -> None:
    """Measure or count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="sd15", help="a known base, with random weights")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--device", default="cpu", help="cuda measures, cpu counts")
    parser.add_argument(
        "--only", nargs="+", choices=[way.name for way in WAYS], metavar="WAY", help="some of the ways, by name"
    )
    parser.add_argument("--out", default=None, help="the JSON file (default: in benchmarks/results)")
    args = parser.parse_args()
    chosen = [way for way in WAYS if args.only is None or way.name in args.only]
    settings: dict[str, Any] = {"size": args.size, "batch": args.batch, "rank": args.rank}
    cuda = torch.device(args.device).type == "cuda"
    how = "measured" if cuda else "counted"
    rows: list[list[Any]] = []
    cases = []
    for way in chosen:
        print(f"{way.name} ...", flush=True)
        parts = measured(args.base, way, **settings) if cuda else counted(args.base, way, **settings)
        saved = (
            cases[-1]["mebibytes"]["peak"] - parts["peak"]
            if cases and way.control == "adapter" and not way.graphs
            else None
        )
        cases.append({"way": way.name, "how": how, "mebibytes": parts, "saved_by_this": saved})
        measure.so_far("memory", args, cases)
        rows.append([way.name, *(round(value) for value in parts.values()), "" if saved is None else round(saved)])
    columns = ["way", *(f"{part}, MiB" for part in cases[0]["mebibytes"]), "this saves, MiB"]
    print(f"\n{how}:\n\n{measure.table(columns, rows)}")
    measure.finish("memory", args, cases, how=how)


if __name__ == "__main__":
    main()
