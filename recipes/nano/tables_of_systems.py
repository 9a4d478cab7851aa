"""What is told of the other systems on nano."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from results import Results, measure_of, report_titled, rounded, table, three, two

_SYSTEMS = {
    "controlnet-mlp": "ControlNet-mlp",
    "controlnet-lite": "ControlNet-lite, the paper's design",
    "t2i-adapter": "T2I-Adapter",
    "controlnet-precomputed": "precomputed ControlNet, the condition alone",
    "controlnet-precomputed-text": "precomputed ControlNet, condition and text",
    "ctrlora-full": "CtrLoRA's network: condition, text, time",
    "controlnet-xs": "ControlNet-XS, half of the channels",
    "controlnet": "ControlNet",
    "shipped": "ControlNet, shipped",
}


def systems_table(results: Results) -> str:
    """Systems trained alike on canny."""

    def ends(name: str) -> list[str]:
        gap = {"baseline": "0", "ceiling": "1"}[name]
        found = [first["facts"][images] for images in ("held-out", "openmoji")]
        scores = [f"{facts[name]:z.3f}, {gap}" for facts in found]
        return [*scores, ", ".join(_whole(facts.get(f"fd_lite0_{name}")) for facts in found)]

    measured = results.labels("systems")
    first = results.report("systems", measured[0])
    rows = [["no control", "", "", "", *ends("baseline")]]
    for system, title in _SYSTEMS.items():
        if system not in measured:
            continue
        entry = results.run("systems", system)
        once, each = entry["gflop"]
        cost = f"{each:.3f}" if each else f"0 ({once:.3f} once)"
        sets = [entry["reports"][0]["facts"][images] for images in ("held-out", "openmoji")]
        followed = [f"{facts['control']:.3f}, {facts['gap_closed']:.2f}" for facts in sets]
        distances = ", ".join(_whole(facts.get("fd_lite0")) for facts in sets)
        seconds = entry.get("seconds_of_a_step")
        steps = f"{entry['steps']:,}" + ("" if seconds is None else f", {entry['steps'] * seconds / 60:.0f} min")
        rows.append([title, f"{entry['parameters']:,}", cost, steps, *followed, distances])
    rows.append(["ceiling", "", "", "", *ends("ceiling")])
    columns = (
        "held-out concepts: edge F1, gap closed",
        "OpenMoji: edge F1, gap closed",
        "FD-lite0: held-out, OpenMoji",
    )
    return table(("system", "parameters", "GFLOP per step", "steps trained", *columns), rows)


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def conditions_table(file: str) -> Callable[[Results], str]:
    """Each condition of one control that has several."""

    def make(results: Results) -> str:
        report = results.report(file)
        # Only controls of one base are compared.
        of_one_base = results.base_of("adapters") == results.base_of(file)
        adapters = results.report("adapters", "control")["facts"] if of_one_base else {}
        rows = []
        for name, sets in report["facts"].items():
            condition = name.rpartition(", ")[2]
            measure, digits = measure_of(report, name)
            held = sets["held-out"]
            own = adapters.get(f"nano/{condition}")
            values = [rounded(held[key], digits) for key in ("baseline", "control", "ceiling")]
            closed = [] if own is None else _closed(own)
            rows.append([condition, measure, *values, *_closed(sets), ", ".join(closed)])
        head = ("condition", "measure", "no control", "control", "ceiling", "gap closed", "OpenMoji: gap closed")
        if not of_one_base:
            return table(head, [row[: len(head)] for row in rows])
        return table((*head, "CtrLoRA adapter: held-out, OpenMoji"), rows)

    return make


def _closed(sets: Mapping[str, Mapping[str, float]]) -> list[str]:
    return [two(sets[images]["gap_closed"]) for images in ("held-out", "openmoji")]


def image_prompt_table(results: Results) -> str:
    """What results take from an image prompt."""
    rows = []
    for prompt, weight, right, distance in results.report("image-prompt")["rows"]:
        told = weight if isinstance(weight, str) else f"{weight:g}"
        rows.append([prompt, told, two(right), f"{distance:.0f}"])
    return table(("prompt", "weight of the image prompt", "right concept", "distance"), rows)


_TOGETHER = {
    "t2i-adapter": "T2I-Adapter",
    "controlnet-precomputed": "precomputed ControlNet, the condition alone",
    "controlnet-precomputed-text": "precomputed ControlNet, condition and text",
    "controlnet-lite": "ControlNet-lite",
    "controlnet-mlp": "ControlNet-mlp",
    "controlnet-xs": "ControlNet-XS",
    "ctrlora-full": "CtrLoRA's network",
}


def several_systems_table(results: Results) -> str:
    """Systems together with an adapter."""
    found: dict[str, list[Sequence[Any]]] = {}
    for mix, *row in results.report("several-systems")["rows"]:
        found.setdefault(mix, []).append(row)
    rows = []
    for canny, other in found.values():
        values = [f"{two(alone)}, {two(both)}" for _, alone, both, *_ in (canny, other)]
        rows.append([_TOGETHER[Path(canny[0]).stem], other[0], *values])
    return table(("canny by", "with", "canny: alone, together", "the other: alone, together"), rows)


def task_instructions_table(results: Results) -> str:
    """UniControl under its tasks' own and other instructions."""
    own, frozen = (report_titled(results, "task-instructions", start)["rows"] for start in _INSTRUCTIONS)
    rows = []
    for (condition, value, others, _), (_, _, without, difference, low, high) in zip(own, frozen, strict=False):
        rows.append([condition, *map(two, (value, others, without)), f"{two(difference)} ({two(low)} to {two(high)})"])
    _, trained, without, difference, low, high = frozen[-1]
    others = sum(row[2] for row in own) / len(own)
    mean = ["mean", *map(two, (trained, others, without)), f"{two(difference)} ({two(low)} to {two(high)})"]
    head = ("condition", "own instruction", "mean of the eight others", "HyperNet frozen", "difference, 95 % interval")
    return table(head, [*rows, [f"**{cell}**" for cell in mean]])


_INSTRUCTIONS = ("Gap closed under the task's own", "Gap closed with a trained")
"""How the titles of the reports begin."""

_SCENES = {
    "no boxes (baseline)": "no boxes",
    "swapped phrases": "boxes, phrases swapped (scored by the original ones)",
    "boxes": "boxes",
    "scenes through the autoencoder (ceiling)": "ceiling: the scenes through the autoencoder",
}


def scenes_table(results: Results) -> str:
    """GLIGEN on scenes of two icons."""
    report = results.report("scenes")
    rows = [[title, *map(three, report["facts"][name].values())] for name, title in _SCENES.items()]
    gaps = next(row for row in report["rows"] if row[0] == "gap closed")[1:]
    return table(("", "IoU", "concept, top-1", "concept, top-5"), [*rows, ["gap closed", *map(two, gaps)]])
