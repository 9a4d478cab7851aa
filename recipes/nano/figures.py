"""What is told of nano in the pages: text and tables made from the JSON files in benchmarks/results/nano."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlkit.files import read_json

_NEW_CONDITIONS = {
    "palette": "palette",
    "pixel": "pixel",
    "openmoji": "OpenMoji's line art",
    "lineart_color_hints": "line art with colour hints",
    "haze": "haze (a restoration)",
}
"""Conditions of the study as the pages call them, in the order of their tables."""


class Missing(Exception):
    """There is no such result yet."""


class Results:
    """The JSON files of results: `runs` maps a label to a command and its reports.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}

    def run(self, file: str, label: str = "default") -> Mapping[str, Any]:
        """One command's entry.

        Raises:
            Missing: it was not run yet.
        """
        if file not in self._files:
            path = self.folder / f"{file}.json"
            if not path.is_file():
                raise Missing(file)
            self._files[file] = read_json(path)["runs"]
        if label not in self._files[file]:
            raise Missing(f"{file}, {label}")
        entry: Mapping[str, Any] = self._files[file][label]
        return entry

    def labels(self, file: str) -> list[str]:
        """Labels of a file's runs, in order."""
        path = self.folder / f"{file}.json"
        if not path.is_file():
            raise Missing(file)
        return list(read_json(path)["runs"])

    def report(self, file: str, label: str = "default", index: int = 0) -> Mapping[str, Any]:
        """One report of a command."""
        found: Mapping[str, Any] = self.run(file, label)["reports"][index]
        return found

    def base_of(self, file: str) -> str | None:
        """Fingerprint of the base that a file's figures were measured on, where its settings say it."""
        for label in self.labels(file):
            for report in self.run(file, label)["reports"]:
                if (base := report.get("settings", {}).get("base")) is not None:
                    return str(base["fingerprint"])
        return None


@dataclass(frozen=True)
class Figure:
    """Text that is made from results."""

    file: str
    """The JSON file that it is about."""
    make: Callable[[Results], str]
    block: bool = False
    """Whether it stands in lines of its own."""

    def text(self, results: Results) -> str:
        """What belongs between the marks; figures of an earlier base say so.

        Raises:
            Missing: a result is not there.
        """
        base, now = results.base_of(self.file), results.base_of("base")
        if not self.block:
            return f"{self.make(results)}{' (on earlier weights)' if base != now else ''}"
        earlier = f"\n\nMeasured on nano as it was before (base {base})." if base != now else ""
        return f"\n\n{self.make(results)}{earlier}\n\n"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""

    def line(cells: Sequence[str]) -> str:
        return f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"

    return "\n".join((line(head), "|---" * len(head) + "|", *map(line, rows)))


def _round(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:z.{digits}f}"


def _two(value: float) -> str:
    return f"{value:z.2f}"


def _three(value: float) -> str:
    return f"{value:z.3f}"


def _facts(results: Results, label: str, images: str) -> Mapping[str, float]:
    facts: Mapping[str, float] = results.report("canny", label)["facts"][images]
    return facts


# The base


_AUTOENCODER, _COLOUR, _HELD_OUT, _SEEN, _RETRIEVAL = range(5)
"""Reports of `controlkit evaluate base`."""


def _base(
    results: Results, report: int, row: int, column: int = 1, file: str = "base", label: str = "default"
) -> float:
    value: float = results.report(file, label, report)["rows"][row][column]
    return value


def _count(results: Results, report: int) -> int:
    """Images of a report's set."""
    return int(results.report("base", index=report)["settings"]["sets"][0]["images"])


