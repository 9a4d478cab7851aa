"""ControlNet Union (xinsir's ControlNet++) on diffusers' `ControlNetUnionModel`: many conditions in one ControlNet.

Differences from a ControlNet (xinsir6/ControlNetPlus, models/controlnet_union.py): which tasks are in use enters the
time embedding, and a transformer of one token per condition image and one for the noisy latent computes a bias for the
channels of each image's features before they are added. So several images of several tasks pass the network together.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from diffusers import ControlNetUnionModel
from torch import Tensor, nn

from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.bases.unet import unet_inputs
from controlkit.conditions.condition import known_name
from controlkit.controls.control import Control, Reads, Training
from controlkit.controls.encoder_copy.names import config_of
from controlkit.controls.encoder_copy.network import (
    base_needed,
    checked_config,
    copy_incompatibility,
    hint_channels_for,
    hint_incompatibility,
    missing_heads,
    plain_config,
    with_heads,
)
from controlkit.controls.file_format import (
    CONFIG_ERRORS,
    Checkpoint,
    FileFormat,
    Reference,
    TensorFile,
    check_names,
    on_one_line,
)
from controlkit.controls.hints import Hint
from controlkit.controls.inputs import Input, check_range
from controlkit.controls.registry import control
from controlkit.errors import UserError, nearest

_TYPES = (
    ("openpose", "dwpose"),
    ("depth", "depth_anything", "depth_leres", "depth_zoe"),
    ("hed", "pidinet", "scribble", "scribble_hed", "scribble_pidinet"),
    ("canny", "lineart", "lineart_anime", "mlsd"),
    ("normal", "normal_bae"),
    ("seg", "segments"),
    ("downscale", "blur"),
    ("inpaint", "outpaint"),
)
RELEASED: Mapping[str, int] = MappingProxyType({name: place for place, names in enumerate(_TYPES) for name in names})
"""Task -> its control type in xinsir/controlnet-union-sdxl-1.0, by the names of the conditions here (test files of
xinsir6/ControlNetPlus). The first release has six types, ProMax also tile (`downscale`, `blur`) and repaint (`inpaint`,
`outpaint`)."""
_TASKS = "tasks"
"""controlkit's own setting: task -> control type, if they are not the released ones."""
_HINT_NETWORK = "controlnet_cond_embedding."
_MARK = "task_embedding"
_TIME_CHANNELS = 256
"""Channels of the embedding of one control type in the time embedding, for bases that are told no sizes; as in SDXL."""
_HEADS = 8
"""Attention heads of the transformer; fewer if its width is no multiple."""


