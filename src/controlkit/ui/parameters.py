"""Fields for the parameters of a control's condition, such as the thresholds of canny."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from controlkit import conditions
from controlkit.server.parameters import Parameter, computed_conditions, parameters_of


@dataclass(frozen=True)
class ParameterFields:
    """As many fields as the condition with the most parameters needs; they show those of one condition."""

    shown: gr.State
    """Name of that condition, or None. Of another one the defaults are used: an answer may be on its way."""
    accordion: gr.Accordion
    numbers: tuple[gr.Number, ...]
    switches: tuple[gr.Checkbox, ...]

    @property
    def fields(self) -> tuple[Any, ...]:
        """The fields themselves."""
        return (*self.numbers, *self.switches)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What `values` reads."""
        return (self.shown, *self.fields)

    @property
    def outputs(self) -> tuple[Any, ...]:
        """What `updates` sets, in its order."""
        return (self.shown, self.accordion, *self.fields)

    def values(self, values: Mapping[Any, Any], condition: str | None) -> dict[str, Any]:
        """The parameters that differ from the defaults of `condition`."""
        if condition is None or values[self.shown] != condition:
            return {}
        numbers, switches = _split(condition)
        fields = [*zip(numbers, self.numbers, strict=False), *zip(switches, self.switches, strict=False)]
        found = {each.name: each.value(values[field]) for each, field in fields if values[field] is not None}
        return {each.name: found[each.name] for each, _ in fields if found.get(each.name, each.default) != each.default}

    def updates(self, condition: str | None, given: Mapping[str, Any] | None = None) -> list[Any]:
        """Updates that show the parameters of `condition`.

        Args:
            given: values in place of defaults.
        """
        numbers, switches = _split(condition)
        found: list[Any] = [condition, gr.update(visible=bool(numbers or switches), label=_title(condition))]
        for parameters, fields in ((numbers, self.numbers), (switches, self.switches)):
            for index in range(len(fields)):
                if index < len(parameters):
                    found.append(gr.update(**_settings(parameters[index], given or {})))
                else:
                    found.append(gr.update(visible=False))
        return found


def parameter_fields(condition: str | None, elem_id: str) -> ParameterFields:
    """Build the fields, which show the parameters of `condition`."""
    splits = [_split(name) for name in computed_conditions()]
    most_numbers, most_switches = (max(len(split[which]) for split in splits) for which in (0, 1))
    numbers, switches = _split(condition)
    shown = gr.State(condition)
    visible = bool(numbers or switches)
    with gr.Accordion(_title(condition), open=False, visible=visible, elem_id=elem_id) as accordion:
        with gr.Row():
            number_fields = tuple(_field(gr.Number, numbers, index) for index in range(most_numbers))
        with gr.Row():
            switch_fields = tuple(_field(gr.Checkbox, switches, index) for index in range(most_switches))
    return ParameterFields(shown, accordion, number_fields, switch_fields)


def _field(kind: Any, parameters: list[Parameter], index: int) -> Any:
    if index < len(parameters):
        return kind(**_settings(parameters[index], {}), min_width=130)
    return kind(visible=False, min_width=130)


def _settings(parameter: Parameter, given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a parameter's field. The limits are words: the server checks them, and says so in a sentence."""
    found = {"value": given.get(parameter.name, parameter.default), "label": parameter.name, "visible": True}
    if isinstance(parameter.default, bool):
        return found
    if parameter.limits is None:
        return {**found, "info": f"default {parameter.default:g}"}
    low, high = parameter.limits
    return {**found, "info": f"{low:g} to {high:g}, default {parameter.default:.4g}"}


def _split(condition: str | None) -> tuple[list[Parameter], list[Parameter]]:
    """Numbers and switches of a condition; none of one that is not computed."""
    kind = None if condition is None else conditions.find(condition)
    parameters = [] if kind is None or kind.provided else parameters_of(kind)
    switches = [each for each in parameters if isinstance(each.default, bool)]
    return [each for each in parameters if each not in switches], switches


def _title(condition: str | None) -> str:
    return f"Parameters of {condition}"
