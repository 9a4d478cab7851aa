"""What is told of the studies on nano."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from results import Missing, Results, report_titled, rounded, table, two

_NEW_CONDITIONS = {
    "palette": "palette",
    "pixel": "pixel",
    "openmoji": "OpenMoji's line art",
    "lineart_color_hints": "line art with colour hints",
    "haze": "haze (a restoration)",
}
"""Conditions of the study as the pages call them, in the order of their tables."""


# The study of new conditions


def _study(results: Results, file: str) -> Mapping[str, Any]:
    """Settings of a study."""
    settings: Mapping[str, Any] = results.report(file)["settings"]["study"]
    return settings


def _cells(results: Results, file: str) -> list[Mapping[str, Any]]:
    """The cells at the study's own rank and number of pairs; those of its other parts differ in one of them."""
    study = _study(results, file)
    cells = [cell for cell in results.run(file)["cells"] if cell["rank"] in (None, study["rank"])]
    most = {}
    for task in {cell["task"] for cell in cells}:
        counts = {cell["pairs"] for cell in cells if cell["task"] == task}
        # A folder of pairs that was given may hold more than the study makes of its own.
        most[task] = max((count for count in counts if count <= study["pairs"]), default=max(counts))
    return [cell for cell in cells if cell["pairs"] == most[cell["task"]]]


def _closed(cells: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, int], float]:
    return {(cell["task"], cell["method"], cell["steps"]): cell["gap_closed"] for cell in cells}


def _steps_of(values: Mapping[tuple[str, str, int], float], method: str = "adapter") -> list[int]:
    """The budgets; 0 is the base control alone."""
    return sorted({steps for _, name, steps in values if name == method})


def _conditions_of(values: Mapping[tuple[str, str, int], float]) -> dict[str, str]:
    tasks = {task for task, _, _ in values}
    return {task: title for task, title in _NEW_CONDITIONS.items() if task in tasks}


def _two(value: float | None) -> str:
    return "" if value is None else two(value)


def budgets_table(results: Results) -> str:
    """Gap closed by number of steps."""
    values = _closed(_cells(results, "new-condition"))
    steps = _steps_of(values)
    rows = [
        [f"{title}: {method}", *(_two(values.get((task, method, count))) for count in steps)]
        for task, title in _conditions_of(values).items()
        for method in ("adapter", "ControlNet")
    ]
    head = [f"{steps[0]} steps", *(f"{count:,}" for count in steps[1:])]
    return table(("condition: method", *head), rows)


def mode_table(results: Results) -> str:
    """The same in nano's own mode."""
    values = _closed(_cells(results, "new-condition-control"))
    steps = _steps_of(values)
    both = ("adapter", "ControlNet")
    rows = [
        [
            title,
            *(", ".join(two(values[task, method, n]) for method in both if (task, method, n) in values) for n in steps),
        ]
        for task, title in _conditions_of(values).items()
    ]
    head = [f"{steps[0]} steps", *(f"{count:,}" for count in steps[1:])]
    return table(("gap closed: adapter, ControlNet", *head), rows)


def claims_table(results: Results) -> str:
    """Which of CtrLoRA's claims hold."""
    report = next(one for one in results.run("new-condition")["reports"] if "reproduce" in one["title"])
    tasks = [task for task in _NEW_CONDITIONS if task in report["columns"]]
    at = {task: report["columns"].index(task) for task in tasks}
    shown = {"yes": "yes", "NO": "**no**"}
    rows = [[str(row[0]), *(shown[row[at[task]]] for task in tasks)] for row in report["rows"]]
    titles = [_NEW_CONDITIONS[task].partition(" (")[0] for task in tasks]
    return table(("the adapter is", *titles), rows)


_ABLATION = {
    "ControlNet": "ControlNet",
    "+ VAE embedding": "+ autoencoder instead of the hint network, no x_t",
    "+ base initialisation": "+ initialised from the base control",
    "adapter": "+ LoRA instead of all weights (the adapter)",
}


def ablation_table(results: Results) -> str:
    """From a ControlNet to the adapter, one change at a time."""
    detail = _study(results, "new-condition")["detail"]
    cells = [cell for cell in _cells(results, "new-condition") if cell["task"] == detail]
    values, trained = _closed(cells), {cell["method"]: cell["parameters"] for cell in cells}
    steps = _steps_of(values)
    rows = [
        [title, f"{trained[method]:,}", *(_two(values.get((detail, method, count))) for count in steps)]
        for method, title in _ABLATION.items()
    ]
    head = [f"{steps[0]} steps", *(f"{count:,}" for count in steps[1:])]
    return table(("method", "trained", *head), rows)


def ranks_and_pairs_table(results: Results) -> str:
    """Gap closed by rank and by number of pairs."""
    ranks = report_titled(results, "new-condition", "Rank,")["rows"]
    pairs = report_titled(results, "new-condition", "Pairs,")["rows"]
    rows = [
        [
            *("gap closed", *(two(closed) for *_, closed in ranks), ""),
            *("gap closed", *(two(closed) for *_, closed in pairs)),
        ],
        ["trained parameters", *(f"{row[1]:,}" for row in ranks), "", "", *[""] * len(pairs)],
    ]
    counts = (f"{count + 1:,}" for count, *_ in pairs)  # one pair is held out for the previews
    return table(("rank", *(str(rank) for rank, *_ in ranks), "", "pairs", *counts), rows)


