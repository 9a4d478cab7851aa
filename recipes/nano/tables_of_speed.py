"""What is told of speed and memory, from the JSON files in benchmarks/results that the scripts in benchmarks write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from results import Missing, Results, table, two

from controlkit.files import read_json

Rows = list[list[str]]


def content(results: Results, file: str) -> Mapping[str, Any]:
    """The file of a benchmark: `setting`, `machine`, `cases`.

    Raises:
        Missing: there is none.
    """
    path = results.benchmarks / f"{file}.json"
    if not path.is_file():
        raise Missing(file)
    found: Mapping[str, Any] = read_json(path)
    return found


def cases(results: Results, file: str) -> list[Mapping[str, Any]]:
    """The cases of a benchmark; raises as `content`."""
    found: list[Mapping[str, Any]] = content(results, file)["cases"]
    return found


def title(results: Results, file: str, *names: str) -> str:
    """A row's title from the setting of its run: base, the settings of these names, and the card.

    Args:
        names: of `steps`, `seeds`, `batch`, `rank`, `checkpointing`, `rounds`.
    """
    found = content(results, file)
    setting = found["setting"]
    words = [{"sd15": "SD1.5"}.get(setting["base"], setting["base"])]
    for name in names:
        value = setting.get(name)
        if name == "checkpointing":
            words += ["`--no-checkpointing`"] if value is False or file.endswith("no-checkpointing") else []
        elif name == "seeds":
            words += [f"{value} images"] if value > 1 else []
        elif name in ("steps", "rounds"):
            words.append(f"{value} {name if value > 1 else name.removesuffix('s')}")
        else:
            words.append(f"{name} {value}")
    card = found["machine"].get("accelerator", "").split()
    return ", ".join([*words, *card[-1:]])


def seconds(value: float, digits: int = 3) -> str:
    """Significant digits, two or more."""
    return f"{value:#.{digits}g}".rstrip(".")


def ratio(values: Mapping[str, float]) -> str:
    """A median with its spread; of a single round there is none."""
    if values["lowest"] == values["highest"]:
        return f"{two(values['median'])} (one round)"
    return f"{two(values['median'])} ({two(values['lowest'])} to {two(values['highest'])})"


def small(value: float) -> str:
    """A difference, in two digits."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


# Sampling

_CTRLORA = (
    "ctrlora_sampling-nano-64-cpu",
    "ctrlora_sampling-sd15-256-cpu-1-seed",
    "ctrlora_sampling-sd15-256-cpu",
    "ctrlora_sampling-sd15-256-cpu-4-seeds",
    "ctrlora_sampling-sd15-512-cuda",
)


def ctrlora_sampling(results: Results) -> str:
    """Sampling with CtrLoRA."""
    rows, before = [], ""
    for file in _CTRLORA:
        name = title(results, file, "steps")
        for case in cases(results, file):
            taken = [seconds(case["seconds"][way]["median"]) for way in ("base", "reference", "plan", "again")]
            counts = [str(case["conditions"]), str(case["seeds"])]
            again = two(case["again_to_base"]["median"])
            rows.append(["" if name == before else name, *counts, *taken, ratio(case["reference_to_plan"]), again])
            before = name
    head = ("base", "conditions", "images", "no control s", "reference s", "plan s", "again s")
    return table((*head, "reference / plan", "again / no control"), rows)


_CONTROLNET = (
    "controlnet_sampling-nano-64-cpu",
    "controlnet_sampling-sd15-256-cpu",
    "controlnet_sampling-sd15-512-cuda",
)
_CASES = ("always on", "ends at half of the steps", "conditional branch only")


def controlnet_sampling(results: Results) -> str:
    """Sampling with a ControlNet."""
    rows = []
    for file in _CONTROLNET:
        base = title(results, file, "steps", "seeds", "rounds")
        for place, (case, name) in enumerate(zip(cases(results, file), _CASES, strict=True)):
            taken = [seconds(case["seconds"][way]["median"]) for way in ("ours", "diffusers")]
            rows.append(["" if place else base, name, *taken, ratio(case["diffusers_to_ours"])])
    return table(("base", "control", "ours s", "diffusers s", "diffusers / ours"), rows)


# Training

_ADAPTER = (
    "adapter_training-nano-64-cpu-no-checkpointing",
    "adapter_training-sd15-256-cpu",
    "adapter_training-sd15-256-cpu-no-checkpointing",
    "adapter_training-sd15-512-cuda-no-checkpointing",
    "adapter_training-sd15-512-cuda-batch-4",
)
_WHOLE = (
    "controlnet_training-nano-64-cpu",
    "controlnet_training-sd15-256-cpu",
    "controlnet_training-sd15-512-cuda-batch-4",
)


def _training(files: Sequence[str], settings: Sequence[str], reference: str, shorter: str) -> Callable[[Results], str]:
    def make(results: Results) -> str:
        rows = []
        for file in files:
            (case,) = cases(results, file)
            taken = [seconds(case["seconds_a_step"][way]["median"]) for way in ("ours", "reference")]
            difference = small(case["largest_difference_of_losses"])
            base = title(results, file, *settings)
            rows.append([base, *taken, ratio(case["reference_to_ours"]), difference])
        head = ("base", "ours s", f"{reference} s", f"{shorter} / ours", "largest difference of losses")
        return table(head, rows)

    return make


