"""The LoRAs of a request: which, and the weight of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

_MOST = 8


class LoraFields:
    """A list to choose from, and a weight for each LoRA that is chosen. Not shown if the server has none."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        with gr.Accordion("LoRAs", open=False, visible=bool(names), elem_id="loras"):
            self.chosen = gr.Dropdown(
                self.names, value=[], multiselect=True, max_choices=_MOST, label="LoRAs", elem_id="lora-names"
            )
            with gr.Row():
                self.weights = [
                    gr.Number(1, step=0.05, visible=False, min_width=130, elem_id=f"lora-{number}-weight")
                    for number in range(1, _MOST + 1)
                ]
        self.shown = gr.State([])
        """Names that the weights belong to."""
        inputs = {self.chosen, self.shown, *self.weights}
        options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.chosen.input(lambda values: self._chosen(values), inputs, [self.shown, *self.weights], **options)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What `body` reads."""
        return (self.chosen, self.shown, *self.weights)

    @property
    def outputs(self) -> tuple[Any, ...]:
        """What `updates` sets, in its order."""
        return (self.chosen, self.shown, *self.weights)

    def body(self, values: Mapping[Any, Any]) -> list[dict[str, Any]]:
        """`loras` of a request's body."""
        weights = self._weights(values)
        return [{"name": name, "weight": weights.get(name, 1.0)} for name in values[self.chosen] or ()]

    def updates(self, weights: Mapping[str, float]) -> list[Any]:
        """Updates that choose the LoRAs of these names, with their weights."""
        weights = dict(list(weights.items())[:_MOST])
        return [list(weights), *self._fields(weights)]

    def _weights(self, values: Mapping[Any, Any]) -> dict[str, float]:
        """Name -> weight of those that are shown; an empty field is 1."""
        given = [values[field] for field in self.weights]
        pairs = zip(values[self.shown], given, strict=False)
        return {name: 1.0 if weight is None else weight for name, weight in pairs}

    def _chosen(self, values: Mapping[Any, Any]) -> list[Any]:
        before = self._weights(values)
        return self._fields({name: before.get(name, 1.0) for name in values[self.chosen] or ()})

    def _fields(self, weights: Mapping[str, float]) -> list[Any]:
        shown = [gr.update(visible=True, label=f"Weight of {name}", value=weight) for name, weight in weights.items()]
        hidden = [gr.update(visible=False)] * (_MOST - len(shown))
        return [list(weights), *shown, *hidden]