def _base_table(results: Results) -> str:
    def distance(title: str, report: int, column: int, left: bool = True) -> list[str]:
        shuffled, made, ceiling = (f"{_base(results, report, row, column):.0f}" for row in range(3))
        share = _base(results, report, 3, column) if left else None
        told = "" if share is None else ("all left" if share >= 1 else f"{share:.2f} left")
        return [title, f"{shuffled} (shuffled)", made, ceiling, told]

    found = results.report("base", index=_RETRIEVAL)["facts"]
    seen, unseen = _count(results, _SEEN), _count(results, _HELD_OUT)
    rows = [
        [
            f"autoencoder PSNR, {results.report('base')['settings']['sets'][row]['images']} images of {what}",
            "",
            f"{_base(results, _AUTOENCODER, row):.1f} dB (SSIM {_base(results, _AUTOENCODER, row, 2):.3f})",
            "",
            "",
        ]
        for row, what in enumerate(("held-out concepts", "OpenMoji"))
    ]
    rows += [
        [
            "background colour, 240 prompts: 12 colours x 20 held-out concepts",
            f"{_base(results, _COLOUR, 0):.3f} (chance)",
            _three(_base(results, _COLOUR, 1)),
            _three(_base(results, _COLOUR, 2)),
            "",
        ],
        [
            f"right concept among the 5 nearest of 50 trained concepts, {seen} prompts",
            f"{_base(results, _RETRIEVAL, 0):.2f} (chance)",
            _three(_base(results, _RETRIEVAL, 1)),
            _three(_base(results, _RETRIEVAL, 2)),
            f"{found['retrieval_share_of_ceiling']:.2f} of the ceiling",
        ],
        distance("lite0 feature distance to the caption's own image, trained concepts", _SEEN, 3),
        distance(f"joint FD-lite0 (features and caption), the same {seen}", _SEEN, 2),
        distance(f"FD-lite0, the same {seen}", _SEEN, 1, left=False),
        distance(f"lite0 feature distance, {unseen} images of held-out concepts", _HELD_OUT, 3),
        distance("joint FD-lite0, held-out", _HELD_OUT, 2),
        distance("FD-lite0, held-out", _HELD_OUT, 1, left=False),
    ]
    return table(("measure", "baseline", "nano", "ceiling", ""), rows)


def _card_table(results: Results) -> str:
    def distance(what: str, report: int) -> list[str]:
        shuffled, made, ceiling = (f"{_base(results, report, row, 3):.0f}" for row in range(3))
        return [what, f"{shuffled} (captions shuffled)", made, ceiling]

    rows = [
        [
            f"autoencoder, {_count(results, _AUTOENCODER)} images of held-out concepts",
            "",
            f"{_base(results, _AUTOENCODER, 0):.1f} dB PSNR",
            "",
        ],
        [
            "the background colour that the prompt asks for",
            f"{_base(results, _COLOUR, 0):.2f} (chance)",
            _two(_base(results, _COLOUR, 1)),
            _two(_base(results, _COLOUR, 2)),
        ],
        [
            "the right concept among the 5 nearest of 50 that were trained on",
            f"{_base(results, _RETRIEVAL, 0):.2f} (chance)",
            _two(_base(results, _RETRIEVAL, 1)),
            _three(_base(results, _RETRIEVAL, 2)),
        ],
        distance("distance of EfficientNet-Lite0's features to the caption's own image, trained concepts", _SEEN),
        distance("the same, concepts that were never trained on", _HELD_OUT),
    ]
    return table(("measure", "baseline", "nano", "ceiling"), rows)


def _base_row(report: int, column: int, *digits: int) -> Callable[[Results], str]:
    """Baseline, nano and ceiling, separated by slashes."""
    return lambda results: " / ".join(
        _round(_base(results, report, row, column), count) for row, count in enumerate(digits)
    )


def _sampling(label: str) -> Callable[[Results], str]:
    """The right concept among five under other sampling settings."""
    return lambda results: _three(_base(results, _RETRIEVAL, 1, file="base-sampling", label=label))


# Its canny ControlNet