def new_condition(task: str, file: str = "new-condition") -> Callable[[Results], str]:
    """Adapter and ControlNet after 25 and 500 steps."""

    def make(results: Results) -> str:
        values = _closed(_cells(results, file))
        if (task, "adapter", 25) not in values or (task, "adapter", 500) not in values:
            raise Missing(f"{file}: {task} after 25 and 500 steps")
        return ", ".join(
            f"{values[task, method, 25]:.2f} / {values[task, method, 500]:.2f}" for method in ("adapter", "ControlNet")
        )

    return make


_MEASURES = (
    ("colour distance in L*a*b*", ("palette", "pixel", "lineart_color_hints"), 1, ""),
    ("edge F1", ("openmoji",), 2, ""),
    ("PSNR to the true image", ("haze",), 1, " dB"),
)
"""Measure, the conditions that it scores, decimals, unit."""


def ends_of_new_conditions(results: Results) -> str:
    """Scores of each condition without control and at the ceiling."""
    ends = {cell["task"]: (cell["baseline"], cell["ceiling"]) for cell in _cells(results, "new-condition")}
    told = []
    for measure, tasks, digits, unit in _MEASURES:
        values = [
            f"{_NEW_CONDITIONS[task].partition(' (')[0]} {rounded(ends[task][0], digits)} and"
            f" {rounded(ends[task][1], digits)}{unit}"
            for task in tasks
            if task in ends
        ]
        told += [f"{measure}: {', '.join(values)}"] if values else []
    return "; ".join(told)


def seconds_of_an_adapter(results: Results) -> str:
    """The time of 500 steps of an adapter, the median of the conditions."""
    cells = [cell for cell in _cells(results, "new-condition") if cell["method"] == "adapter" and cell["steps"] == 500]
    if not cells:
        raise Missing("new-condition: an adapter after 500 steps")
    return f"{statistics.median(cell['seconds'] for cell in cells):.0f} s"


# The other studies


_CONVERGENCE = {
    "lineart_color_hints": "line art with colour hints",
    "lineart_xdog": "XDoG line art",
    "illusion": "illusion (three tones)",
}


def convergence_table(results: Results) -> str:
    """Steps to a share of the gap."""
    report = results.report("convergence")
    rows = [
        [_CONVERGENCE.get(name, name.partition(", ")[0]), kind, *map(str, steps)]
        for name, kind, *steps in report["rows"]
    ]
    return table(("condition", "kind", "steps of the adapter", "steps of the ControlNet"), rows)


def several_table(file: str) -> Callable[[Results], str]:
    """Two controls at once."""

    def make(results: Results) -> str:
        rows = [
            [mix.replace("+", " + "), name, *map(two, values)] for mix, name, *values in results.report(file)["rows"]
        ]
        return table(("mix", "condition", "alone", "together", "under the other alone"), rows)

    return make


def both_of_a_mix(results: Results) -> str:
    """`palette from 0.60 to 0.62`: each control of a mix, alone and together."""
    rows = results.report("several-balanced")["rows"]
    return " and ".join(
        f"{name.rpartition('/')[2]} from {two(alone)} to {two(both)}" for _, name, alone, both, *_ in rows
    )


def guidance_modes_table(results: Results) -> str:
    """Each guidance mode with an empty and with a full prompt."""
    found: dict[str, list[str]] = {}
    for _, mode, _, score, _, closed in results.report("guidance-modes")["rows"]:
        found.setdefault(mode, []).append(f"{two(score)}, {two(closed)}")
    rows = [[f"`{mode}`", *cells] for mode, cells in found.items()]
    return table(("mode", "empty prompt: edge F1, gap closed", "full prompt"), rows)


def guidance_modes_ends(results: Results) -> str:
    """`no control 0.36 and 0.38, ceiling 0.91`."""
    ends = {
        prompt: (no_control, ceiling)
        for prompt, _, no_control, _, ceiling, _ in results.report("guidance-modes")["rows"]
    }
    empty, full = ends.values()
    return f"no control {two(empty[0])} and {two(full[0])}, ceiling {two(full[1])}"


_MEAN_OF_STYLES, _TEXT_ENCODERS = -2, -1
"""The last reports of the study of community models."""


def community_table(results: Results) -> str:
    """A base of another style, by condition."""
    rows = [
        [f"`{name}`", *map(two, values)] for name, *values in results.report("community", index=_MEAN_OF_STYLES)["rows"]
    ]
    return table(("control", "nano", "community model, control as it is", "community model, control by offset"), rows)


def text_encoder_table(results: Results) -> str:
    """A base with a replaced text encoder."""
    report = results.report("community", index=_TEXT_ENCODERS)
    rows = []
    for name, *_, closed, backgrounds in report["rows"]:
        control, _, model = name.partition(": ")
        rows.append([f"`{control}`", model, two(closed), two(backgrounds)])
    return table(("control", "model", "gap closed", "background colour correct"), rows)


def community_distances(results: Results) -> str:
    """How far the styles are from nano."""
    distances = results.report("community")["facts"]["distances"].values()
    return f"{100 * min(distances):.1f} to {100 * max(distances):.1f} %"


def ambiguous_table(results: Results) -> str:
    """Prompts against conditions."""
    concepts, fidelity = (results.report("ambiguous", index=index)["rows"] for index in (0, 1))
    gaps = {name: values for name, *values in fidelity}
    rows = []
    for name, *shares in concepts[1:]:  # without chance
        cells = [two(share) for share in shares[:3]]
        if name in gaps:
            cells = [f"{cell}, {two(gap)}" for cell, gap in zip(cells, gaps[name], strict=True)]
        shown = f"`{name}`" if name in gaps else name
        rows.append([shown, *cells, "" if shares[3] is None else two(shares[3])])
    head = ("control", "empty prompt", "right prompt", "conflicting prompt", "the concept of the conflicting prompt")
    return table(head, rows)