def _task_problem(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "must be the name of a task, such as canny"


def _inputs(tasks: Mapping[str, int]) -> tuple[Input, ...]:
    """An image with its task, and an optional one for the first task of each control type."""
    more = (Input(name=task, condition=known_name(task), required=False) for task in _first(tasks))
    return (Input(), Input(name="task", kind="value", required=False, check=_task_problem), *more)


def _first(tasks: Mapping[str, int]) -> list[str]:
    """The first task of each control type."""
    return [task for place, task in enumerate(tasks) if tasks[task] not in list(tasks.values())[:place]]


def _tasks(config: Mapping[str, Any]) -> dict[str, int]:
    """Tasks of a network with this config -> control types."""
    if own := config.get(_TASKS):
        return {str(name): int(place) for name, place in own.items()}
    return {name: place for name, place in RELEASED.items() if place < config.get("num_control_type", 6)}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Recipe settings of a ControlNet Union."""

    name: str = "union"
    """Name of the control and of its file."""
    start: str | None = None
    """Initial weights: a ControlNet Union in any format. Conditions that it lacks become new tasks. Default: a copy of
    the base's encoder."""
    prompt_drop: float = 0.5
    """Fraction of prompts replaced by the empty prompt."""


def _is_release(config: Mapping[str, Any]) -> bool:
    return config.get("_class_name") in ("ControlNetModel", "ControlNetModel_Union")


def _detect_release(file: TensorFile) -> str | None:
    return "a ControlNet Union in the folder of its release" if _MARK in file.tensors else None


def _read_release(kind: type[Control], file: TensorFile, reference: Reference, description: str) -> Checkpoint:
    try:
        config = {**kind.config_of(file.tensors, reference.unet_config), **file.config}
        config["num_control_type"] = len(file.tensors[_MARK])
        config = {name: value for name, value in config.items() if not name.startswith("_")}
        expected = kind.shapes(config)
    except CONFIG_ERRORS as error:
        raise UserError(f"{file.path} looks like {description}, but {on_one_line(error)}", "damaged-file") from error
    check_names(file.path, description, expected, file.tensors, file.others)
    return Checkpoint(kind.kind, config, dict(file.tensors), dict(file.metadata), path=file.path)


@control
class ControlNetUnion(Control):
    """A copy of the base's encoder and middle block for many tasks, joined to the base by zero convolutions.

    The features of a condition image depend on it alone, so `encode` computes them once.

    Args:
        tasks: name -> control type.
        condition: the task that is selected, or None if the inputs must select one.
    """

    kind: ClassVar[str] = "controlnet-union"
    title: ClassVar[str] = "a ControlNet Union"
    paper: ClassVar[str] = "xinsir 2024, github.com/xinsir6/ControlNetPlus"
    architecture: ClassVar[str | None] = "control-net"
    tag: ClassVar[str | None] = "controlnet"
    inputs = _inputs(RELEASED)
    reads: ClassVar[Reads] = Reads.NOISE | Reads.TIME | Reads.TEXT
    enters: ClassVar[str] = "decoder skips and middle"
    diffusers_class: ClassVar[str | None] = "ControlNetUnionModel"
    formats = (
        FileFormat(
            name="xinsir",
            description="the folder of xinsir's release, whose config is that of a ControlNet",
            files=("config.json", "diffusion_pytorch_model.safetensors"),
            of_config=_is_release,
            detect=_detect_release,
            read=_read_release,
        ),
    )
    trainings = (
        Training(
            system="controlnet-union",
            several=True,
            one_file=True,
            options=TrainingOptions,
            doc="A ControlNet Union: several conditions in one ControlNet, one condition per step.",
        ),
    )

    def __init__(self, network: ControlNetUnionModel, tasks: Mapping[str, int], condition: str | None = None) -> None:
        super().__init__()
        count = network.config["num_control_type"]
        if not tasks or not set(tasks.values()) <= set(range(count)):
            raise ValueError(f"expected tasks with control types from 0 to {count - 1}, got {dict(tasks)}")
        self.hint_network: nn.Module = network.controlnet_cond_embedding
        network.controlnet_cond_embedding = nn.Identity()
        self.network = network
        self.tasks = dict(tasks)
        self.inputs = _inputs(self.tasks)
        self.condition = next(iter(tasks)) if condition is None and len(tasks) == 1 else condition

    @classmethod
    def for_base(
        cls, base: Base, condition: str | None = None, *, tasks: Sequence[str] | None = None, **options: Any
    ) -> ControlNetUnion:
        """A new one: encoder and middle block copied from `base`, zero convolutions, the rest random.

        Args:
            tasks: each gets a control type; default: `condition`, or the released ones.

        Raises:
            UserError: no hint network fits the base, or it has no attention in its middle block.
        """
        channels = hint_channels_for(base, cls.title)
        unet = plain_config(base.unet)
        if "CrossAttn" not in (unet.get("mid_block_type") or ""):
            raise UserError(f"{cls.title} needs attention in the middle block, which {base.name} lacks", "incompatible")
        names = tasks or ((condition,) if condition else None)
        types = dict(RELEASED) if names is None else {name: place for place, name in enumerate(_tasks_of(names))}
        width = unet["block_out_channels"][0]
        config = {name: value for name, value in unet.items() if name in _settings()}
        config |= {
            "conditioning_embedding_out_channels": channels,
            "addition_time_embed_dim": unet.get("addition_time_embed_dim") or _TIME_CHANNELS,
            "num_control_type": max(types.values()) + 1,
            "num_trans_channel": width,
            "num_proj_channel": width,
            "num_trans_head": math.gcd(_HEADS, width),
        }
        network = ControlNetUnionModel.from_config(config)
        own = network.state_dict()
        network.load_state_dict({name: value for name, value in base.unet.state_dict().items() if name in own}, False)
        return cls(nn.Module.to(network, base.device, base.dtype), types, condition)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> ControlNetUnion:
        config = with_heads(checked_config(config))
        network = {name: value for name, value in config.items() if name in _settings()}
        return cls(ControlNetUnionModel.from_config(network).eval(), _tasks(config), condition)

    def config(self) -> dict[str, Any]:
        config = plain_config(self.network)
        return config if self.tasks == _tasks(config) else {**config, _TASKS: self.tasks}

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        copied = config_of(tensors, unet_config)
        count, width = tensors[_MARK].shape
        return {
            **{name: value for name, value in copied.items() if name in _settings()},
            "addition_time_embed_dim": tensors["control_add_embedding.linear_1.weight"].shape[1] // count,
            "num_control_type": count,
            "num_trans_channel": width,
            "num_trans_head": math.gcd(_HEADS, width),
            "num_trans_layer": len({name.split(".")[1] for name in tensors if name.startswith("transformer_layes.")}),
            "num_proj_channel": tensors["spatial_ch_projs.weight"].shape[0],
        }

    @classmethod
    def class_of(cls, config: Mapping[str, Any] | None) -> type[Control]:
        tasks = (config or {}).get(_TASKS)
        known = isinstance(tasks, dict) and tasks and all(isinstance(place, int) for place in tasks.values())
        return _with_inputs(cls, tuple(cast(dict[str, int], tasks).items())) if known else cls

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return {_MARK, "controlnet_mid_block.weight"} <= set(tensors)

    @classmethod
    def missing_setting(cls, config: Mapping[str, Any]) -> str | None:
        return missing_heads(config)

    def file_state(self) -> dict[str, Tensor]:
        hint = {f"{_HINT_NETWORK}{name}": value for name, value in self.hint_network.state_dict().items()}
        return {**self.network.state_dict(), **hint}

    def load_file_state(self, state: Mapping[str, Tensor]) -> None:
        hint = {name.removeprefix(_HINT_NETWORK): v for name, v in state.items() if name.startswith(_HINT_NETWORK)}
        rest = {name: value for name, value in state.items() if not name.startswith(_HINT_NETWORK)}
        self.hint_network.load_state_dict(hint, strict=True, assign=True)
        self.network.load_state_dict(rest, strict=True, assign=True)

    # Tasks

    @property
    def conditions(self) -> tuple[str, ...]:
        if self.condition is not None:
            return (self.condition,)
        return tuple(task for task in _first(self.tasks) if known_name(task))

    @classmethod
    def conditions_in(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(_tasks(config))

    def for_condition(self, condition: str) -> Control:
        return self.with_values({"task": condition})

    def with_values(self, values: Mapping[str, Any]) -> Control:
        task = values.get("task")
        if task is None and self.condition is None:
            raise UserError(
                f"the control has several tasks: {', '.join(self.tasks)}; select one: --control FILE=IMAGE,task="
                f'{next(iter(self.tasks))}, or the input "task" in a .json file',
                "missing-setting",
            )
        view = copy.copy(self)  # shares all modules
        if task is not None:
            view.condition = self._known(task)
        return view

    def _known(self, task: str) -> str:
        name = task if task in self.tasks else known_name(task)
        if name not in self.tasks:
            raise UserError(f"the control has no task {task!r}{nearest(task, list(self.tasks))}", "unknown-name")
        return name

    def add_tasks(self, names: Sequence[str]) -> None:
        """Append tasks that it lacks: a random embedding each, and no effect on the time embedding yet."""
        new = [name for name in _tasks_of(names) if name not in self.tasks]
        if not new:
            return
        config, embedding = self.config(), self.network.task_embedding
        known = config["num_control_type"]
        for place, name in enumerate(new, known):
            self.tasks[name] = place
        count = known + len(new)
        state = self.network.state_dict()
        fresh = torch.randn(len(new), embedding.shape[1], device=embedding.device, dtype=embedding.dtype)
        state[_MARK] = torch.cat([embedding.detach(), fresh * embedding.shape[1] ** 0.5])
        first = "control_add_embedding.linear_1.weight"
        columns = state[first].new_zeros(len(state[first]), len(new) * config["addition_time_embed_dim"])
        state[first] = torch.cat([state[first], columns], 1)
        network = ControlNetUnionModel.from_config({**plain_config(self.network), "num_control_type": count})
        network.controlnet_cond_embedding = nn.Identity()
        network.load_state_dict(state, strict=True, assign=True)
        self.network, self.inputs = network, _inputs(self.tasks)

    # Computation

    def encode(self, inputs: Mapping[str, Any], base: Base) -> Hint:
        """The features of each condition image, and which tasks are in use.

        Args:
            inputs: `image` `[B, 3, H, W]` in [0, 1], optionally `task`, as in `with_values`; images of further tasks
                by their names.

        Returns:
            `types` `[B, control types]`, 1 for those in use; of each image `features.N` `[B, C, h, w]` and its control
            type, `type.N` `[B]`.

        Raises:
            ValueError: a value is outside [0, 1].
            UserError: no task is selected, there is none of that name, or two images are of one control type.
        """
        images = {name: value for name, value in inputs.items() if name not in ("image", "task")}
        first = inputs["image"]
        if self.condition is None and first.is_meta:  # to count operations, of which all tasks have the same
            inputs = {"task": next(iter(self.tasks)), **inputs}
        task = self._known(cast(str, self.with_values(inputs).condition))
        names = (task, *images)
        kinds = [self.tasks[self._known(name)] for name in names]
        if twice := [name for name, kind in zip(names, kinds, strict=True) if kinds.count(kind) > 1]:
            raise UserError(
                f"two images are for one control type: {', '.join(twice)}; give one of them", "contradiction"
            )
        weight = next(self.hint_network.parameters())
        types = torch.zeros(len(first), self.network.config["num_control_type"], device=weight.device)
        hint: dict[str, Tensor] = {}
        for place, (kind, image) in enumerate(zip(kinds, (first, *images.values()), strict=True)):
            check_range(image)
            types[:, kind] = 1
            hint[f"features.{place}"] = self.hint_network(image.to(weight.device, weight.dtype))
            hint[f"type.{place}"] = torch.full((len(first),), kind, device=weight.device)
        return {"types": types, **hint}

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert x_t is not None and text is not None and not isinstance(hint, Tensor)
        places = range(len(hint) // 2)
        down, middle = self.network(
            x_t,
            t,
            **unet_inputs(text),
            controlnet_cond=[hint[f"features.{place}"] for place in places],
            control_type=hint["types"],
            control_type_idx=[hint[f"type.{place}"] for place in places],
            return_dict=False,
        )
        return Residuals.numbered("skip", down, middle=middle)

    def incompatibility(self, base: Base) -> str | None:
        config = self.config()
        stages = config["conditioning_embedding_out_channels"]
        return copy_incompatibility(config, base) or hint_incompatibility(stages, base)

    # Training

    @classmethod
    def for_training(
        cls,
        base: Base,
        conditions: Sequence[str],
        options: Mapping[str, Any],
        *,
        name: str,
        seed: int,
        start: Control | None = None,
        companion: Control | None = None,
    ) -> Control:
        """A new one for these conditions, or `start` with them among its tasks."""
        torch.manual_seed(seed)
        if start is None:
            start = cls.for_base(base, tasks=conditions)
        assert isinstance(start, ControlNetUnion)
        start.add_tasks(conditions)
        start.condition = None if len(start.tasks) > 1 else next(iter(start.tasks))
        return start.requires_grad_(True).train()

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def copied_network(self) -> nn.Module:
        return self.network

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return base_needed(config)

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        tasks = _tasks(config)
        of_type = [[name for name, place in tasks.items() if place == tasks[first]] for first in _first(tasks)]
        return {"tasks": "; ".join(", ".join(names) for names in of_type)}

    @classmethod
    def usage(cls, file: str, base: str, condition: str | None) -> list[str]:
        first, *others = [entry.name for entry in cls.inputs[2:]]
        lines = [f'    controlkit generate "PROMPT" --base {base} --control {file}=IMAGE,task={first} --seeds 4']
        if others:
            example = json.dumps({"image": "first.png", "task": first, others[0]: "second.png"})
            lines += ["", f"Images of several tasks pass the network together if a .json file lists them: `{example}`."]
        return lines


def _tasks_of(names: Sequence[str]) -> list[str]:
    """Tasks of the names of conditions, which may be aliases."""
    return list(dict.fromkeys(known_name(name) or name for name in names))


@cache
def _settings() -> frozenset[str]:
    """Settings of diffusers' network."""
    return frozenset(inspect.signature(ControlNetUnionModel.__init__).parameters) - {"self"}


@cache
def _with_inputs(kind: type[ControlNetUnion], tasks: tuple[tuple[str, int], ...]) -> type[ControlNetUnion]:
    return type(kind.__name__, (kind,), {"inputs": _inputs(dict(tasks)), "__doc__": kind.__doc__})