def _canny_table(results: Results) -> str:
    rows = []
    for images, title in (("held-out", "held-out concepts"), ("openmoji", "OpenMoji, a style never trained on")):
        made, balanced = _facts(results, "control", images), _facts(results, "balanced", images)
        told = {one["name"]: one["images"] for one in results.report("canny", "control")["settings"]["sets"]}
        values = [_three(made[name]) for name in ("baseline", "control", "ceiling", "gap_closed")]
        rows.append(
            [f"{title} ({told[images]} images)", *values, f"{balanced['control']:.3f}, {balanced['gap_closed']:.2f}"]
        )
    head = ("canny edge F1 (one pixel of tolerance)", "no control", "control", "ceiling", "gap closed")
    return table((*head, "with `--mode balanced`"), rows)


def _canny_summary(images: str, form: str) -> Callable[[Results], str]:
    def make(results: Results) -> str:
        made, balanced = _facts(results, "control", images), _facts(results, "balanced", images)
        ends = " / ".join(_two(made[name]) for name in ("baseline", "control", "ceiling"))
        return form.format(ends=ends, gap=_two(made["gap_closed"]), balanced=_two(balanced["gap_closed"]))

    return make


def _guidance_table(results: Results) -> str:
    rows = []
    for label in results.labels("guidance"):
        report = results.report("guidance", label)
        control, facts = report["settings"]["control"], next(iter(report["facts"].values()))
        told = [control["mode"], f"{report['settings']['guidance']:g}", f"{control['weight']:g}"]
        if told == ["control", "3", "1"]:  # nano's defaults
            told = [f"**{text}**" for text in told]
        rows.append([*told, _three(facts["control"]), _two(facts["gap_closed"])])
    return table(("mode", "guidance", "weight", "edge F1", "gap closed"), rows)


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


def _systems_table(results: Results) -> str:
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


# The adapters


def _adapters_table(results: Results) -> str:
    entry = results.run("adapters", "control")
    balanced = results.report("adapters", "balanced")["facts"]
    rows = []
    for name, sets in entry["reports"][0]["facts"].items():
        measure = next(row[1] for row in entry["reports"][0]["rows"] if row[0].startswith(f"{name},")).partition(" (")[
            0
        ]
        made = entry["made"][name]
        digits = 2 if "PSNR" in measure or "distance" in measure else 3
        held, other = sets["held-out"], sets["openmoji"]
        new = f" (new, {made['steps']:,} steps)" if "pairs" in made else ""
        gaps = [balanced[name][images]["gap_closed"] for images in ("held-out", "openmoji")]
        values = [_round(held[key], digits) for key in ("baseline", "control", "ceiling")]
        closed = [_two(held["gap_closed"]), _two(other["gap_closed"]), ", ".join(map(_two, gaps))]
        rows.append([f"`{name}`{new}", measure, *values, *closed])
    head = ("adapter", "measure", "no control", "adapter", "ceiling", "gap closed", "OpenMoji: gap closed", "balanced")
    return table(head, rows)


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
    return sorted({steps for _, name, steps in values if name == method})


def _conditions_of(values: Mapping[tuple[str, str, int], float]) -> dict[str, str]:
    tasks = {task for task, _, _ in values}
    return {task: title for task, title in _NEW_CONDITIONS.items() if task in tasks}


def _budgets_table(results: Results) -> str:
    values = _closed(_cells(results, "new-condition"))
    steps = _steps_of(values)
    rows = [
        [f"{title}: {method}", *(_two(values[task, method, count]) for count in steps)]
        for task, title in _conditions_of(values).items()
        for method in ("adapter", "ControlNet")
    ]
    head = [f"{steps[0]} steps", *(f"{count:,}" for count in steps[1:])]
    return table(("condition: method", *head), rows)


