"""A study's figure, and its sheet of images."""

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
"""Part -> (field along the axis, field that separates lines, label of the axis)."""


def require_matplotlib() -> None:
    """Refuse to begin what will end with a figure that cannot be drawn.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError("drawing the figure needs matplotlib; run: pip install 'controlkit[studies]'") from error


def plot(made: Mapping[str, Sequence[Cell]], path: Path) -> Path:
    """Draw the gap closed of every part's cells into the PNG `path`: one panel for each condition and part.

    Raises:
        UserError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    panels: list[tuple[str, Sequence[Cell], str, str | None, str]] = []
    budgets = made.get("budgets", ())
    for task in dict.fromkeys(cell.task for cell in budgets):
        panels.append((task, [cell for cell in budgets if cell.task == task], "steps", "method", "optimiser steps"))
    for part, cells in made.items():
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
        own = [cell for cell in cells if not by or getattr(cell, by) == line]
        places: list[Any] = [getattr(cell, along) for cell in own]
        axis.plot(places, [cell.gap_closed for cell in own], marker="o", markersize=4, label=line)
    places = sorted({getattr(cell, along) for cell in cells})
    axis.set_xscale("log")
    axis.set_xticks(places, [f"{place:g}" for place in places])
    axis.minorticks_off()
    axis.axhline(0, color="gray", linewidth=0.7)
    axis.axhline(1, color="gray", linewidth=0.7, linestyle=":")
    axis.set(title=title, xlabel=label, ylabel="gap closed")
    axis.legend(fontsize=8)


def sheet_of(cells: Sequence[Cell], tasks: Mapping[str, Task], bench: Bench, steps: int) -> Path:
    """A sheet of what was given, what each method drew after `steps` (or the nearest budget), and the truth."""
    rows: list[Sequence[Image.Image]] = []
    titles: list[str] = []
    for name, task in tasks.items():
        own = [cell for cell in cells if cell.task == name]
        nearest = min({cell.steps for cell in own}, key=lambda budget: abs(budget - steps))
        strips = {cell.method: bench.sheet_path(cell.run, nearest) for cell in own if cell.steps == nearest}
        count = 8
        side = bench.base.size
        rows.append([Image.fromarray(image).resize((side, side)) for image in task.judged.given[:count]])
        titles.append(f"{name}: given")
        for method, path in strips.items():
            strip = read_image(path)
            cell = strip.height
            rows.append(
                [strip.crop((i * cell, 0, (i + 1) * cell, cell)) for i in range(min(count, strip.width // cell))]
            )
            titles.append(f"{method}, {nearest} steps")
        rows.append([Image.fromarray(image) for image in task.judged.truths[:count]])
        titles.append("truth")
    path = bench.folder / f"new-condition-{bench.key}-images.png"
    write_png(path, contact_sheet(rows, row_titles=titles, cell=72))
    return path
