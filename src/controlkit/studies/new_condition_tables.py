"""Tables of `new_condition.py`, and whether the paper's claims hold in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from controlkit.evaluation.report import Report, Row
from controlkit.studies.cells import Cell

ADAPTER, CONTROLNET = "adapter", "ControlNet"
"""The two methods that the claims compare."""


def rates_report(cells: Iterable[Cell]) -> list[Report]:
    rows = [(cell.method, cell.rate, cell.score, cell.gap_closed) for cell in cells]
    return [
        Report(
            title="Learning rates: gap closed",
            columns=("method", "rate", "score", "gap closed"),
            rows=tuple(rows),
            notes=("the other parts use 1e-3 for every method, as the paper uses one rate for all.",),
        )
    ]


def budgets_report(cells: Sequence[Cell]) -> list[Report]:
    budgets = sorted({cell.steps for cell in cells})
    by_row: dict[tuple[str, str], dict[int, Cell]] = {}
    for cell in cells:
        by_row.setdefault((cell.task, cell.method), {})[cell.steps] = cell
    rows: list[Row] = [
        (f"{task}: {method}", *(row[steps].gap_closed if steps in row else None for steps in budgets))
        for (task, method), row in by_row.items()
    ]
    baselines = {cell.task: (cell.baseline, cell.ceiling) for cell in cells}
    trained = {cell.method: cell.parameters for cell in cells}
    notes = [f"trained: {', '.join(f'{method} {count:,} parameters' for method, count in trained.items())}."]
    if 0 in budgets:
        notes.append("0 steps: the base control alone.")
    notes += [f"{task}: no control {low:.3f}, ceiling {high:.3f}." for task, (low, high) in baselines.items()]
    return [
        Report(
            title="Gap closed by number of steps",
            columns=("condition: method", *(str(steps) for steps in budgets)),
            rows=tuple(rows),
            notes=tuple(notes),
            facts={"claims": claims(cells)},
        ),
        _claims_report(claims(cells)),
    ]


def claims(cells: Iterable[Cell]) -> dict[str, dict[str, bool]]:
    """The paper's claims that these cells can decide: claim => condition => whether it holds."""
    score = {(cell.task, cell.method, cell.steps): cell.gap_closed for cell in cells}
    size = {cell.method: cell.parameters for cell in cells}
    tasks = sorted({task for task, _, _ in score})
    budgets = sorted({steps for _, _, steps in score if steps})
    most = max(budgets)

    def both(task: str, steps: int) -> tuple[float, float]:
        return score[task, ADAPTER, steps], score[task, CONTROLNET, steps]

    early = [steps for steps in budgets if steps <= 250]
    found = {
        f"level (within 0.02) or ahead at {most} steps": {
            task: both(task, most)[0] >= both(task, most)[1] - 0.02 for task in tasks
        },
        "at most a tenth of the parameters": dict.fromkeys(tasks, size[ADAPTER] <= size[CONTROLNET] / 10),
    }
    if early:
        ahead = {
            task: all(adapter > other for adapter, other in (both(task, steps) for steps in early)) for task in tasks
        }
        found = {"ahead at every budget up to 250 steps": ahead, **found}
    if 500 in budgets:
        found["gap closed at least 0.5 after 500 steps"] = {task: both(task, 500)[0] >= 0.5 for task in tasks}
    return found


def _claims_report(found: dict[str, dict[str, bool]]) -> Report:
    tasks = sorted(next(iter(found.values())))
    rows: list[Row] = [
        (claim, *("yes" if by_task[task] else "NO" for task in tasks)) for claim, by_task in found.items()
    ]
    return Report(title="Does it reproduce? The adapter is", columns=("claim", *tasks), rows=tuple(rows))


def ablation_report(cells: Sequence[Cell]) -> list[Report]:
    budgets = sorted({cell.steps for cell in cells})
    methods = list(dict.fromkeys(cell.method for cell in cells))
    at = {(cell.method, cell.steps): cell for cell in cells}
    rows: list[Row] = []
    for method in methods:
        shown = "+ LoRA (the adapter)" if method == ADAPTER else method
        parameters = at[method, budgets[0]].parameters
        rows.append((shown, parameters, *(at[method, steps].gap_closed for steps in budgets)))
    return [
        Report(
            title=f"Ablation on {cells[0].task}: gap closed by number of steps",
            columns=("method", "trained", *(str(steps) for steps in budgets)),
            rows=tuple(rows),
        )
    ]


def ranks_report(cells: Sequence[Cell]) -> list[Report]:
    rows = [(cell.rank, cell.parameters, cell.score, cell.gap_closed) for cell in cells]
    return [
        Report(
            title=f"Rank, on {cells[0].task}, {cells[0].steps} steps",
            columns=("rank", "trained", "score", "gap closed"),
            rows=tuple(rows),
        )
    ]


def pairs_report(cells: Sequence[Cell]) -> list[Report]:
    rows = [(cell.pairs, cell.score, cell.gap_closed) for cell in cells]
    return [
        Report(
            title=f"Pairs, on {cells[0].task}, {cells[0].steps} steps",
            columns=("pairs", "score", "gap closed"),
            rows=tuple(rows),
            notes=("pairs: those trained on, without held-out ones.",),
        )
    ]


REPORTS = {
    "rates": rates_report,
    "budgets": budgets_report,
    "ablation": ablation_report,
    "ranks": ranks_report,
    "pairs": pairs_report,
}
"""Part of the study -> its tables."""
