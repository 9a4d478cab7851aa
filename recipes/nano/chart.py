"""A chart of quality against cost: systems trained on the same images, from benchmarks/results/nano/systems.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlkit.files import write_atomically
from controlkit.studies.figure import require_matplotlib

STEPS = 20
"""Denoising steps of the image whose cost is shown."""
LADDER = ("controlnet-precomputed", "controlnet-precomputed-text", "ctrlora-full", "controlnet")
"""One network, ControlNet's copy of the encoder, that reads the condition, and then also text, time and noise."""
_LABELS = {
    "controlnet-mlp": "mlp",
    "controlnet-lite": "lite",
    "t2i-adapter": "T2I-Adapter",
    "controlnet-precomputed": "precomputed: condition",
    "controlnet-precomputed-text": "precomputed: + text",
    "ctrlora-full": "CtrLoRA's: + time",
    "controlnet-xs": "XS",
    "controlnet": "ControlNet: + noise",
}

_MARKERS = "vos^DP*X"


def gflop_of_image(entry: Mapping[str, Any]) -> float:
    """GFLOP of a control for one image of one condition.

    Args:
        entry: of a system, with `gflop`: once for a condition, and at each step.
    """
    once, each = entry["gflop"]
    return float(once + STEPS * each)


def draw_systems(runs: Mapping[str, Any], path: Path) -> None:
    """Draw the gap closed over the cost of an image into the PNG `path`, one panel for each set of images.

    Args:
        runs: system -> its entry in systems.json.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    shown = [system for system in _LABELS if system in runs]
    figure = Figure(figsize=(11.5, 4.2), layout="constrained", dpi=110)
    for axis, (images, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("held-out", "held-out concepts"), ("openmoji", "OpenMoji, a style that nano has not seen")),
        strict=True,
    ):
        points = {
            system: (gflop_of_image(runs[system]), runs[system]["reports"][0]["facts"][images]["gap_closed"])
            for system in shown
        }
        ladder = [points[system] for system in LADDER if system in points]
        axis.plot([cost for cost, _ in ladder], [gap for _, gap in ladder], color="tab:blue", linewidth=1, zorder=1)
        for number, (system, (cost, gap)) in enumerate(points.items()):
            colour = "tab:blue" if system in LADDER else "tab:gray"
            axis.scatter(cost, gap, s=60, color=colour, marker=_MARKERS[number], label=_LABELS[system], zorder=2)
        axis.axhline(1, color="gray", linewidth=0.7, linestyle=":")
        axis.set_xscale("log")
        axis.margins(0.1)
        axis.set(title=title, xlabel=f"GFLOP of the control for an image of {STEPS} steps")
        axis.set_ylabel("gap closed" if images == "held-out" else "")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
