"""The tabs *Pairs*, *Adapt* and *Compare*."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from controlkit import conditions
from controlkit.data.check import KINDS
from controlkit.evaluation.report import Report
from controlkit.ui.client import sentence
from controlkit.ui.generate_tab import error_html, status_html
from controlkit.ui.runs import RunState, Workplace

_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_SHOWN = 30
"""Problems that are listed."""
_BASE_CONTROL = "nano/base"


def pairs_tab(place: Workplace) -> None:
    """Upload or make pairs, and see what is wrong with them."""
    names = place.pairs()
    known = [name for name, kind in conditions.registry().items() if not kind.provided]
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            name = gr.Textbox("pairs", label="Name", elem_id="pairs-name", max_length=60)
            with gr.Tab("Upload a ZIP of pairs"):
                archive = gr.File(label="ZIP in any format of docs/pairs.md", file_types=[".zip"], elem_id="pairs-zip")
                unpack = gr.Button("Upload and check", variant="primary", elem_id="pairs-unpack")
            with gr.Tab("Make pairs of images", elem_id="pairs-make-tab"):
                images = gr.File(
                    label="Images, and a .txt file with the caption of each", file_count="multiple",
                    elem_id="pairs-images", height=180, file_types=["image", ".txt"],
                )  # fmt: skip
                condition = gr.Dropdown(known, value="canny", label="Condition")
                size = gr.Number(64, label="Side", info="scaled and cropped to a square; 0: as they are")
                make = gr.Button("Make and check", variant="primary", elem_id="pairs-make")
            chosen = gr.Dropdown(names, value=None, label="Pairs", elem_id="pairs-chosen")
            check = gr.Button("Check", elem_id="pairs-check")
        with gr.Column(scale=5, min_width=320):
            message = gr.HTML("", elem_id="pairs-message")
            sheet = gr.Image(
                label="Contact sheet",
                interactive=False,
                type="pil",
                format="png",
                elem_id="pairs-sheet",
                buttons=["download"],
            )
            problems = gr.Dataframe(headers=["problem", "where", "what"], interactive=False, wrap=True, visible=False)

    async def on_unpack(name: str, path: str | None) -> AsyncIterator[tuple[Any, ...]]:
        async def work() -> None:
            if path is not None:
                await asyncio.to_thread(place.add_zip, name, path)

        async for each in _after(place, work, name):
            yield each

    async def on_make(name: str, paths: list[str] | None, kind: str, side: float | None) -> AsyncIterator[Any]:
        async def work() -> None:
            await place.make_pairs(name, paths or [], kind, int(side) if side else None)

        async for each in _after(place, work, name):
            yield each

    async def on_check(name: str | None) -> AsyncIterator[Any]:
        async def work() -> None: ...

        async for each in _after(place, work, name or ""):
            yield each

    outputs = [message, sheet, problems, chosen]
    unpack.click(on_unpack, [name, archive], outputs, **_PRIVATE)
    make.click(on_make, [name, images, condition, size], outputs, **_PRIVATE)
    check.click(on_check, chosen, outputs, **_PRIVATE)


async def _checked(place: Workplace, name: str) -> tuple[Any, ...]:
    """The message, the sheet, the problems and the list of pairs, after a check."""
    found = await place.check(name)
    rows = [
        [KINDS.get(each["kind"], each["kind"]), place.public(each["where"]), place.public(each["text"])]
        for each in found["problems"]
    ]
    said = f"{found['pairs']} pairs of {', '.join(found['conditions'])}; "
    said += f"{len(rows)} problems" if rows else "nothing wrong"
    said = place.public("; ".join([said, *found["notes"]]))
    table = gr.update(value=rows[:_SHOWN], visible=bool(rows))
    picture = Image.open(found["sheet"]) if found.get("sheet") else None
    html = error_html(said) if rows else status_html(said)
    return html, picture, table, gr.update(choices=place.pairs(), value=name)


async def _after(place: Workplace, work: Callable[[], Awaitable[object]], name: str) -> AsyncIterator[tuple[Any, ...]]:
    """What the tab shows while pairs are made, and after."""
    keep = (gr.skip(), gr.skip(), gr.skip())
    yield status_html("working"), *keep
    try:
        await work()
        yield await _checked(place, name.strip())
    except Exception as error:
        yield error_html(place.public(sentence(error))), *keep


def adapt_tab(place: Workplace, adapters: Path) -> None:
    """Train an adapter on pairs: start, watch, stop, resume."""
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            name = gr.Dropdown(
                place.runs(), value="mine", label="Run", allow_custom_value=True, elem_id="adapt-name",
                info="a new name, or that of a run to watch or resume",
            )  # fmt: skip
            pairs = gr.Dropdown(place.pairs(), label="Pairs", elem_id="adapt-pairs", allow_custom_value=True)
            steps = gr.Number(200, label="Steps", precision=0, elem_id="adapt-steps")
            rate = gr.Number(0, label="Learning rate", info="0: that of the recipe")
            with gr.Row():
                start = gr.Button("Start or resume", variant="primary", elem_id="adapt-start")
                stop = gr.Button("Stop", elem_id="adapt-stop")
            download = gr.DownloadButton("Download the adapter", visible=False, elem_id="adapt-download")
        with gr.Column(scale=5, min_width=320):
            message = gr.HTML("", elem_id="adapt-message")
            with gr.Row():
                loss = gr.LinePlot(x="step", y="loss", title="Loss", height=220, min_width=200, elem_id="adapt-loss")
                score = gr.LinePlot(
                    x="step", y="score", title="Score of the previews", height=220, min_width=200, elem_id="adapt-score"
                )
            preview = gr.Image(
                label="Held-out pairs: condition, target, result", interactive=False, type="pil", format="png",
                elem_id="adapt-preview", buttons=["download"],
            )  # fmt: skip
            report = gr.Markdown("", elem_id="adapt-report")
    outputs = [message, loss, score, preview, report, download]

    def shown(state: RunState, name: str) -> tuple[Any, ...]:
        last = state.lines[-1] if state.lines else {}
        words = "running" if state.is_running else "stopped; start it again to resume"
        if state.report is not None:
            words = "done"
        if last:
            scores = [f"{key} {value:.4g}" for key, value in last.items() if _is_shown(key, value)]
            words += f"; step {last['step']}, " + ", ".join(scores)
        html = error_html(state.error) if state.error and not state.is_running else status_html(f"{name}: {words}")
        done = state.adapter is not None and not state.is_running
        return (
            html,
            _points(state.lines, "loss", lambda key: key == "loss"),
            _points(state.lines, "score", _is_score),
            Image.open(state.preview) if state.preview is not None else None,
            Report(**state.report).to_markdown() if state.report is not None else "",
            gr.update(value=str(state.adapter) if done else None, visible=done),
        )

    async def watch(name: str) -> AsyncIterator[tuple[Any, ...]]:
        while True:
            state = await asyncio.to_thread(place.state, name)
            yield shown(state, name)
            if not state.is_running:
                await asyncio.to_thread(place.keep_adapter, name, adapters)
                return
            await asyncio.sleep(1)

    async def on_start(name: str, pairs: str | None, steps: float, rate: float | None) -> AsyncIterator[Any]:
        try:
            name = (name or "").strip()
            await asyncio.to_thread(place.start, name, pairs or "", _BASE_CONTROL, int(steps or 0), rate)
            async for each in watch(name):
                yield each
        except Exception as error:
            yield error_html(place.public(sentence(error))), *[gr.skip()] * 5

    async def on_stop(name: str) -> Any:
        try:
            await asyncio.to_thread(place.stop, name)
            return status_html("stopping; the state is saved first")
        except Exception as error:
            return error_html(place.public(sentence(error)))

    start.click(on_start, [name, pairs, steps, rate], outputs, **_PRIVATE)
    stop.click(on_stop, name, message, **_PRIVATE)
    pairs.focus(lambda: gr.update(choices=place.pairs()), None, pairs, **_PRIVATE)
    name.focus(lambda: gr.update(choices=place.runs()), None, name, **_PRIVATE)


def compare_tab(place: Workplace) -> None:
    """Two reports side by side."""
    refresh = gr.Button("List the runs again", size="sm", elem_id="compare-refresh")
    choices: list[gr.Dropdown] = []
    with gr.Row():
        for side in ("left", "right"):
            with gr.Column(min_width=320):
                run = gr.Dropdown(place.reports(), label="Run", value=None, elem_id=f"compare-{side}")
                file = gr.File(
                    label="or the output of `controlkit evaluate --json`", file_types=[".json"], height=120,
                    elem_id=f"compare-{side}-file",
                )  # fmt: skip
                table = gr.Markdown("", elem_id=f"compare-{side}-report")
                picture = gr.Image(
                    label="Held-out pairs", interactive=False, type="pil", format="png", buttons=["download"]
                )
                run.change(lambda name: _report_of_run(place, name), run, [table, picture], **_PRIVATE)
                file.upload(_report_of_file, file, table, **_PRIVATE)
                choices.append(run)
    refresh.click(lambda: [gr.update(choices=place.reports())] * 2, None, choices, **_PRIVATE)


def _report_of_run(place: Workplace, name: str | None) -> tuple[str, Any]:
    if not name:
        return "", None
    try:
        state, picture = place.state(name), place.run_folder(name) / "held-out.png"
        found = "" if state.report is None else Report(**state.report).to_markdown()
        return found, Image.open(picture) if picture.is_file() else None
    except Exception as error:
        return error_html(place.public(sentence(error))), None


def _report_of_file(path: str) -> str:
    from controlkit.errors import UserError
    from controlkit.files import read_json

    try:
        values = read_json(Path(path))
        values = values.get("report", values)
        try:
            return Report(**values).to_markdown()
        except TypeError as error:
            raise UserError("the file holds no report of `controlkit evaluate --json`", "wrong-kind") from error
    except Exception as error:
        return error_html(sentence(error))


def _is_score(key: str) -> bool:
    return key not in ("step", "seconds", "loss", "learning_rate", "preview")


def _is_shown(key: str, value: Any) -> bool:
    return (key == "loss" or _is_score(key)) and isinstance(value, (int, float))


def _points(lines: list[dict[str, Any]], name: str, chosen: Callable[[str], bool]) -> Any:
    """Steps and values as a chart takes them: of each line the first value whose key is chosen."""
    import pandas

    rows = []
    for line in lines:
        found = [value for key, value in line.items() if chosen(key) and isinstance(value, (int, float))]
        if found:
            rows.append({"step": float(line["step"]), name: float(found[0])})
    return pandas.DataFrame(rows) if rows else None