adapter_training = _training(_ADAPTER, ("batch", "rank", "checkpointing"), "reference", "reference")
controlnet_training = _training(_WHOLE, ("batch",), "diffusers' script", "script")


# Memory

_WAYS = {
    "as the reference does": "adapter of rank 128, as the reference, without checkpointing",
    "without gradients that no one uses": "no unused gradients",
    "+ text encoder and autoencoder aside": "+ text encoder and autoencoder offloaded",
    "+ bf16 arithmetic": "+ bf16 arithmetic (autocast keeps copies of the weights)",
    "+ frozen weights in bf16": "+ frozen weights in bf16: `precision: bf16`",
    "+ gradient checkpointing": "+ gradient checkpointing",
    "+ 8-bit optimiser": "+ 8-bit optimiser",
    "ours, bf16, base as a graph": "`precision: bf16`, base as a CUDA graph",
    "ControlNet, float32, nothing saved": "full ControlNet, float32",
    "ControlNet, bf16": "full ControlNet, bf16",
    "ControlNet, bf16, base as a graph": "full ControlNet, bf16, base as a CUDA graph",
    "ControlNet, all switches": "full ControlNet, all switches",
}


def _peaks(results: Results, file: str) -> dict[str, Mapping[str, float]]:
    return {case["way"]: case["mebibytes"] for case in cases(results, file)}


def memory(results: Results) -> str:
    """Peak memory of a training step."""
    counted, measured = (_peaks(results, f"memory-sd15-512-{device}") for device in ("cpu", "cuda"))
    if absent := _WAYS.keys() - counted.keys():
        raise Missing(f"memory-sd15-512-cpu: {', '.join(sorted(absent))}")
    rows = []
    for way, title in _WAYS.items():
        parts = [f"{counted[way][part]:,.0f}" for part in ("peak", "weights", "gradients", "optimiser", "rest")]
        rows.append([title, *parts, f"{measured[way]['peak']:,.0f}" if way in measured else ""])
    head = ("what", "counted peak", "weights", "gradients", "optimiser", "the rest", "measured peak, H200")
    return table(head, rows)


# What pays

_SWITCHES = {
    "channels_last": "channels_last, a UNet call",
    "bf16": "bf16 weights, a UNet call",
    "bf16 steps": "bf16 autocast, a UNet's passes forward and backward",
    "fp32 attention in bf16 steps": "the same, attention in float32",
    "guidance in one batch": "both CFG branches in one batch",
    "LoRA folded": "LoRA of rank 128 merged for the call, a control call",
    "fused optimiser": "fused AdamW",
}


def what_pays(file: str, title: str) -> Callable[[Results], str]:
    """Optimisations, each against the same work without it."""

    def make(results: Results) -> str:
        rows = []
        for case in cases(results, file):
            taken = [seconds(case["seconds"][way]["median"]) for way in ("without", "with")]
            rows.append([_SWITCHES.get(case["switch"], case["switch"]), *taken, ratio(case["without_to_with"])])
        return table((title, "without s", "with s", "without / with"), rows)

    return make


_WAITS = ("ours", "spinning", "passive", "one thread")
_WORK = {
    "demo": ("demo, alone", "demo, beside one busy process"),
    "train": (
        "{steps} training steps of a ControlNet on nano, batch {batch}, alone",
        "the same, beside one busy process",
    ),
}
"""Work of `busy_machine.py` => rows, alone and beside a busy process."""


def busy_table(results: Results) -> str:
    """Ways to wait for another thread, on a quiet and on a busy machine."""
    case = cases(results, "busy_machine-nano-64-cpu")[0]
    rows = [
        [title.format(**case), *(seconds(case["seconds"][f"{work}, {wait}, {when}"]["median"]) for wait in _WAITS)]
        for work, titles in _WORK.items()
        for title, when in zip(titles, ("alone", "busy"), strict=True)
    ]
    return table(("", "ours", "300,000 spins", "no spin", "one thread"), rows)


# Single figures


def time_of(file: str, *path: str | int, case: int = 0) -> Callable[[Results], str]:
    """The median of one way, such as `seconds`, `ours`."""

    def make(results: Results) -> str:
        value = _median(cases(results, file)[case], path)
        return f"{seconds(value, 2 if value < 1 else 3)} s"

    return make


def ratio_of(file: str, name: str, *, case: int = 0) -> Callable[[Results], str]:
    """The median of a ratio."""
    return lambda results: two(cases(results, file)[case][name]["median"])


def peak_of(way: str) -> Callable[[Results], str]:
    """The measured peak of a way, in MiB."""
    return lambda results: f"{_peaks(results, 'memory-sd15-512-cuda')[way]['peak']:,.0f}"


def _median(values: Any, path: Sequence[str | int]) -> float:
    for name in path:
        values = values[name]
    return float(values["median"] if isinstance(values, Mapping) else values)