def _mode_table(results: Results) -> str:
    values = _closed(_cells(results, "new-condition-control"))
    steps = _steps_of(values)
    rows = [
        [title, *(", ".join(_two(values[task, method, n]) for method in ("adapter", "ControlNet")) for n in steps)]
        for task, title in _conditions_of(values).items()
    ]
    head = [f"{steps[0]} steps", *(f"{count:,}" for count in steps[1:])]
    return table(("gap closed: adapter, ControlNet", *head), rows)


def _claims_table(results: Results) -> str:
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


def _ablation_table(results: Results) -> str:
    detail = _study(results, "new-condition")["detail"]
    cells = [cell for cell in _cells(results, "new-condition") if cell["task"] == detail]
    values, trained = _closed(cells), {cell["method"]: cell["parameters"] for cell in cells}
    steps = _steps_of(values)
    rows = [
        [title, f"{trained[method]:,}", *(_two(values[detail, method, count]) for count in steps)]
        for method, title in _ABLATION.items()
    ]
    head = [f"{steps[0]} steps", *(f"{count:,}" for count in steps[1:])]
    return table(("method", "trained", *head), rows)


def _report_titled(results: Results, file: str, start: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(
        report for report in results.run(file)["reports"] if report["title"].startswith(start)
    )
    return found


def _ranks_and_pairs_table(results: Results) -> str:
    ranks = _report_titled(results, "new-condition", "Rank,")["rows"]
    pairs = _report_titled(results, "new-condition", "Pairs,")["rows"]
    rows = [
        [
            *("gap closed", *(_two(closed) for *_, closed in ranks), ""),
            *("gap closed", *(_two(closed) for *_, closed in pairs)),
        ],
        ["trained parameters", *(f"{row[1]:,}" for row in ranks), "", "", *[""] * len(pairs)],
    ]
    counts = (f"{count + 1:,}" for count, *_ in pairs)  # one pair is held out for the previews
    return table(("rank", *(str(rank) for rank, *_ in ranks), "", "pairs", *counts), rows)


def _new_condition(task: str, file: str = "new-condition") -> Callable[[Results], str]:
    """Adapter and ControlNet after 25 and 500 steps."""

    def make(results: Results) -> str:
        values = _closed(_cells(results, file))
        if (task, "adapter", 25) not in values or (task, "adapter", 500) not in values:
            raise Missing(f"{file}: {task} after 25 and 500 steps")
        return ", ".join(
            f"{values[task, method, 25]:.2f} / {values[task, method, 500]:.2f}" for method in ("adapter", "ControlNet")
        )

    return make


# The other studies


def _several_table(results: Results) -> str:
    rows = [
        [mix.replace("+", " + "), name, *map(_two, values)] for mix, name, *values in results.report("several")["rows"]
    ]
    return table(("mix", "condition", "alone", "together", "under the others alone"), rows)


_MEAN_OF_STYLES, _TEXT_ENCODERS = -2, -1
"""The last reports of the study of community models."""


def _community_table(results: Results) -> str:
    rows = [
        [f"`{name}`", *map(_two, values)]
        for name, *values in results.report("community", index=_MEAN_OF_STYLES)["rows"]
    ]
    return table(("control", "nano", "community model, control as it is", "community model, control by offset"), rows)


def _text_encoder_table(results: Results) -> str:
    report = results.report("community", index=_TEXT_ENCODERS)
    rows = []
    for name, *_, closed, backgrounds in report["rows"]:
        control, _, model = name.partition(": ")
        rows.append([f"`{control}`", model, _two(closed), _two(backgrounds)])
    return table(("control", "model", "gap closed", "background as asked"), rows)


def _community_distances(results: Results) -> str:
    distances = results.report("community")["facts"]["distances"].values()
    return f"{100 * min(distances):.1f} to {100 * max(distances):.1f} %"


def _ambiguous_table(results: Results) -> str:
    concepts, fidelity = (results.report("ambiguous", index=index)["rows"] for index in (0, 1))
    gaps = {name: values for name, *values in fidelity}
    rows = []
    for name, *shares in concepts[1:]:  # without chance
        cells = [_two(share) for share in shares[:3]]
        if name in gaps:
            cells = [f"{cell}, {_two(gap)}" for cell, gap in zip(cells, gaps[name], strict=True)]
        shown = f"`{name}`" if name in gaps else name
        rows.append([shown, *cells, "" if shares[3] is None else _two(shares[3])])
    head = ("control", "empty prompt", "right prompt", "conflicting prompt", "the concept of the conflicting prompt")
    return table(head, rows)


FIGURES: dict[str, Figure] = {
    "base.table": Figure("base", _base_table, block=True),
    "base.card": Figure("base", _card_table, block=True),
    "base.top5": Figure("base", lambda r: _three(_base(r, _RETRIEVAL, 1))),
    "base.top5-percent": Figure("base", lambda r: f"{_base(r, _RETRIEVAL, 1):.0%}".replace("%", " %")),
    "base.top5-ceiling-percent": Figure("base", lambda r: f"{_base(r, _RETRIEVAL, 2):.1%}".replace("%", " %")),
    "base.top5-row": Figure("base", _base_row(_RETRIEVAL, 1, 2, 2, 3)),
    "base.colour-row": Figure("base", _base_row(_COLOUR, 1, 2, 2, 3)),
    "base.distance-row": Figure("base", _base_row(_SEEN, 3, 0, 0, 0)),
    "base.autoencoder": Figure(
        "base", lambda r: f"{_base(r, _AUTOENCODER, 0):.1f} dB PSNR, {_base(r, _AUTOENCODER, 0, 2):.3f} SSIM"
    ),
    "base.top5-guidance-2": Figure("base-sampling", _sampling("guidance 2")),
    "base.top5-guidance-5": Figure("base-sampling", _sampling("guidance 5")),
    "base.top5-dpm": Figure("base-sampling", _sampling("dpm++")),
    "base.top5-unipc": Figure("base-sampling", _sampling("unipc")),
    "base.top5-60-steps": Figure("base-sampling", _sampling("60 steps")),
    "canny.table": Figure("canny", _canny_table, block=True),
    "canny.summary": Figure(
        "canny", _canny_summary("held-out", "{ends}: {gap} of the gap closed ({balanced} with `--mode balanced`)")
    ),
    "canny.row": Figure(
        "canny", _canny_summary("held-out", "{ends} (gap closed {gap}; {balanced} with `--mode balanced`)")
    ),
    "canny.openmoji-row": Figure("canny", _canny_summary("openmoji", "{ends} (gap closed {gap}; {balanced})")),
    "canny.guidance": Figure("guidance", _guidance_table, block=True),
    "systems.table": Figure("systems", _systems_table, block=True),
    "adapters.table": Figure("adapters", _adapters_table, block=True),
    "new-condition.budgets": Figure("new-condition", _budgets_table, block=True),
    "new-condition.claims": Figure("new-condition", _claims_table, block=True),
    "new-condition.ablation": Figure("new-condition", _ablation_table, block=True),
    "new-condition.ranks-and-pairs": Figure("new-condition", _ranks_and_pairs_table, block=True),
    "new-condition.mode-control": Figure("new-condition-control", _mode_table, block=True),
    "new-condition.pixel": Figure("new-condition", _new_condition("pixel")),
    "new-condition.hints": Figure("new-condition", _new_condition("lineart_color_hints")),
    "new-condition.hints-control": Figure(
        "new-condition-control", _new_condition("lineart_color_hints", "new-condition-control")
    ),
    "several.table": Figure("several", _several_table, block=True),
    "ambiguous.table": Figure("ambiguous", _ambiguous_table, block=True),
    "community.table": Figure("community", _community_table, block=True),
    "community.text-encoders": Figure("community", _text_encoder_table, block=True),
    "community.distance": Figure("community", _community_distances),
}
"""Name in the pages => figure."""
