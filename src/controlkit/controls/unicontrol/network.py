"""The network of UniControl, and its selection of a task."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn
from torch.nn.functional import conv2d

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.residuals import Residuals
from controlkit.bases.text import Text
from controlkit.bases.unet import unet_inputs
from controlkit.controls.control import Control, Reads, Training
from controlkit.controls.encoder_copy.names import config_of
from controlkit.controls.encoder_copy.network import (
    HINT_SETTINGS,
    base_needed,
    checked_config,
    copied_encoder,
    copy_incompatibility,
    hint_channels_for,
    hint_incompatibility,
    missing_heads,
    network_of,
    plain_config,
    with_heads,
)
from controlkit.controls.hints import Hint
from controlkit.controls.inputs import Input
from controlkit.controls.registry import control
from controlkit.controls.unicontrol.formats import FORMATS, copied_tensors
from controlkit.controls.unicontrol.tasks import (
    RELEASED,
    InstructionEmbeddings,
    InstructionToken,
    Mixture,
    instruction_of,
    instruction_problem,
    mixture_of,
    task_problem,
)
from controlkit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Recipe settings of a UniControl."""

    name: str = "unicontrol"
    """Name of the control and of its file."""
    instructions: tuple[str, ...] = ()
    """Instruction of each condition, in their order; default: those of the paper, or `CONDITION to image`."""
    start: str | None = None
    """Initial weights: a UniControl file. Conditions that it lacks get new adapters. Default: a copy of the base's
    encoder."""
    freeze_hypernet: bool = False
    """Keep the HyperNet's random initial weights, as the first release does by mistake: it detaches all outputs of the
    HyperNet."""
    prompt_drop: float = 0.3
    """Fraction of prompts replaced by the empty prompt (0.3 in the reference)."""


