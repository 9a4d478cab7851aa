"""What is told of the base, its canny ControlNet and its adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from results import Results, measure_of, rounded, table, three, two
from tables_of_speed import content

AUTOENCODER, COLOUR, _HELD_OUT, SEEN, RETRIEVAL = range(5)
"""Reports of `controlkit evaluate base`."""
_AMONG_FIVE = "right concept among 5 of 50"
_SHOWN_CONCEPTS = ("owl", "sailboat", "mushroom")
"""Of `steps_or_width.py`."""


def value(
    results: Results, report: int, row: int, column: int = 1, file: str = "base", label: str = "default"
) -> float:
    """A number of a report on the base."""
    found: float = results.report(file, label, report)["rows"][row][column]
    return found


def _count(results: Results, report: int) -> int:
    """Images of a report's set."""
    return int(results.report("base", index=report)["settings"]["sets"][0]["images"])


def base_table(results: Results) -> str:
    """How good the base is."""

    def distance(title: str, report: int, column: int, left: bool = True) -> list[str]:
        shuffled, made, ceiling = (f"{value(results, report, row, column):.0f}" for row in range(3))
        share = value(results, report, 3, column) if left else None
        told = "" if share is None else f"{share:.2f} left"
        return [title, f"{shuffled} (shuffled)", made, ceiling, told]

    found = results.report("base", index=RETRIEVAL)["facts"]
    seen, unseen = _count(results, SEEN), _count(results, _HELD_OUT)
    rows = [
        [
            f"autoencoder PSNR, {results.report('base')['settings']['sets'][row]['images']} images of {what}",
            "",
            f"{value(results, AUTOENCODER, row):.1f} dB (SSIM {value(results, AUTOENCODER, row, 2):.3f})",
            "",
            "",
        ]
        for row, what in enumerate(("held-out concepts", "OpenMoji"))
    ]
    rows += [
        [
            "background colour, 240 prompts: 12 colours x 20 held-out concepts",
            f"{value(results, COLOUR, 0):.3f} (chance)",
            three(value(results, COLOUR, 1)),
            three(value(results, COLOUR, 2)),
            "",
        ],
        [
            f"right concept among the 5 nearest of 50 trained concepts, {seen} prompts",
            f"{value(results, RETRIEVAL, 0):.2f} (chance)",
            three(value(results, RETRIEVAL, 1)),
            three(value(results, RETRIEVAL, 2)),
            f"{found['retrieval_share_of_ceiling']:.2f} of the ceiling",
        ],
        distance("lite0 feature distance to the caption's own image, trained concepts", SEEN, 3),
        distance(f"joint FD-lite0 (features and caption), the same {seen}", SEEN, 2),
        distance(f"FD-lite0, the same {seen}", SEEN, 1, left=False),
        distance(f"lite0 feature distance, {unseen} images of held-out concepts", _HELD_OUT, 3),
        distance("joint FD-lite0, held-out", _HELD_OUT, 2),
        distance("FD-lite0, held-out", _HELD_OUT, 1, left=False),
    ]
    return table(("measure", "baseline", "nano", "ceiling", "of the ceiling, or left"), rows)


def card_table(results: Results) -> str:
    """How good the base is, for its model card."""

    def distance(what: str, report: int) -> list[str]:
        shuffled, made, ceiling = (f"{value(results, report, row, 3):.0f}" for row in range(3))
        return [what, f"{shuffled} (captions shuffled)", made, ceiling]

    rows = [
        [
            f"autoencoder, {_count(results, AUTOENCODER)} images of held-out concepts",
            "",
            f"{value(results, AUTOENCODER, 0):.1f} dB PSNR",
            "",
        ],
        [
            "the background colour that the prompt asks for",
            f"{value(results, COLOUR, 0):.2f} (chance)",
            two(value(results, COLOUR, 1)),
            two(value(results, COLOUR, 2)),
        ],
        [
            "the right concept among the 5 nearest of 50 that were trained on",
            f"{value(results, RETRIEVAL, 0):.2f} (chance)",
            two(value(results, RETRIEVAL, 1)),
            three(value(results, RETRIEVAL, 2)),
        ],
        distance("distance of EfficientNet-Lite0's features to the caption's own image, trained concepts", SEEN),
        distance("the same, concepts that were never trained on", _HELD_OUT),
    ]
    return table(("measure", "baseline", "nano", "ceiling"), rows)


def base_row(report: int, column: int, *digits: int) -> Callable[[Results], str]:
    """Baseline, nano and ceiling, separated by slashes."""
    return lambda results: " / ".join(
        rounded(value(results, report, row, column), count) for row, count in enumerate(digits)
    )


def sampling(label: str) -> Callable[[Results], str]:
    """The right concept among five under other sampling settings."""
    return lambda results: three(value(results, RETRIEVAL, 1, file="base-sampling", label=label))


# Its canny ControlNet


