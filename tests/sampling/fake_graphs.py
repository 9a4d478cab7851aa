"""Stand-ins for CUDA graphs on the CPU, which replay a function over static buffers and overwrite its outputs."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from controlkit.sampling.graphs import Graph, Graphs


class CalledAgain:
    """Replays by calling the function again, for what concerns keys and limits alone."""

    def __init__(self, bytes_each: int = 0) -> None:
        self.bytes_each = bytes_each

    def __call__(self, function, inputs):
        outputs = {name: torch.zeros_like(tensor) for name, tensor in function(inputs).items()}

        def replay():
            for name, made in function(inputs).items():
                outputs[name].copy_(made)

        return Graph(inputs, outputs, replay, self.bytes_each)


class Traced:
    """Replays the operations of one call. As in a CUDA graph, Python runs at the capture alone: numbers that it
    computed are constants, and weights are read where they lie."""

    def __call__(self, function, inputs):
        names: list[str] = []

        def flat(*tensors):
            made = function(dict(zip(inputs, tensors, strict=True)))
            names[:] = list(made)
            return list(made.values())

        traced = make_fx(flat)(*inputs.values())
        outputs = {name: torch.zeros_like(tensor) for name, tensor in zip(names, traced(*inputs.values()), strict=True)}

        def replay():
            for output, made in zip(outputs.values(), traced(*inputs.values()), strict=True):
                output.copy_(made)

        return Graph(inputs, outputs, replay)


class OnePool:
    """As `CalledAgain`, and a replay destroys the outputs of all other graphs, as those of one pool may."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, torch.Tensor]] = []

    def __call__(self, function, inputs):
        own = CalledAgain()(function, inputs)
        self.outputs.append(own.outputs)

        def replay():
            for outputs in self.outputs:
                for output in outputs.values() if outputs is not own.outputs else ():
                    output.fill_(float("nan"))
            own.replay()

        return Graph(own.inputs, own.outputs, replay)


def graphs_on_cpu(capture=None, **limits) -> Graphs:
    return Graphs(capture or Traced(), device="cpu", **limits)
