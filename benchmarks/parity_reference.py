"""Our controls against the reference implementations, at the full size of Stable Diffusion 1.5.

    git clone https://github.com/xyfJASON/ctrlora
    git clone https://github.com/lllyasviel/ControlNet
    git clone -b SD https://github.com/TencentARC/T2I-Adapter
    pip install einops
    python benchmarks/parity_reference.py --ctrlora ctrlora --controlnet ControlNet --t2i-adapter T2I-Adapter

The reference networks are built from the clones' own classes and configurations, get random weights (every tensor,
also those that start from zero), and are saved as the clones save them. `load_control` reads these files, and both
sides compute the 13 residuals of the same inputs, in float32. Then the files are converted to our layout and back, and
the reference's network takes what comes back, with `strict=True`.

- ControlNet: `cldm/cldm.py`, one `.pth` of `control_model.*`, as version 1.1 has them.
- T2I-Adapter: `ldm/modules/encoders/adapter.py` with the settings of `ldm/inference_base.py`; four features of a
  condition image.
- CtrLoRA: `cldm/cldm_ctrlora_finetune.py` (the base control alone, one adapter) and
  `cldm/cldm_ctrlora_inference.py` (two adapters, summed with weights), the files of `scripts/tool_extract_weights.py`.
  Both sides get the same latent in the place of the condition image; the autoencoder is not part of it.

What the clones import besides torch, numpy and einops is not needed for these classes; modules without content stand
in for it. Baselines with status 1 if a difference is above `--tolerance`.

`--dtype float64` tells rounding from anything else: a ControlNet and one adapter, smaller latents. In the reference's
networks the casts to float32 are then left out.

Needs about 8 GB of memory and 10 GB of disk.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import diffusers
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from controlkit import __version__
from controlkit.bases.text import Text
from controlkit.controls.control import Control
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.formats.convert import convert
from controlkit.formats.load import load_control

SIZES = ((32, 32), (32, 24))
"""Heights and widths of the latents."""
SMALL_SIZES = ((16, 16), (8, 16))
"""The same where the arithmetic is float64."""
TIMES = (21, 801)
WEIGHTS = (0.7, 0.5)
"""Of the two adapters that are summed."""

CONTROLNET = "models/cldm_v15.yaml"
FINETUNE = "configs/ctrlora_finetune_sd15_rank128.yaml"
"""Configurations of the clones."""

T2I_ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "T2I-Adapter": ("Adapter", {"cin": 192, "nums_rb": 2, "ksize": 1, "sk": True, "use_conv": False}),
    "T2I-Adapter, grey": ("Adapter", {"cin": 64, "nums_rb": 2, "ksize": 1, "sk": True, "use_conv": False}),
    "T2I-Adapter, light": ("Adapter_light", {"cin": 192, "nums_rb": 4}),
}
"""Case -> class and arguments of the clone (`get_adapters` of ldm/inference_base.py)."""

_PREFIX = "control_model."
_GAINS = {"lora_layer.up": 0.3, "input_hint_block": 1.8}
"""Part of a name -> size of such weights, relative to what keeps the size of activations: a hint network has nothing
that brings them back to size."""
_NOT_NEEDED = (
    "omegaconf",
    "omegaconf.listconfig",
    "torchvision",
    "torchvision.utils",
    "ldm.models.diffusion.ddpm",
    "ldm.models.diffusion.ddim",
    "cldm.ddim_hacked",
    "ldm.modules.extra_condition.api",
)
"""What the clones' modules import and the networks of the controls never use."""
_NOT_WANTED = ("xformers", "xformers.ops")
"""What the clones use if it is there."""


@dataclass(frozen=True)
class Inputs:
    """One batch: the first row, and rows that differ from it in one thing each, the last in all."""

    noise: Tensor
    hint: Tensor
    time: Tensor
    text: Tensor

    ROWS = ("first", "noise", "hint", "time", "text", "all")

    @classmethod
    def draw(cls, size: tuple[int, int], hint: tuple[int, int, int], seed: int) -> Inputs:
        """Random latents, texts and hints (`hint`: channels, height, width)."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(2, 4, *size, generator=generator)
        text = torch.randn(2, 77, 768, generator=generator)
        image = hint[0] == 3
        hints = (torch.rand if image else torch.randn)(2, *hint, generator=generator)

        def rows(what: str) -> list[int]:
            return [int(row in (what, "all")) for row in cls.ROWS]

        time = torch.tensor(TIMES)
        return cls(noise[rows("noise")], hints[rows("hint")], time[rows("time")], text[rows("text")])

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers, times apart, in another dtype."""
        return Inputs(self.noise.to(dtype), self.hint.to(dtype), self.time, self.text.to(dtype))


