"""Solvers: from a network's predictions at descending times to clean latents. DDIM, and diffusers' schedulers."""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from controlkit.bases.schedules.ddim import ddim_step, times_of
from controlkit.bases.solver_names import SOLVERS
from controlkit.errors import UserError, nearest

_MIN_START = 0.6
"""Minimum start of a solver, as a fraction of the schedule; with two steps, leading spacing starts at two thirds."""
# Set explicitly, since a base's scheduler config may contain the settings of its own sampler.
_DPM: dict[str, Any] = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
_SDE: dict[str, Any] = {**_DPM, "algorithm_type": "sde-dpmsolver++"}

_VARIANCE_PRESERVING: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpm++": (DPMSolverMultistepScheduler, _DPM),
    "dpm++-2m-sde": (DPMSolverMultistepScheduler, _SDE),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpm2": (KDPM2DiscreteScheduler, {}),
    "dpm2-a": (KDPM2AncestralDiscreteScheduler, {}),
    "ddpm": (DDPMScheduler, {"variance_type": "fixed_small"}),
    "lcm": (LCMScheduler, {}),
    # Its step assumes the stride of this spacing.
    "plms": (PNDMScheduler, {"skip_prk_steps": True, "timestep_spacing": "leading"}),
}
"""Solver without Karras spacing -> diffusers' class and its settings.

`dpm++`: Lu et al. 2022, arXiv 2211.01095 (multistep, second order; `-sde`: with noise). `unipc`: Zhao et al. 2023,
arXiv 2302.04867. Karras et al. 2022, arXiv 2206.00364: algorithm 1 without (`euler`) and with its correction (`heun`),
algorithm 2 with midpoints (`dpm2`), times of eq. 5 (`-karras`); `-a`: with noise, as in k-diffusion. `ddpm`: Ho et al.
2020, arXiv 2006.11239. `lcm`: Luo et al. 2023, arXiv 2310.04378. `plms`: Liu et al. 2022, arXiv 2202.09778."""
_NEEDS_SIGNAL = ("euler", "euler-a", "heun", "dpm2", "dpm2-a", "plms")
"""Solvers that divide by the signal, of which some schedules leave none at the last time; so does Karras spacing."""
_NO_SAMPLE = ("euler-a", "heun", "dpm2", "dpm2-a", "plms")
"""Solvers that diffusers has for predictions of the noise and of v only."""
FLOW_SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
    "dpm++": (
        DPMSolverMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, **_DPM},
    ),
    "unipc": (
        UniPCMultistepScheduler,
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2},
    ),
}
"""Solvers of a rectified flow: diffusers' class and its settings."""