def _facts(results: Results, label: str, images: str) -> Mapping[str, float]:
    facts: Mapping[str, float] = results.report("canny", label)["facts"][images]
    return facts


def canny_table(results: Results) -> str:
    """How closely the canny ControlNet is followed."""
    rows = []
    for images, title in (("held-out", "held-out concepts"), ("openmoji", "OpenMoji, a style never trained on")):
        made, balanced = _facts(results, "control", images), _facts(results, "balanced", images)
        told = {one["name"]: one["images"] for one in results.report("canny", "control")["settings"]["sets"]}
        values = [three(made[name]) for name in ("baseline", "control", "ceiling", "gap_closed")]
        rows.append(
            [f"{title} ({told[images]} images)", *values, f"{balanced['control']:.3f}, {balanced['gap_closed']:.2f}"]
        )
    head = ("canny edge F1 (one pixel of tolerance)", "no control", "control", "ceiling", "gap closed")
    return table((*head, "with `--mode balanced`"), rows)


def canny_summary(images: str, form: str) -> Callable[[Results], str]:
    """The same in one line."""

    def make(results: Results) -> str:
        made, balanced = _facts(results, "control", images), _facts(results, "balanced", images)
        ends = " / ".join(two(made[name]) for name in ("baseline", "control", "ceiling"))
        return form.format(ends=ends, gap=two(made["gap_closed"]), balanced=two(balanced["gap_closed"]))

    return make


def guidance_table(results: Results) -> str:
    """The canny ControlNet by mode, guidance scale and weight."""
    rows = []
    for label in results.labels("guidance"):
        report = results.report("guidance", label)
        control, facts = report["settings"]["control"], next(iter(report["facts"].values()))
        told = [control["mode"], f"{report['settings']['guidance']:g}", f"{control['weight']:g}"]
        if told == ["control", "3", "1"]:  # nano's defaults
            told = [f"**{text}**" for text in told]
        rows.append([*told, three(facts["control"]), two(facts["gap_closed"])])
    return table(("mode", "guidance", "weight", "edge F1", "gap closed"), rows)


# The adapters


def adapters_table(results: Results) -> str:
    """How closely each adapter is followed."""
    entry = results.run("adapters", "control")
    balanced = results.report("adapters", "balanced")["facts"]
    rows = []
    for name, sets in entry["reports"][0]["facts"].items():
        measure, digits = measure_of(entry["reports"][0], name)
        made = entry["made"][name]
        held, other = sets["held-out"], sets["openmoji"]
        new = f" (new, {made['steps']:,} steps)" if "pairs" in made else ""
        gaps = [balanced[name][images]["gap_closed"] for images in ("held-out", "openmoji")]
        values = [rounded(held[key], digits) for key in ("baseline", "control", "ceiling")]
        closed = [two(held["gap_closed"]), two(other["gap_closed"]), ", ".join(map(two, gaps))]
        rows.append([f"`{name}`{new}", measure, *values, *closed])
    head = ("adapter", "measure", "no control", "adapter", "ceiling", "gap closed", "OpenMoji: gap closed", "balanced")
    return table(head, rows)


def further_table(results: Results) -> str:
    """Adapters that do not ship."""
    entry = results.run("further")
    report, rows = entry["reports"][0], []
    for label, sets in report["facts"].items():
        name = Path(label).stem
        measure, digits = measure_of(report, label)
        held, other = sets["held-out"], sets["openmoji"]
        values = [rounded(held[key], digits) for key in ("baseline", "control", "ceiling")]
        title = f"{name} ({entry['made'][name]['steps']:,} steps)"
        own = two(entry["condition_images"][name])
        rows.append([title, measure, *values, two(held["gap_closed"]), two(other["gap_closed"]), own])
    head = ("adapter", "measure", "no control", "adapter", "ceiling", "gap closed", "OpenMoji: gap closed")
    return table((*head, "the condition image itself"), rows)


def steps_or_width_table(results: Results) -> str:
    """Bases that go on from nano's by three ways: how many of their images are right."""
    found = content(results, "steps-or-width")
    rows = [
        ("nano as it was", "nano"),
        ("1,500 steps more, all 461 concepts", "all"),
        ("1,500 steps more, 56 of the concepts", "few"),
        ("1,500 steps more, all concepts, a UNet of twice the width", "wide"),
        ("true drawings through the autoencoder", "autoencoder"),
    ]
    hard = [name for name in found["nano"] if name in found["autoencoder"]]

    def cells(name: str) -> list[str]:
        each = found[name]
        among_five = "" if _AMONG_FIVE not in each else three(each[_AMONG_FIVE])
        shown = [two(sum(each[concept] for concept in hard) / len(hard)), *(two(each[c]) for c in _SHOWN_CONCEPTS)]
        return [among_five, *shown]

    head = ["", "right among 5 of 50", "nearest of 461: all eight", *_SHOWN_CONCEPTS]
    return table(head, [[title, *cells(name)] for title, name in rows if name in found])