Run = Callable[[Inputs], Sequence[Tensor]]
"""A network: inputs -> its 13 residuals."""


class _StandIn(ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


@contextmanager
def importing(clone: Path) -> Iterator[None]:
    """Make the modules of a clone importable; both clones call theirs the same, so they are forgotten afterwards."""

    def theirs() -> list[str]:
        own = [name for name in sys.modules if name.split(".")[0] in ("cldm", "ldm")]
        return [*own, *(name for name in (*_NOT_NEEDED, *_NOT_WANTED) if name in sys.modules and name not in own)]

    before = {name: sys.modules.pop(name) for name in theirs()}
    path = list(sys.path)
    sys.modules.update({name: _StandIn(name) for name in _NOT_NEEDED})
    sys.modules.update(dict.fromkeys(_NOT_WANTED))  # type: ignore[arg-type]
    sys.path.insert(0, str(clone))
    try:
        yield
    finally:
        sys.path[:] = path
        for name in theirs():
            del sys.modules[name]
        sys.modules.update(before)


def build(clone: Path, config: str, **changes: Any) -> nn.Module:
    """The control network that a configuration of a clone describes, with the clone's own classes."""
    described = yaml.safe_load((clone / config).read_text(encoding="utf-8"))
    stage = described["model"]["params"]["control_stage_config"]
    module, _, name = stage["target"].rpartition(".")
    with importing(clone):
        network = getattr(importlib.import_module(module), name)(**{**stage["params"], **changes})
    return network.eval().requires_grad_(False)


def extraction(clone: Path) -> Any:
    """The script by which CtrLoRA writes its files."""
    path = clone / "scripts" / "tool_extract_weights.py"
    with importing(clone):
        spec = importlib.util.spec_from_file_location("tool_extract_weights", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def randomise(network: nn.Module, seed: int, names: Callable[[str], bool] = lambda name: True) -> None:
    """Draw every tensor whose name passes, such that activations keep about their size from layer to layer."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if not names(name):
            continue
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            drawn /= parameter[0].numel() ** 0.5
            drawn *= next((gain for part, gain in _GAINS.items() if part in name), 1.0)
        else:
            drawn = drawn * 0.1 + (0.0 if name.endswith("bias") else 1.0)
        parameter.data.copy_(drawn)


def prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as they are in the clones' files, from those in the network."""
    return {f"{_PREFIX}{name}": value for name, value in state.items()}


def bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as they are in the network, from those in the clones' files."""
    return {name.removeprefix(_PREFIX): value for name, value in state.items()}


def in_double(network: nn.Module) -> nn.Module:
    """A network of a clone in float64, without its casts to float32 (and none in the attention: see `float64`)."""
    network.double()
    network.dtype = torch.float64  # type: ignore[assignment]
    network.time_embed.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = MethodType(nn.GroupNorm.forward, module)
    return network


def compute(run: Run, channels: int, factor: int, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """The residuals of a network for the inputs of every size."""
    made = {}
    for seed, size in enumerate(SIZES if dtype == torch.float32 else SMALL_SIZES):
        inputs = Inputs.draw(size, (channels, size[0] * factor, size[1] * factor), seed).to(dtype)
        with torch.no_grad():
            made[f"{size[0]} x {size[1]}"] = [tensor.clone() for tensor in run(inputs)]
    return made


def rms(tensor: Tensor) -> float:
    """Root of the mean of the squares."""
    return float(tensor.double().square().mean().sqrt())


def difference(ours: Mapping[str, list[Tensor]], theirs: Mapping[str, list[Tensor]], count: int = 13) -> dict[str, Any]:
    """Figures of two sets of `count` residuals: absolute, and relative to the size of each residual."""
    for size, tensors in theirs.items():
        shapes = [[tuple(tensor.shape) for tensor in one] for one in (ours[size], tensors)]
        if len(tensors) != count or shapes[0] != shapes[1]:
            raise SystemExit(f"latent {size}: the residuals have the shapes {shapes[0]} and {shapes[1]}")
    pairs = {size: list(zip(ours[size], theirs[size], strict=True)) for size in theirs}
    apart = {size: max(float((a - b).abs().max()) for a, b in each) for size, each in pairs.items()}
    every = [pair for each in pairs.values() for pair in each]
    return {
        "largest_difference": max(apart.values()),
        "by_latent": apart,
        "largest_relative_difference": max(float((a - b).abs().max()) / rms(b) for a, b in every),
        "rms_of_residuals": [min(rms(b) for _, b in every), max(rms(b) for _, b in every)],
        "largest_residual": max(float(b.abs().max()) for _, b in every),
    }


def influence(made: Mapping[str, list[Tensor]]) -> dict[str, float]:
    """How far each input moves the middle's residual, relative to its size: the comparison would see it."""
    middle = next(iter(made.values()))[-1]
    rows = range(1, len(Inputs.ROWS) - 1)
    return {Inputs.ROWS[row]: rms(middle[row] - middle[0]) / rms(middle[0]) for row in rows}


def same_tensors(back: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> dict[str, Any]:
    """Whether a file came back bit for bit."""
    equal = back.keys() == first.keys() and all(torch.equal(back[name], value) for name, value in first.items())
    return {"tensors": len(first), "bit_for_bit": equal}


def there_and_back(source: Path, folder: Path, **options: Any) -> dict[str, Tensor]:
    """The tensors of a file of the reference after a conversion to our layout and back, under the network's names."""
    ours, back = folder / "ours.safetensors", folder / "back.safetensors"
    convert(source, ours, "controlkit", **options)
    convert(ours, back, "original")
    tensors = {name: value.clone() for name, value in bare(load_file(back)).items()}
    ours.unlink()
    back.unlink()
    return tensors


def their_controlnet(network: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """What a ControlNet of the reference computes."""
    return compute(lambda x: network(x=x.noise, hint=x.hint, timesteps=x.time, context=x.text), 3, 8, dtype)


def our_controlnet(file: Path, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """What our ControlNet of a file computes."""
    control = load_control(file).to(dtype)
    assert isinstance(control, ControlNet)
    hint_network = control.hint_network
    return compute(lambda x: control(x.noise, x.time, Text(x.text), hint_network(x.hint)).tensors(), 3, 8, dtype)


def their_ctrlora(network: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """What a control network of CtrLoRA's reference computes."""
    return compute(lambda x: network(hint=x.hint, timesteps=x.time, context=x.text), 4, 1, dtype)


def our_ctrlora(control: Control, dtype: torch.dtype = torch.float32) -> dict[str, list[Tensor]]:
    """What our CtrLoRA, or base control, computes."""
    control.to(dtype)
    return compute(lambda x: control(None, x.time, Text(x.text), x.hint).tensors(), 4, 1, dtype)


def save_controlnet(clone: Path, file: Path) -> nn.Module:
    """A ControlNet of the reference, and its file."""
    network = build(clone, CONTROLNET)
    randomise(network, 1)
    torch.save(prefixed(network.state_dict()), file)
    return network


def save_ctrlora(clone: Path, files: Mapping[str, Path]) -> nn.Module:
    """The files of a base control and two adapters of the reference, and its network with the first."""
    network, script = build(clone, FINETUNE), extraction(clone)
    randomise(network, 2)
    torch.save(script.extract_control(prefixed(network.state_dict())), files["base"])
    for seed, name in ((4, "second"), (3, "first")):
        randomise(network, seed, lambda name: bool(script.extract_lora(prefixed({name: torch.empty(0)}))))
        torch.save(script.extract_lora(prefixed(network.state_dict())), files[name])
    return network


def compare_controlnet(clone: Path, folder: Path) -> dict[str, Any]:
    """ControlNet: one file."""
    file = folder / "control.pth"
    expected = their_controlnet(save_controlnet(clone, file))
    figures = difference(our_controlnet(file), expected)
    state = there_and_back(file, folder)
    network = build(clone, CONTROLNET)
    network.load_state_dict(state, strict=True)
    back = same_tensors(state, bare(torch.load(file, weights_only=True)))
    file.unlink()
    back["largest_difference"] = difference(their_controlnet(network), expected)["largest_difference"]
    return {"ControlNet": {**figures, "influence": influence(expected), "there_and_back": back}}


def compare_ctrlora(clone: Path, folder: Path) -> dict[str, Any]:
    """CtrLoRA: the base control alone, an adapter on it, the two merged, and two adapters."""
    files = {name: folder / f"{name}.ckpt" for name in ("base", "first", "second")}
    expected = {"adapter": their_ctrlora(save_ctrlora(clone, files))}
    base_alone = _without_lora(bare(torch.load(files["base"], weights_only=True)))
    network = build(clone, FINETUNE, ft_with_lora=False)
    network.load_state_dict(base_alone, strict=True)
    expected["base"] = their_ctrlora(network)
    del network
    expected["two"] = _two_of_theirs(clone, files)

    # Ours from the same files.
    cases = {}
    made = _our_cases(files, folder)
    for name, key in _CASES.items():
        cases[name] = difference(made[name], expected[key])
        cases[name]["influence"] = {k: v for k, v in influence(expected[key]).items() if k != "noise"}
    del made

    # Back into theirs.
    back = _without_lora(there_and_back(files["base"], folder))
    report = same_tensors(back, base_alone)
    network = build(clone, FINETUNE, ft_with_lora=False)
    network.load_state_dict(back, strict=True)
    report["largest_difference"] = difference(their_ctrlora(network), expected["base"])["largest_difference"]
    cases["CtrLoRA, base control alone"]["there_and_back"] = report
    del network, base_alone

    adapter = there_and_back(files["first"], folder, base_control=files["base"])
    report = same_tensors(adapter, bare(torch.load(files["first"], weights_only=True)))
    network = build(clone, FINETUNE)
    network.load_state_dict({**back, **adapter}, strict=True)
    report["largest_difference"] = difference(their_ctrlora(network), expected["adapter"])["largest_difference"]
    cases["CtrLoRA, one adapter"]["there_and_back"] = report
    return cases


def compare_t2i_adapter(clone: Path, folder: Path) -> dict[str, Any]:
    """T2I-Adapter: the features of a condition image."""
    cases = {}
    for seed, (case, (name, settings)) in enumerate(T2I_ADAPTERS.items(), 5):
        with importing(clone):
            module = importlib.import_module("ldm.modules.encoders.adapter")
            network: nn.Module = getattr(module, name)(channels=[320, 640, 1280, 1280], **settings)
        network.eval().requires_grad_(False)
        randomise(network, seed)
        file = folder / "adapter.pth"
        torch.save(network.state_dict(), file)
        expected = compute(lambda x, network=network: network(x.hint), settings["cin"] // 64, 8)  # type: ignore[misc]
        control = load_control(file)
        made = compute(
            lambda x, control=control: control(None, x.time, None, x.hint).tensors(),  # type: ignore[misc]
            settings["cin"] // 64,
            8,
        )
        state = there_and_back(file, folder)
        network.load_state_dict(state, strict=True)
        cases[case] = {
            **difference(made, expected, count=4),
            "parameters": sum(value.numel() for value in state.values()),
            "there_and_back": same_tensors(state, torch.load(file, weights_only=True)),
        }
        file.unlink()
    return cases


_CASES = {
    "CtrLoRA, base control alone": "base",
    "CtrLoRA, one adapter": "adapter",
    "CtrLoRA, one adapter merged": "adapter",
    "CtrLoRA, two adapters in one pass": "two",
}
"""Case -> the residuals of the reference that it must match."""


def _without_lora(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The base control of its file, without the LoRA that base training left in it."""
    return {name: value for name, value in state.items() if "lora_layer" not in name}


def _two_of_theirs(clone: Path, files: Mapping[str, Path]) -> dict[str, list[Tensor]]:
    """The sum for two adapters by the class that draws images; files are loaded as in the clone's api.py."""
    network: Any = build(clone, "configs/inference/ctrlora_sd15_rank128_2loras.yaml")
    base = bare(torch.load(files["base"], weights_only=True))
    adapters = [bare(torch.load(files[name], weights_only=True)) for name in ("first", "second")]
    network.load_state_dict({name: base[name] for name in base.keys() - adapters[0].keys()}, strict=False)
    for place, adapter in enumerate(adapters):
        network.switch_lora(place)
        network.load_state_dict(adapter, strict=False)
        network.copy_weights_to_switchable()
    sums: dict[str, list[Tensor]] = {}
    for place, weight in enumerate(WEIGHTS):
        network.switch_lora(place)
        for size, tensors in their_ctrlora(network).items():
            scaled = [tensor * weight for tensor in tensors]
            sums[size] = [a + b for a, b in zip(sums[size], scaled, strict=True)] if size in sums else scaled
    return sums


def _our_cases(files: Mapping[str, Path], folder: Path) -> dict[str, dict[str, list[Tensor]]]:
    """What our classes make of the files, by case."""
    made = {"CtrLoRA, base control alone": our_ctrlora(load_control(files["base"])), **_our_adapters(files)}
    merged = folder / "merged.safetensors"
    convert(files["first"], merged, "merged", base_control=files["base"])
    made["CtrLoRA, one adapter merged"] = our_ctrlora(load_control(merged))
    merged.unlink()
    return made


def _our_adapters(files: Mapping[str, Path]) -> dict[str, dict[str, list[Tensor]]]:
    shared: dict[str, Control] = {}
    controls = [load_control(f"{files[name]}+{files['base']}", shared=shared) for name in ("first", "second")]

    def together(x: Inputs) -> Sequence[Tensor]:
        each = CtrLoRA.forward_together(controls, None, x.time, Text(x.text), [x.hint, x.hint])
        first, second = (one.scaled(weight) for one, weight in zip(each, WEIGHTS, strict=True))
        return (first + second).tensors()

    return {
        "CtrLoRA, one adapter": our_ctrlora(controls[0]),
        "CtrLoRA, two adapters in one pass": compute(together, 4, 1),
    }


def float64(controlnet: Path | None, ctrlora: Path | None, folder: Path) -> dict[str, Any]:
    """A ControlNet and one adapter in float64: whatever is left is no rounding of float32."""
    double, cases = torch.float64, {}
    # Read by both clones' ldm/modules/attention.py, when it is imported: anything but fp32 leaves the dtype alone.
    os.environ["ATTN_PRECISION"] = "as given"
    if controlnet is not None:
        file = folder / "control.pth"
        expected = their_controlnet(in_double(save_controlnet(controlnet, file)), double)
        cases["ControlNet"] = difference(our_controlnet(file, double), expected)
        file.unlink()
    if ctrlora is not None:
        files = {name: folder / f"{name}.ckpt" for name in ("base", "first", "second")}
        expected = their_ctrlora(in_double(save_ctrlora(ctrlora, files)), double)
        control = load_control(f"{files['first']}+{files['base']}")
        cases["CtrLoRA, one adapter"] = difference(our_ctrlora(control, double), expected)
    return cases


def commit_of(clone: Path) -> str | None:
    """The commit that a clone is at."""
    asked = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def processor() -> str:
    """What the processor calls itself."""
    with_names = Path("/proc/cpuinfo")
    if with_names.is_file():
        for line in with_names.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Compare, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctrlora", type=Path, help="a clone of xyfJASON/ctrlora")
    parser.add_argument("--controlnet", type=Path, help="a clone of lllyasviel/ControlNet")
    parser.add_argument("--t2i-adapter", type=Path, help="a clone of TencentARC/T2I-Adapter, branch SD (float32)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="relative to the size of a residual")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--work", type=Path, default=None, help="where to put files for a while (default: temporary)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/parity_reference.json"))
    args = parser.parse_args()
    if args.ctrlora is None and args.controlnet is None and (args.t2i_adapter is None or args.dtype == "float64"):
        parser.error("give --ctrlora, --controlnet or (in float32) --t2i-adapter")
    if importlib.util.find_spec("einops") is None:
        parser.error("the clones need einops; pip install einops")

    started = time.perf_counter()
    clones = {"lllyasviel/ControlNet": args.controlnet, "xyfJASON/ctrlora": args.ctrlora}
    controlnet, ctrlora = (None if clone is None else clone.resolve() for clone in clones.values())
    clones["TencentARC/T2I-Adapter"] = args.t2i_adapter
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        if args.dtype == "float64":
            cases = float64(controlnet, ctrlora, Path(folder))
        else:
            cases |= compare_controlnet(controlnet, Path(folder)) if controlnet is not None else {}
            cases |= compare_ctrlora(ctrlora, Path(folder)) if ctrlora is not None else {}
            if args.t2i_adapter is not None:
                cases |= compare_t2i_adapter(args.t2i_adapter.resolve(), Path(folder))
    for name, figures in cases.items():
        print(
            f"{name}: largest difference {figures['largest_difference']:.2g}"
            f" (relative {figures['largest_relative_difference']:.2g});"
            f" residuals reach {figures['largest_residual']:.3g}"
        )
        if "there_and_back" in figures:
            print(f"  there and back: {figures['there_and_back']}")
    setting = {
        "latents": [list(size) for size in (SIZES if args.dtype == "float32" else SMALL_SIZES)],
        "times": list(TIMES),
        "dtype": args.dtype,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "seconds": round(time.perf_counter() - started),
        "controlkit": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "references": {name: commit_of(clone) for name, clone in clones.items() if clone is not None},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"cases": cases, "setting": setting}, indent=2) + "\n", encoding="utf-8")
    worst = max(figures["largest_relative_difference"] for figures in cases.values())
    if worst > args.tolerance or not all(f.get("there_and_back", {}).get("bit_for_bit", True) for f in cases.values()):
        raise SystemExit(f"the largest relative difference, {worst:.2g}, or a file that came back, is not as it should")


if __name__ == "__main__":
    main()