class Solver(ABC):
    """One or two predictions per step.

    A solver belongs to one number of steps and, from `begin` to the last step, to one batch of images. Its tables are
    on the CPU and latents on the device, so that no step waits for the device.
    """

    timesteps: Tensor
    """The descending times of the base's predictions, on its device: in 0..999, integer or fractional. As many as
    steps, but twice as many less one for solvers of two predictions per step, and one more for `plms`."""
    initial: float
    """Standard deviation of the initial latents."""
    order: int = 1
    """Times per step."""

    @abstractmethod
    def begin(self, first: int = 0, generators: Sequence[torch.Generator] = ()) -> None:
        """Start a new batch of images.

        Args:
            first: index of the first time.
            generators: of the noise that stochastic solvers add, one per image, on the CPU.
        """

    @abstractmethod
    def noised(self, z: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean latents `z` with noise as before step `index`, which must be the next one; all `[B, C, h, w]`."""

    @abstractmethod
    def input(self, x_t: Tensor, index: int) -> Tensor:
        """Latents before step `index` as the base and its controls take them, of the same shape."""

    @abstractmethod
    def step(self, prediction: Tensor, x_t: Tensor, index: int) -> Tensor:
        """Latents after step `index`, from those before it and the base's prediction; all `[B, C, h, w]`."""


class DDIM(Solver):
    """Song et al. 2021 with eta 0, on the schedule itself."""

    def __init__(self, scheduler: DDIMScheduler, steps: int, device: torch.device | str) -> None:
        self._scheduler = copy.deepcopy(scheduler)  # which stores the times of one number of steps
        times = times_of(self._scheduler, steps)
        self.timesteps = times.to(device)
        self.initial = float(self._scheduler.init_noise_sigma)
        self._times: list[Any] = [*times.tolist(), None]

    def begin(self, first: int = 0, generators: Sequence[torch.Generator] = ()) -> None:
        pass

    def noised(self, z: Tensor, noise: Tensor, index: int) -> Tensor:
        return _noised(self._scheduler.add_noise, z, noise, torch.tensor(self._times[index]))

    def input(self, x_t: Tensor, index: int) -> Tensor:
        return x_t

    def step(self, prediction: Tensor, x_t: Tensor, index: int) -> Tensor:
        return ddim_step(self._scheduler, prediction, x_t, self._times[index], self._times[index + 1])


class DiffusersSolver(Solver):
    """A diffusers scheduler.

    Args:
        scheduler: configured as a pipeline's by `from_config(pipeline.scheduler.config)`.
        length: of the schedule.
        sigmas: noise levels of the steps, for schedulers of a flow; default: the scheduler's.

    Raises:
        UserError: with so few steps it would start in the middle of the schedule.
    """

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        device: torch.device | str,
        *,
        length: int,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self._chosen = {} if sigmas is None else {"sigmas": list(sigmas)}
        self._steps, self._device = steps, torch.device(device)
        self._adds_noise = "generator" in inspect.signature(scheduler.step).parameters
        try:
            self.begin()
        except ValueError as error:  # as of LCM, for more steps than those of its distillation
            raise UserError(
                f"steps is {steps}, which this sampler does not support: {error}", "out-of-range"
            ) from error
        self._times: Tensor = self._scheduler.timesteps
        self.timesteps, self.order = self._times.to(device), self._scheduler.order
        self.initial = float(getattr(self._scheduler, "init_noise_sigma", 1.0))
        if float(self._times[0]) < _MIN_START * length:
            raise UserError(
                f"steps is {steps}, and this sampler then starts at time {float(self._times[0]):g} of"
                f" {length}, which is not pure noise; use 2 steps or more",
                "out-of-range",
            )

    def begin(self, first: int = 0, generators: Sequence[torch.Generator] = ()) -> None:
        scheduler = self._scheduler
        self._noise = {"generator": list(generators)} if self._adds_noise and generators else {}
        scheduler.set_timesteps(self._steps, **self._chosen)
        if scheduler.order == 1 and not isinstance(scheduler, PNDMScheduler):
            # Trailing spacing gives some numbers of steps (61, 103, ...) one time too many, below zero.
            scheduler.timesteps = scheduler.timesteps[: self._steps]
            if hasattr(scheduler, "sigmas"):
                scheduler.sigmas = torch.cat([scheduler.sigmas[: self._steps], scheduler.sigmas[-1:]])
        scheduler.num_inference_steps = self._steps
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        # UniPC's step copies entries of its table to the device, unless they are there.
        self._sigmas = scheduler.sigmas.to(self._device) if isinstance(scheduler, UniPCMultistepScheduler) else None

    def noised(self, z: Tensor, noise: Tensor, index: int) -> Tensor:
        # The scheduler takes the noise level of its own next step.
        return _noised(self._add_noise, z, noise, self._times[index])

    def _add_noise(self, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if hasattr(self._scheduler, "scale_noise"):
            return self._scheduler.scale_noise(z, t, noise)
        return self._scheduler.add_noise(z, noise, t)

    def input(self, x_t: Tensor, index: int) -> Tensor:
        if not hasattr(self._scheduler, "scale_model_input"):
            return x_t
        return self._scheduler.scale_model_input(x_t, self._times[index])

    def step(self, prediction: Tensor, x_t: Tensor, index: int) -> Tensor:
        with _WithoutWaiting(x_t.device) if x_t.is_cuda else nullcontext(), self._table_on_device():
            return self._scheduler.step(prediction, self._times[index], x_t, return_dict=False, **self._noise)[0]

    @contextmanager
    def _table_on_device(self) -> Iterator[None]:
        scheduler = self._scheduler
        if self._sigmas is None:
            yield
            return
        scheduler.sigmas, on_host = self._sigmas, scheduler.sigmas
        try:
            yield
        finally:
            scheduler.sigmas = on_host


def _noised(add_noise: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """A scheduler's noisy latents at time `t`, a scalar on the CPU.

    The factors of `z` and `noise` are computed on the CPU, from one latent that is only signal and one that is only
    noise: diffusers copies its tables to the device of the latents at every call.
    """
    unit = torch.eye(2).view(2, 2, 1, 1)
    signal, sigma = add_noise(unit[:, :1], unit[:, 1:], t.expand(2)).flatten()
    return signal * z + sigma * noise


class _WithoutWaiting(TorchFunctionMode):
    """A context in which a scheduler's step does not wait for its CUDA device.

    Noise of generators on the CPU is copied from pinned memory, asynchronously. UniPC's systems of two equations are
    solved without the check for singular ones, which the CPU would read: its times differ, so there are none.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **(kwargs or {})).result
        result = func(*args, **(kwargs or {}))
        if func is torch.randn and result.device.type == "cpu" and self._device.type != "cpu":
            return result.pin_memory().to(self._device, non_blocking=True)
        return result


def build_solver(
    name: str, scheduler: DDIMScheduler, steps: int, device: torch.device | str, base: str, *, pure_noise: bool
) -> Solver:
    """The solver of this name for a variance preserving schedule.

    Args:
        base: name of the base, for errors.
        pure_noise: whether the schedule ends in (nearly) pure noise.

    Raises:
        UserError: it does not support the schedule or this number of steps.
    """
    if name == "ddim":
        return DDIM(scheduler, steps, device)
    plain = name.removesuffix("-karras")
    if name not in SOLVERS:
        raise UserError(f"there is no sampler {name!r}{nearest(name, SOLVERS)}", "unknown-name")
    if pure_noise and (plain in _NEEDS_SIGNAL or name != plain):
        alpha_bar = scheduler.alphas_cumprod[-1]
        sigma = float(((1 - alpha_bar) / alpha_bar) ** 0.5)
        raise UserError(
            f"the noise schedule of {base} ends in (nearly) pure noise, {sigma:.3g}"
            f" times the signal, which {name} cannot represent; use ddim, dpm++, dpm++-2m-sde, unipc, ddpm or lcm",
            "contradiction",
        )
    if scheduler.config["prediction_type"] == "sample" and plain in _NO_SAMPLE:
        raise UserError(
            f"{base} predicts clean latents, for which {name} is not available; use ddim or dpm++", "contradiction"
        )
    kind, settings = _VARIANCE_PRESERVING[plain]
    spacing = {"use_karras_sigmas": name != plain}
    if name != plain:  # a base's own spacing would contradict it
        spacing |= {"use_exponential_sigmas": False, "use_beta_sigmas": False}
    takes = inspect.signature(kind.__init__).parameters
    spacing = {key: value for key, value in spacing.items() if key in takes}
    made = kind.from_config({**scheduler.config, **spacing, **settings})
    if plain == "lcm" and steps > (most := int(made.config["original_inference_steps"])):
        raise UserError(f"lcm takes at most {most} steps, not {steps}; 4 to 8 are usual", "out-of-range")
    return DiffusersSolver(made, steps, device, length=len(scheduler.alphas_cumprod))
