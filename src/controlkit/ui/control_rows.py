"""Rows of controls on the page: image, condition image, weight, span, mode, parameters and mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from controlkit import conditions
from controlkit.conditions.condition import WHITE, background_of, known_name
from controlkit.errors import UserError
from controlkit.images import shapes_differ
from controlkit.sampling.uses import MODES
from controlkit.server.catalogue import TASK, Catalogue
from controlkit.ui.files import base64_png, flattened, painted
from controlkit.ui.parameters import ParameterFields, parameter_fields

OWN_MODE = "default"
"""Stands for the mode that the control's system prefers."""


@dataclass(frozen=True)
class ControlRow:
    """The components of one control."""

    index: int
    group: gr.Group
    control: gr.Dropdown
    task: gr.Dropdown
    image: gr.ImageEditor
    preview: gr.Image
    prepared: gr.Checkbox
    weight: gr.Slider
    start: gr.Slider
    end: gr.Slider
    mode: gr.Dropdown
    masked: gr.Checkbox
    mask: gr.ImageEditor
    remove: gr.Button
    parameters: ParameterFields

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The components that make a request."""
        return (
            *(self.control, self.task, self.image, self.prepared, self.weight, self.start, self.end),
            *(self.mode, self.masked, self.mask, *self.parameters.inputs),
        )

    def condition(self, values: Mapping[Any, Any], catalogue: Catalogue) -> str | None:
        """The condition of the row's control, or of its task."""
        return condition_of(catalogue, values[self.control], values[self.task])

    def given(self, values: Mapping[Any, Any], catalogue: Catalogue) -> Image.Image | None:
        """The row's image; a transparent one over white, as a condition image over its condition's background."""
        condition = self.condition(values, catalogue) if values[self.prepared] else None
        return drawn(values[self.image], background_of(condition))

    def body(self, values: Mapping[Any, Any], catalogue: Catalogue) -> dict[str, Any] | None:
        """The control of a request's body; None if the row names none.

        Raises:
            UserError: it has no image, no mask where one is asked for, or several tasks of which none is chosen.
        """
        name = values[self.control]
        if not name:
            return None
        condition = computed(self.condition(values, catalogue))
        image = self.given(values, catalogue)
        if image is None:
            raise UserError(f"control {self.index + 1} ({name}) has no image; draw or upload one", "missing-setting")
        tasks, task = tasks_of(catalogue, name), values[self.task]
        if tasks and task is None:
            raise UserError(f"control {self.index + 1} ({name}) has several tasks; choose one", "missing-setting")
        mode = values[self.mode]
        found: dict[str, Any] = {
            "control": name,
            "image": base64_png(image),
            "values": {TASK: task} if tasks else {},
            "prepared": values[self.prepared],
            "parameters": {} if values[self.prepared] else self.parameters.values(values, condition),
            "weight": values[self.weight],
            "start": values[self.start],
            "end": values[self.end],
            "mode": None if mode == OWN_MODE else mode,
        }
        if values[self.masked]:
            mask = painted(values[self.mask])
            if mask is None:
                raise UserError(
                    f"the mask of control {self.index + 1} ({name}) is empty; paint where it acts", "missing-setting"
                )
            if shapes_differ(mask.size, image.size):
                raise UserError(
                    f"the mask of control {self.index + 1} ({name}) was painted on an image of another shape;"
                    " untick Mask, tick it again and paint it anew",
                    "contradiction",
                )
            found["mask"] = base64_png(mask)
        return found


def offered(catalogue: Catalogue) -> list[str]:
    """The controls of the catalogue that need one image, and perhaps a task; rows have no fields for others."""
    return [name for name, entry in catalogue.controls.items() if entry.one_image]


def tasks_of(catalogue: Catalogue, name: str | None) -> tuple[str, ...]:
    """The tasks of a control of which a row selects one; empty if it has no such choice."""
    entry = catalogue.controls.get(name or "")
    return () if entry is None else entry.tasks


def condition_of(catalogue: Catalogue, name: str | None, task: str | None = None) -> str | None:
    """Name of the condition of a control, or of a task of it, if there is one that this version knows."""
    entry = catalogue.controls.get(name or "")
    if entry is None:
        return None
    condition = task if task in entry.tasks else entry.condition
    return None if condition is None else known_name(condition)


