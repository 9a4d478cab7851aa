"""Figure and contact sheet of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from controlkit.errors import UserError
from controlkit.files import write_atomically
from controlkit.images import contact_sheet, read_image, write_png
from controlkit.studies.cells import Bench, Cell, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DETAILS = {
    "ablation": ("steps", "method", "optimiser steps"),
    "ranks": ("rank", None, "rank"),
    "pairs": ("pairs", None, "pairs"),
    "rates": ("rate", "method", "learning rate"),
}
"""Part -> (field on the x axis, field of the lines, label of the x axis)."""


def require_matplotlib() -> None:
    """Check for matplotlib before a study starts, since its figure comes last.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        message = "the figure needs matplotlib; run: pip install 'controlkit[studies]'"
        raise UserError(message, "missing-package") from error


def plot(cells_of: Mapping[str, Sequence[Cell]], path: Path) -> Path:
    """Plot the gap closed of the cells of every part into the PNG `path`, with one panel per condition and part.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    panels: list[tuple[str, Sequence[Cell], str, str | None, str]] = []
    budgets = cells_of.get("budgets", ())
    for task in dict.fromkeys(cell.task for cell in budgets):
        panels.append((task, [cell for cell in budgets if cell.task == task], "steps", "method", "optimiser steps"))
    for part, cells in cells_of.items():
        if part in _DETAILS and cells:
            along, by, label = _DETAILS[part]
            panels.append((f"{part}: {cells[0].task}", cells, along, by, label))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, cells, along, by, label) in zip(axes, panels, strict=False):
        _panel(axis, title, cells, along, by, label)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def _panel(axis: Axes, title: str, cells: Sequence[Cell], along: str, by: str | None, label: str) -> None:
    for line in dict.fromkeys(getattr(cell, by) if by else "adapter" for cell in cells):
        points = [cell for cell in cells if cell.steps and (not by or getattr(cell, by) == line)]
        x: list[Any] = [getattr(cell, along) for cell in points]
        axis.plot(x, [cell.gap_closed for cell in points], marker="o", markersize=4, label=line)
    for untrained in (cell for cell in cells if not cell.steps):  # 0 has no place on a logarithmic axis
        axis.axhline(untrained.gap_closed, color="C0", linewidth=0.9, linestyle="--", label="base control alone")
    ticks = sorted({getattr(cell, along) for cell in cells if cell.steps})
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.axhline(0, color="gray", linewidth=0.7)
    axis.axhline(1, color="gray", linewidth=0.7, linestyle=":")
    axis.set(title=title, xlabel=label, ylabel="gap closed")
    axis.legend(fontsize=8)


def sheet_of(cells: Sequence[Cell], tasks: Mapping[str, Task], bench: Bench, steps: int, path: Path) -> None:
    """Write a contact sheet: condition, results of each method after `steps` (or its nearest budget), target."""
    rows: list[Sequence[Image.Image]] = []
    titles: list[str] = []
    for name, task in tasks.items():
        of_task = [cell for cell in cells if cell.task == name]
        strips: dict[str, Path] = {}
        for method in dict.fromkeys(cell.method for cell in of_task):
            cell = min((c for c in of_task if c.method == method), key=lambda cell: abs(cell.steps - steps))
            strips[f"{method}, {cell.steps} steps"] = bench.sheet_path(task, cell.run, cell.steps)
        count = 8
        side = bench.base.size
        rows.append([Image.fromarray(image).resize((side, side)) for image in task.eval_set.condition_images[:count]])
        titles.append(f"{name}: condition")
        for title, strip_path in strips.items():
            strip = read_image(strip_path)
            tile = strip.height
            rows.append(
                [strip.crop((i * tile, 0, (i + 1) * tile, tile)) for i in range(min(count, strip.width // tile))]
            )
            titles.append(title)
        rows.append([Image.fromarray(image) for image in task.eval_set.targets[:count]])
        titles.append("target")
    write_png(path, contact_sheet(rows, row_titles=titles, cell=72))
