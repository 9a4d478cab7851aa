"""CUDA graphs of the network calls of sampling.

With few images, the CPU takes longer to launch the thousands of kernels of a denoising step than the GPU takes for
their arithmetic. A graph launches all of them at once. It is captured for one network (the base, or the controls that
run in one pass), its weights, and the names, shapes and dtypes of its inputs, which include the residuals of the acting
controls. Inputs are copied into static buffers before every replay. Everything between two networks (conditioning
scales, masks and modes of controls, guidance, the solver) runs eagerly, so changing it costs no capture.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.taps import Taps
from controlkit.bases.text import Text
from controlkit.controls.control import Acts, Control, residuals_together
from controlkit.controls.hints import Hint, named
from controlkit.errors import UserError
from controlkit.sampling.request import check_graphs
from controlkit.sampling.residual_cache import mark_of

PAYS_FROM = 8
"""Number of calls from which a capture pays: it costs two warm-up calls and one more, and a replay takes a third to a
fifth of an eager call."""
KEPT_GRAPHS = 16
"""Number of graphs that are kept for later calls: the most recently used ones."""
KEPT_MEGABYTES = 4096
"""Limit in MiB of the memory of all graphs of a base; beyond it they are dropped before the next capture."""
_WARM_UPS = 2

Tensors = dict[str, Tensor]
Function = Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Graph:
    """A captured function."""

    inputs: Tensors
    """Static buffers that it reads."""
    outputs: Tensors
    """Static buffers that `replay` fills; valid until the replay of any graph, since all share a pool."""
    replay: Callable[[], object]
    bytes: int = 0
    """Device memory by which its capture made the pool grow, in bytes."""


Capture = Callable[[Function, Tensors], Graph]
"""Captures a function of named tensors, given the static buffers that it is to read."""


class CudaCapture:
    """Captures functions as CUDA graphs that share one pool of memory.

    They do not run at the same time, and the replay of one may overwrite outputs of those captured after it.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        """The graphs of the pool."""

    def __call__(self, function: Function, inputs: Tensors) -> Graph:
        device = next(iter(inputs.values())).device
        with torch.cuda.device(device):
            # Libraries allocate workspaces and choose kernels in their first calls, which a capture cannot contain.
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(_WARM_UPS):
                    function(inputs)
            torch.cuda.current_stream().wait_stream(aside)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            if not self._alive:  # a pool that has lost all its graphs cannot be captured into again
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            # A capture that fails leaves its own stream current, and its pool in recording.
            with torch.cuda.stream(torch.cuda.current_stream()):
                try:
                    # Other threads may allocate meanwhile, such as those of a server.
                    with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                        outputs = function(inputs)
                except BaseException:
                    self._alive = WeakSet()
                    raise
            self._alive.add(graph)
            grown = max(0, torch.cuda.memory_reserved() - before)
        return Graph(inputs, outputs, graph.replay, grown)