def computed(condition: str | None) -> str | None:
    """A condition; None for one that comes with the data and is not computed."""
    return None if condition is None or conditions.find(condition).provided else condition


def known_task(catalogue: Catalogue, name: str | None, task: Any) -> str | None:
    """The task of a control that is called so, also by an alias; None if it has none."""
    tasks = tasks_of(catalogue, name)
    names = (task, known_name(task)) if isinstance(task, str) else ()
    return next((each for each in names if each in tasks), None)


def task_update(catalogue: Catalogue, name: str | None, task: Any = None) -> dict[str, Any]:
    """What shows the tasks of a control in a row.

    Args:
        task: the chosen one; default: the condition that the file records.
    """
    tasks = tasks_of(catalogue, name)
    chosen = known_task(catalogue, name, condition_of(catalogue, name) if task is None else task)
    return {"choices": list(tasks), "value": chosen, "visible": bool(tasks)}


def control_row(index: int, catalogue: Catalogue, *, visible: bool, control: str | None, image: Any) -> ControlRow:
    """Build a row."""
    number = index + 1
    with gr.Group(visible=visible, elem_id=f"control-{number}", elem_classes="control-row") as group:
        with gr.Row(equal_height=True):
            name = gr.Dropdown(
                offered(catalogue), value=control, label=f"Control {number}", elem_id=f"control-{number}-name", scale=3
            )
            task = gr.Dropdown(
                **task_update(catalogue, control), label="Task", elem_id=f"control-{number}-task", scale=2,
                min_width=120,
            )  # fmt: skip
            remove = gr.Button("Remove", size="sm", scale=0, min_width=90, elem_id=f"control-{number}-remove")
        with gr.Row():
            editor = gr.ImageEditor(
                value=image,
                type="pil",
                format="png",
                label="Image",
                canvas_size=(512, 512),
                height=340,
                layers=False,
                sources=("upload", "clipboard"),
                brush=gr.Brush(colors=["#000000", "#ffffff"], default_color="#000000", default_size=8),
                elem_id=f"control-{number}-image",
                elem_classes="control-image",
                buttons=[],
                scale=3,
                min_width=340,
            )
            preview = gr.Image(
                label="Condition image",
                interactive=False,
                format="png",
                type="filepath",
                height=340,
                elem_id=f"control-{number}-condition",
                elem_classes="pixels",
                buttons=["download"],
                scale=2,
                min_width=180,
            )
        with gr.Row():
            weight = gr.Slider(0, 2, 1, step=0.05, label="Weight", elem_id=f"control-{number}-weight", min_width=150)
            start = gr.Slider(0, 1, 0, step=0.05, label="Start", min_width=150)
            end = gr.Slider(0, 1, 1, step=0.05, label="End", min_width=150)
        with gr.Row():
            mode = gr.Dropdown([OWN_MODE, *MODES], value=OWN_MODE, label="Mode", min_width=150)
            prepared = gr.Checkbox(
                False, label="The image is a condition image already", min_width=150,
                elem_id=f"control-{number}-prepared",
            )  # fmt: skip
            masked = gr.Checkbox(False, label="Mask", elem_id=f"control-{number}-masked", min_width=100)
        parameters = parameter_fields(condition_of(catalogue, control), f"control-{number}-parameters")
        mask = gr.ImageEditor(
            type="pil",
            format="png",
            label="Mask: paint where the control acts",
            canvas_size=(512, 512),
            height=340,
            layers=False,
            sources=(),
            transforms=(),
            brush=gr.Brush(colors=["#e11d48"], default_color="#e11d48", default_size=40, color_mode="fixed"),
            visible=False,
            elem_id=f"control-{number}-mask",
            buttons=[],
        )
    return ControlRow(
        index, group, name, task, editor, preview, prepared, weight, start, end, mode, masked, mask, remove, parameters
    )  # fmt: skip


def drawn(value: Mapping[str, Any] | None, over: tuple[int, int, int] = WHITE) -> Image.Image | None:
    """The image of an editor with what is drawn on it, over a colour; None for an empty one."""
    return flattened(None if value is None else value.get("composite"), over)


def background(value: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The value of an editor to paint on the image of another one; None for an empty one."""
    image = drawn(value)
    return None if image is None else {"background": image, "layers": [], "composite": image}