@control
class UniControl(Control):
    """A ControlNet with an adapter for each task and a HyperNet that reads the task's instruction.

    The condition image passes the convolutions of its task's adapter, then those that all tasks share. The HyperNet
    maps the embedding of the instruction to a scale for each input channel of the zero convolutions and of the two
    convolutions around the shared ones (the middle's zero convolution has none). Both depend on condition image and
    task alone, so `encode` computes them once.

    Three corrections of salesforce/UniControl: gradients reach the HyperNet (its version 1.0 detaches all outputs); a
    new HyperNet starts near scales of 1 (there near 0, so that zero convolutions hardly learn); and it reads the end
    token of the instruction, not the first one, which is the same for all instructions. Files of that repository keep
    its first token, because their weights were trained with it.

    Args:
        network: encoder and middle block; its hint network is not used.
        tasks: name -> instruction, in the order of the adapters.
        hint_channels: of the hint's stages, one more than its downsamplings; the adapters have the first.
        instruction_token: see `InstructionEmbeddings`.
        condition: a task that is selected, or None.
    """

    kind: ClassVar[str] = "unicontrol"
    title: ClassVar[str] = "a UniControl"
    paper: ClassVar[str] = "Qin et al. 2023, arXiv 2305.11147"
    inputs = (
        Input(),
        Input(name="task", kind="value", required=False, check=task_problem),
        Input(name="instruction", kind="value", required=False, check=instruction_problem),
    )
    reads: ClassVar[Reads] = Reads.NOISE | Reads.TIME | Reads.TEXT
    enters: ClassVar[str] = "decoder skips and middle"
    not_elsewhere: ClassVar[str] = "only the paper's code has such a network"
    formats = FORMATS
    trainings = (
        Training(
            system="unicontrol",
            several=True,
            one_file=True,
            options=TrainingOptions,
            doc="A UniControl: several conditions in one network, one condition per step.",
        ),
    )

    def __init__(
        self,
        network: ControlNetModel,
        tasks: Mapping[str, str],
        *,
        hint_channels: Sequence[int],
        instruction_token: InstructionToken = "end",
        condition: str | None = None,
    ) -> None:
        super().__init__()
        if not tasks or len(hint_channels) < 2:
            raise ValueError(f"expected a task and two stages of the hint, got {list(tasks)} and {list(hint_channels)}")
        config = network.config
        first, entry, last = config["block_out_channels"][0], hint_channels[1], hint_channels[-1]
        network.controlnet_cond_embedding = nn.Identity()
        self.zero_convs = nn.ModuleList(network.controlnet_down_blocks)
        network.controlnet_down_blocks = nn.ModuleList(nn.Identity() for _ in self.zero_convs)  # applied in `forward`
        self.network = network
        self.hint_channels = list(hint_channels)
        self.task_adapters = nn.ModuleList(_adapter(hint_channels) for _ in tasks)
        self.entry = _two_convolutions(entry, entry)
        self.shared_adapter = nn.Sequential(*_stages(hint_channels[1:]))
        self.exit = _two_convolutions(last, first)
        width = 4 * first
        self.hypernet = nn.Sequential(
            nn.Linear(config["cross_attention_dim"], width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.zero_scales = nn.ModuleList(nn.Linear(width, _channels(layer)) for layer in self.zero_convs)
        self.entry_scales, self.exit_scales = nn.Linear(width, entry), nn.Linear(width, last)
        for layer in (*self.zero_scales, self.entry_scales, self.exit_scales):
            nn.init.ones_(cast(nn.Linear, layer).bias)  # as StyleGAN2 starts its modulations (arXiv 1912.04958)
        self.tasks = dict(tasks)
        """Name -> instruction, in the order of the adapters."""
        self.embed = InstructionEmbeddings(instruction_token)
        self.condition = next(iter(tasks)) if condition is None and len(tasks) == 1 else condition
        self.mixture: Mixture | None = {self.condition: 1.0} if self.condition in self.tasks else None
        """The selected tasks; None if the inputs must select one."""
        self.instruction: str | None = None
        """The selected instruction; None for those of the tasks."""

    @classmethod
    def for_base(
        cls,
        base: Base,
        condition: str | None = None,
        *,
        tasks: Mapping[str, str] | None = None,
        **options: Any,
    ) -> UniControl:
        """A new one: encoder and middle block copied from `base`, zero convolutions, random adapters and HyperNet.

        Args:
            tasks: name -> instruction; default: the condition, or those of the release.

        Raises:
            UserError: no hint network fits the base.
        """
        if tasks is None:
            tasks = RELEASED if condition is None else {condition: instruction_of(condition)}
        channels = hint_channels_for(base, cls.title)
        new = cls(copied_encoder(base.unet), tasks, hint_channels=channels, condition=condition)
        return new.to(base.device, base.dtype)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], condition: str | None = None) -> UniControl:
        settings = with_heads(checked_config(config))
        network = network_of(settings)
        return cls(
            network,
            {str(name): str(instruction) for name, instruction in settings["tasks"]},
            hint_channels=settings["hint_channels"],
            instruction_token=settings["instruction_token"],
            condition=condition,
        ).eval()

    def config(self) -> dict[str, Any]:
        network = {key: value for key, value in plain_config(self.network).items() if key not in HINT_SETTINGS}
        return {
            **network,
            "tasks": [list(task) for task in self.tasks.items()],
            "hint_channels": self.hint_channels,
            "instruction_token": self.embed.token,
        }

    @classmethod
    def config_of(cls, tensors: Mapping[str, Tensor], unet_config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `Control.config_of`, for the released tasks and token.

        Raises:
            ValueError: the network has another number of adapters, whose tasks are unknown.
        """
        count = len({name.split(".")[1] for name in tensors if name.startswith("task_adapters.")})
        if count != len(RELEASED):
            raise ValueError(f"its {count} tasks are unknown; those of the {len(RELEASED)} released ones are known")
        shared = sorted(
            (int(name.split(".")[1]), value.shape[0])
            for name, value in tensors.items()
            if name.startswith("shared_adapter.") and name.endswith(".weight")
        )
        first = [tensors[f"task_adapters.0.{place}.weight"].shape[0] for place in (0, 4)]
        return {
            **{k: v for k, v in config_of(copied_tensors(tensors), unet_config).items() if k not in HINT_SETTINGS},
            "tasks": [list(task) for task in RELEASED.items()],
            "hint_channels": [*first, *(channels for _, channels in shared[1::2])],
            "instruction_token": "first",
        }

    @classmethod
    def is_native(cls, tensors: Mapping[str, Tensor]) -> bool:
        return {"task_adapters", "zero_scales"} <= {name.partition(".")[0] for name in tensors}

    @classmethod
    def missing_setting(cls, config: Mapping[str, Any]) -> str | None:
        return missing_heads(config)

    # Tasks

    @property
    def conditions(self) -> tuple[str, ...]:
        if self.condition is not None:
            return (self.condition,)
        known = conditions.registry()
        return tuple(task for task in self.tasks if task in known)

    @classmethod
    def conditions_in(cls, config: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(name) for name, _ in config["tasks"])

    def for_condition(self, condition: str) -> Control:
        return self.for_task(condition)

    def for_task(self, task: str | Mixture | None = None, instruction: str | None = None) -> UniControl:
        """The same network with a task selected.

        Args:
            task: its name, or weights with which the adapters of several are mixed, for a task that was not trained
                (section 3.4 of the paper); None keeps the selection.
            instruction: in place of the task's own, or of the mean of the tasks' embeddings.

        Raises:
            UserError: there is no such task.
        """
        view = copy.copy(self)  # shares all modules
        if task is not None:
            view.mixture = mixture_of(task, self.tasks)
            view.condition = next(iter(view.mixture)) if len(view.mixture) == 1 else None
            view.instruction = None
        if instruction is not None:
            view.instruction = instruction
        return view

    def with_values(self, values: Mapping[str, Any]) -> Control:
        selected = self.for_task(values.get("task"), values.get("instruction"))
        if selected.mixture is None:
            raise UserError(
                f"the control has several tasks: {', '.join(self.tasks)}; select one:"
                f' --control FILE=IMAGE,task={next(iter(self.tasks))}, or the input "task" in a .json file',
                "missing-setting",
            )
        return selected

    def add_task(self, name: str, instruction: str) -> None:
        """Append a task with a new adapter, or change the instruction of one."""
        if name not in self.tasks:
            weight = self._weight
            self.task_adapters.append(_adapter(self.hint_channels).to(weight.device, weight.dtype))
        self.tasks[name] = instruction

    # Computation

    def encode(self, inputs: Mapping[str, Any], base: Base) -> Hint:
        """The encoded image and the HyperNet's scales for the selected task.

        Args:
            inputs: `image` `[B, 3, H, W]` in [0, 1]; optionally `task` and `instruction`, as in `for_task`.

        Returns:
            `features` `[B, C, h, w]`, which are added to the first convolution's output, and `scales` `[1, S]`: those
            of the input channels of all zero convolutions, one after another.

        Raises:
            UserError: no task is selected, or there is none of that name.
        """
        image, values = inputs["image"], {name: value for name, value in inputs.items() if name != "image"}
        if self.mixture is None and image.is_meta:  # to count operations, of which all tasks have the same
            values = {"task": next(iter(self.tasks)), **values}
        selected = cast(UniControl, self.with_values(values))
        weight = self._weight
        image = image.to(weight.device, weight.dtype)
        task = self.hypernet(selected._task_embedding(base).to(weight.device, weight.dtype))
        features = torch.zeros((), device=weight.device, dtype=weight.dtype)
        places = {name: place for place, name in enumerate(self.tasks)}
        assert selected.mixture is not None
        for name, share in selected.mixture.items():
            features = features + self.task_adapters[places[name]](image) * share
        features = self.shared_adapter(_modulated_pair(self.entry, features, self.entry_scales(task)))
        features = _modulated_pair(self.exit, features, self.exit_scales(task))
        return {"features": features, "scales": torch.cat([layer(task) for layer in self.zero_scales], 1)}

    @property
    def _weight(self) -> Tensor:
        return cast(nn.Conv2d, self.exit[0]).weight

    def _task_embedding(self, base: Base) -> Tensor:
        """The embedding of the selected instruction, or the mean of the selected tasks', `[1, D]`."""
        if self.instruction is not None:
            return self.embed(self.instruction, base)
        assert self.mixture is not None
        embeddings = [self.embed(self.tasks[name], base) * share for name, share in self.mixture.items()]
        return torch.stack(embeddings).sum(0)

    def forward(self, x_t: Tensor | None, t: Tensor, text: Text | None, hint: Hint) -> Residuals:
        assert x_t is not None and text is not None and not isinstance(hint, Tensor)
        down, middle = self.network(x_t, t, **unet_inputs(text), controlnet_cond=hint["features"], return_dict=False)
        scales = hint["scales"].split([_channels(layer) for layer in self.zero_convs], 1)
        residuals = [
            _modulated(cast(nn.Conv2d, layer), stream, scale)
            for layer, stream, scale in zip(self.zero_convs, down, scales, strict=True)
        ]
        return Residuals.numbered("skip", residuals, middle=middle)

    def incompatibility(self, base: Base) -> str | None:
        return copy_incompatibility(self.config(), base) or hint_incompatibility(self.hint_channels, base)

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
        """A new one, or `start` with adapters for these conditions.

        Raises:
            UserError: the instructions are not one for each condition.
        """
        instructions = options["instructions"]
        if instructions and len(instructions) != len(conditions):
            raise UserError(
                f"instructions are {len(instructions)}, and conditions {len(conditions)}; give one for each",
                "contradiction",
            )
        given = dict(zip(conditions, instructions, strict=False))
        torch.manual_seed(seed)
        if start is None:
            tasks = {condition: given.get(condition, instruction_of(condition)) for condition in conditions}
            control = cls.for_base(base, tasks=tasks)
        else:
            control = cast(UniControl, start)
            for condition in conditions:
                known = control.tasks.get(condition, instruction_of(condition))
                control.add_task(condition, given.get(condition, known))
            if len(control.tasks) > 1:  # a file of one task had selected it
                control.condition = control.mixture = control.instruction = None
        control.requires_grad_(True)
        for task, adapter in zip(control.tasks, control.task_adapters, strict=True):
            adapter.requires_grad_(task in conditions)
            control.embed(control.tasks[task], base)  # before the text encoder is cast or offloaded
        for module in control.hypernet_modules():
            module.requires_grad_(not options["freeze_hypernet"])
        return control.train()

    def hypernet_modules(self) -> tuple[nn.Module, ...]:
        """The modules of the HyperNet."""
        return (self.hypernet, self.zero_scales, self.entry_scales, self.exit_scales)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def copied_network(self) -> nn.Module:
        return self.network

    # Description

    @classmethod
    def needs(cls, config: Mapping[str, Any]) -> str:
        return base_needed(config)

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> dict[str, str]:
        tasks = ", ".join(f"{name} ({instruction})" for name, instruction in config["tasks"])
        return {"tasks": tasks, "instruction token": config["instruction_token"]}

    def parameter_counts(self) -> dict[str, int]:
        parts = {"task adapters": (self.task_adapters,), "hypernet": self.hypernet_modules()}
        counts = {
            name: sum(parameter.numel() for module in modules for parameter in module.parameters())
            for name, modules in parts.items()
        }
        return {**super().parameter_counts(), **counts}

    @classmethod
    def usage(cls, file: str, base: str, condition: str | None) -> list[str]:
        return [
            f'    controlkit generate "PROMPT" --base {base} --control {file}=INPUTS.json --seeds 4',
            "",
            '`INPUTS.json` has the image and the task: `{"image": "photo.png", "task": "TASK"}`. For a task that was'
            ' not trained, mix trained ones, as `"task": {"depth": 0.6, "seg": 0.4}` does, with an `"instruction"` of'
            " your own and a finished condition image (`--prepared`).",
        ]


def _channels(layer: nn.Module) -> int:
    return cast(nn.Conv2d, layer).in_channels


def _adapter(channels: Sequence[int]) -> nn.Sequential:
    """The convolutions of one task, up to the first downsampling."""
    return nn.Sequential(nn.Conv2d(3, channels[0], 3, padding=1), nn.SiLU(), *_stages(channels[:2]))


def _stages(channels: Sequence[int]) -> list[nn.Module]:
    """Two convolutions per downsampling, each with SiLU."""
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, before, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(before, after, 3, padding=1, stride=2), nn.SiLU()]
    return layers


def _two_convolutions(channels: int, out: int) -> nn.ModuleList:
    """A modulated convolution and a plain one beside it. Zero in version 1.0, where the second had no use; random in
    version 1.1, which adds the second."""
    return nn.ModuleList(nn.Conv2d(channels, out, 3, padding=1) for _ in range(2))


def _modulated_pair(layers: nn.ModuleList, stream: Tensor, scale: Tensor) -> Tensor:
    modulated, plain = (cast(nn.Conv2d, layer) for layer in layers)
    return _modulated(modulated, stream, scale) + plain(stream)


def _modulated(layer: nn.Conv2d, stream: Tensor, scale: Tensor) -> Tensor:
    """A convolution with a `scale` `[B or 1, C]` of the weights of each input channel, which equals scaling its input
    (StyleGAN2's modulation, arXiv 1912.04958, without demodulation)."""
    return conv2d(stream * scale[:, :, None, None], layer.weight, layer.bias, padding=layer.padding)