class Graphs:
    """LRU cache of graphs.

    A graph refers to the memory of its networks' weights and does not keep it. Keys contain the identity of every
    weight, so a graph whose weights are gone is never replayed.

    Args:
        capture: how functions are captured; default: as CUDA graphs.
        device: type of the devices that `capture` supports.
        limit: number of graphs that are kept.
        megabytes: limit of their memory in MiB.
    """

    def __init__(
        self,
        capture: Capture | None = None,
        *,
        device: str = "cuda",
        limit: int = KEPT_GRAPHS,
        megabytes: float = KEPT_MEGABYTES,
    ) -> None:
        self.device = device
        self.failed: dict[Hashable, str] = {}
        """Key -> why its capture failed; it is not tried again."""
        self.calls: Counter[Hashable] = Counter()
        """Key that is not captured yet -> its eager calls so far."""
        self._capture = capture or CudaCapture()
        self._limit, self._limit_bytes = limit, int(megabytes * 2**20)
        self._graphs: OrderedDict[Hashable, Graph] = OrderedDict()
        self._pool_bytes = 0
        """Of the pool, which keeps the memory of dropped graphs for the next ones."""

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._graphs

    @property
    def bytes(self) -> int:
        """Device memory of all graphs, in bytes."""
        buffers = (tensor for graph in self._graphs.values() for tensor in graph.inputs.values())
        return self._pool_bytes + sum(map(_bytes_of, buffers))

    def capture(self, key: Hashable, function: Function, inputs: Tensors) -> None:
        """Capture `function` for inputs like these.

        Raises:
            RuntimeError: it cannot be captured; `failed` has the reason from then on.
        """
        if self.bytes > self._limit_bytes:
            self.clear()  # all, since graphs of one pool free its memory together
        while len(self._graphs) >= self._limit:
            self._graphs.popitem(last=False)
        buffers = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
        _copy(inputs, buffers)
        try:
            graph = self._graphs[key] = self._capture(function, buffers)
        except RuntimeError as error:
            self.failed[key] = (str(error).splitlines() or [type(error).__name__])[0]
            raise
        self._pool_bytes += graph.bytes
        self.calls.pop(key, None)

    def replay(self, key: Hashable, inputs: Tensors) -> Tensors:
        """The outputs of the graph under `key`, valid until the next replay of any."""
        graph = self._graphs[key]
        self._graphs.move_to_end(key)
        _copy(inputs, graph.inputs)
        graph.replay()
        return graph.outputs

    def clear(self) -> None:
        """Drop all graphs and free their memory."""
        self._graphs.clear()
        self._pool_bytes = 0


_GRAPHS: WeakKeyDictionary[Base, Graphs] = WeakKeyDictionary()


def graphs_of(base: Base) -> Graphs:
    """The graphs of the base and of controls on it; they live as long as the base."""
    return _GRAPHS.setdefault(base, Graphs())


@dataclass
class GraphReport:
    """How the networks were called at the denoising steps."""

    graph: int = 0
    """Calls that replayed a graph."""
    eager: Counter[str] = field(default_factory=Counter)
    """Reason -> calls that ran eagerly for it."""
    captured: int = 0
    """Graphs captured."""
    seconds: float = 0.0
    """Time of the captures in seconds."""
    bytes: int = 0
    """Device memory of all graphs that are kept, in bytes."""

    def __add__(self, other: GraphReport) -> GraphReport:
        return GraphReport(
            self.graph + other.graph,
            self.eager + other.eager,
            self.captured + other.captured,
            self.seconds + other.seconds,
            max(self.bytes, other.bytes),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values: `graph` and `eager` are numbers of calls, `why` the number of eager calls by reason, `mib` the
        memory of the graphs in MiB."""
        return {
            "graph": self.graph,
            "eager": self.eager.total(),
            "why": dict(self.eager),
            "captured": self.captured,
            "seconds": self.seconds,
            "mib": self.bytes / 2**20,
        }

    def __str__(self) -> str:
        ran = [f"{self.graph} as CUDA graphs ({self.captured} captured in {self.seconds:.1f} s)"] if self.graph else []
        ran += [f"{count} eager ({reason})" for reason, count in self.eager.items()]
        memory = f"; graphs hold {self.bytes / 2**20:.0f} MiB" if self.bytes else ""
        return f"network calls: {', '.join(ran) or 'none'}{memory}"


_TALLIES: ContextVar[tuple[list[GraphReport], ...]] = ContextVar("tallies", default=())


@contextmanager
def tallied() -> Iterator[Callable[[], GraphReport]]:
    """Count the network calls of everything that is sampled in this context.

    Yields:
        A function that returns the sum so far.
    """
    reports: list[GraphReport] = []
    token = _TALLIES.set((*_TALLIES.get(), reports))
    try:
        yield lambda: sum(reports, GraphReport())
    finally:
        _TALLIES.reset(token)


class NetworkCalls:
    """How sampling calls its networks: as graphs or eagerly.

    Args:
        mode: `on`; `off`; or `auto`, which uses graphs on CUDA if enough calls are left to pay for the capture.
        graphs: where graphs are kept; default: `graphs_of(base)`.
        low_memory: whether `auto` means `off`, because graphs hold memory.

    Raises:
        UserError: `mode` is `on`, and the base's device has no graphs.
    """

    def __init__(
        self, base: Base, mode: str = "auto", graphs: Graphs | None = None, *, low_memory: bool = False
    ) -> None:
        check_graphs(mode)
        self.report = GraphReport()
        for reports in _TALLIES.get():
            reports.append(self.report)
        self.left = 0
        """Number of steps left at which the same controls act, this one included; the sampler sets it before each
        step."""
        self._base, self._mode = base, mode
        self._graphs = graphs_of(base) if graphs is None else graphs
        self._identities: dict[int, Hashable] = {}
        self._reasons: dict[int, str | None] = {}
        self._why = self._why_none(low_memory)
        if self._why is not None:
            self._refuse_if_on(self._why)

    def begin(self, controls: Sequence[Control]) -> None:
        """Prepare for sampling; networks may have changed since the last time.

        Raises:
            UserError: the mode is `on`, and one of these controls, or a network, cannot run as a graph.
        """
        self._identities.clear()
        self._reasons.clear()
        if self._mode != "on":
            return
        for control in controls:
            if Acts.TAPS in control.acts:
                self._refuse_if_on(_taps_of(control))
        for network in (self._base.denoiser, *controls):
            if (reason := self._reason(network)) is not None:
                self._refuse_if_on(reason)

    def predict(
        self,
        x_t: Tensor,
        t: Tensor,
        text: Text,
        residuals: Residuals | None,
        taps: Taps,
        tapping: Sequence[Control],
        modules: Mapping[str, nn.Module],
        masked: Tensor | None,
    ) -> Tensor:
        """`Base.predict` with `modules` in place of the base's own; the result is valid until the next such call.

        Args:
            x_t: `[B, C, h, w]`; the other arguments are also as in `Base.predict`.
            tapping: the controls of `taps`.
            modules: path in the denoiser -> its replacement, as in `Base.replacing`.

        Raises:
            UserError: the mode is `on`, and the capture failed.
        """
        base = self._base
        inputs = {"x_t": x_t, "t": t, **_prefixed("text", text.named)}
        inputs |= {} if residuals is None else _prefixed("residual", residuals)
        inputs |= {} if masked is None else {"masked": masked}

        def call(given: Tensors) -> Tensors:
            added = None if residuals is None else Residuals(_without("residual", given))
            # Only inpainting models take the masked image.
            more = {} if masked is None else {"masked": given["masked"]}
            with base.replacing(modules):
                texts = Text(**_without("text", given))
                return {"out": base.predict(given["x_t"], given["t"], texts, added, taps, **more)}

        networks = (base.denoiser, *modules.values())
        reason = _taps_of(tapping[0]) if taps else None
        return self._call(("base", tuple(modules)), networks, call, inputs, reason)["out"]

    def residuals(
        self, controls: Sequence[Control], x_t: Tensor, t: Tensor, text: Text | None, hints: Sequence[Hint]
    ) -> list[Residuals]:
        """The residuals of controls that run in one pass, for one step; valid until the next such call.

        Args:
            hints: one for each control.

        Raises:
            UserError: the mode is `on`, and the capture failed.
        """
        inputs = {"x_t": x_t, "t": t, **({} if text is None else _prefixed("text", text.named))}
        for place, hint in enumerate(hints):
            inputs |= _prefixed(f"hint{place}", named(hint))

        def call(given: Tensors) -> Tensors:
            texts = None if text is None else Text(**_without("text", given))
            read = [_like(hint, _without(f"hint{place}", given)) for place, hint in enumerate(hints)]
            computed = residuals_together(controls, given["x_t"], given["t"], texts, read)
            return {f"{place}.{site}": each[site] for place, each in enumerate(computed) for site in each}

        key = tuple((type(control), control.state()) for control in controls)
        outputs = self._call(key, controls, call, inputs, None)
        return [Residuals(_without(str(place), outputs)) for place in range(len(controls))]

    def _call(
        self, what: Hashable, networks: Sequence[nn.Module], call: Function, inputs: Tensors, reason: str | None
    ) -> Tensors:
        if self._why is not None:
            return self._eager(call, inputs, self._why)
        reason = reason or next(filter(None, map(self._reason, networks)), None)
        if reason is not None:
            return self._eager(call, inputs, reason)
        key = (what, tuple(map(self._identity, networks)), _signature(inputs))
        graphs = self._graphs
        if key not in graphs and (reason := self._why_not_captured(key, call, inputs)) is not None:
            return self._eager(call, inputs, reason)
        self.report.graph += 1
        return graphs.replay(key, inputs)

    def _why_not_captured(self, key: Hashable, call: Function, inputs: Tensors) -> str | None:
        """Capture if it pays; else the reason why not."""
        graphs = self._graphs
        if key in graphs.failed:
            return f"capture failed: {graphs.failed[key]}"
        if self._mode == "auto" and graphs.calls[key] + self.left < PAYS_FROM:
            graphs.calls[key] += 1
            return "too few steps to pay for a capture"
        start = time.perf_counter()
        try:
            graphs.capture(key, call, inputs)
        except RuntimeError as error:
            reason = f"capture failed: {graphs.failed[key]}"
            self._refuse_if_on(reason, error)
            return reason
        self.report.captured += 1
        self.report.seconds += time.perf_counter() - start
        self.report.bytes = graphs.bytes
        return None

    def _eager(self, call: Function, inputs: Tensors, reason: str) -> Tensors:
        self.report.eager[reason] += 1
        return call(inputs)

    def _why_none(self, low_memory: bool) -> str | None:
        """Why no call is a graph."""
        if self._mode == "off":
            return "graphs off"
        if self._base.device.type != self._graphs.device:
            return f"graphs need {self._graphs.device.upper()}, the device is {self._base.device}"
        if torch.is_autocast_enabled(self._base.device.type):
            return "autocast"
        return "low memory" if low_memory and self._mode == "auto" else None

    def _reason(self, network: nn.Module) -> str | None:
        """Why calls of this network cannot be graphs."""
        if id(network) not in self._reasons:
            self._reasons[id(network)] = _why_eager(network)
        return self._reasons[id(network)]

    def _identity(self, network: nn.Module) -> Hashable:
        if id(network) not in self._identities:
            self._identities[id(network)] = _identity(network)
        return self._identities[id(network)]

    def _refuse_if_on(self, reason: str, error: Exception | None = None) -> None:
        if self._mode == "on":
            raise UserError(f"graphs cannot be on: {reason}; use auto or off", "unsupported") from error


def _taps_of(control: Control) -> str:
    return f"taps of {control.title}"


def _why_eager(network: nn.Module) -> str | None:
    """Why a network cannot be captured: hooks are Python, which no graph contains, and previews during training must
    not hold memory."""
    if any(parameter.requires_grad for parameter in network.parameters()):
        return "a network in training"
    for module in network.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return f"hooks on a {type(module).__name__}"
    return None


def _identity(network: nn.Module) -> Hashable:
    """A digest of everything that a graph of the network contains: its modules, and the addresses of its weights.

    It is the same after weights changed in place, because a replay reads their new values.
    """
    made = hashlib.sha256()
    for path, module in network.named_modules():
        processor = type(getattr(module, "processor", None)).__name__
        made.update(f"{path} {type(module).__name__} {processor} {module.training}\n".encode())
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            made.update(f"{name} {mark_of(tensor)} {tensor.data_ptr()} {tensor.dtype} {tensor.stride()}\n".encode())
    return made.hexdigest()


def _signature(inputs: Tensors) -> Hashable:
    return tuple((name, tuple(tensor.shape), tensor.dtype, tensor.device) for name, tensor in inputs.items())


def _copy(inputs: Tensors, buffers: Tensors) -> None:
    torch._foreach_copy_([buffers[name] for name in inputs], list(inputs.values()))


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _without(prefix: str, tensors: Tensors) -> Tensors:
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _like(hint: Hint, tensors: Tensors) -> Hint:
    """Named tensors in the form of `hint`."""
    return next(iter(tensors.values())) if isinstance(hint, Tensor) else tensors


def _bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
