"""The tabs *Pairs* and *Compare*."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from controlkit import conditions
from controlkit.data.check import KINDS
from controlkit.errors import UserError
from controlkit.evaluation.report import Report, read_reports
from controlkit.ui.client import sentence
from controlkit.ui.generate_tab import error_html, status_html
from controlkit.ui.runs import Workplace

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Options of the page's events: no API, and no bar over what they set."""
_SHOWN = 30
"""Problems that are listed."""


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
            with gr.Tab("Make pairs from images", elem_id="pairs-make-tab"):
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
            if path is None:
                raise UserError("choose a ZIP of pairs", "missing-setting")
            await asyncio.to_thread(place.add_zip, name, path)

        async for each in _after(place, work, name):
            yield each

    async def on_make(name: str, paths: list[str] | None, kind: str, side: float | None) -> AsyncIterator[Any]:
        async def work() -> None:
            if not paths:
                raise UserError("choose images to make pairs of", "missing-setting")
            await place.make_pairs(name, paths, kind, int(side) if side else None)

        async for each in _after(place, work, name):
            yield each

    async def on_check(name: str | None) -> AsyncIterator[Any]:
        async def work() -> None: ...

        async for each in _after(place, work, name or ""):
            yield each

    outputs = [message, sheet, problems, chosen]
    unpack.click(on_unpack, [name, archive], outputs, **PRIVATE)
    make.click(on_make, [name, images, condition, size], outputs, **PRIVATE)
    check.click(on_check, chosen, outputs, **PRIVATE)
    chosen.focus(lambda: gr.update(choices=place.pairs()), None, chosen, **PRIVATE)


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
                run.change(lambda name: _report_of_run(place, name), run, [table, picture], **PRIVATE)
                file.upload(lambda path: (_report_of_file(path), None), file, [table, picture], **PRIVATE)
                choices.append(run)
    refresh.click(lambda: [gr.update(choices=place.reports())] * 2, None, choices, **PRIVATE)


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
    """The reports in an uploaded file, as Markdown."""
    try:
        return "\n\n".join(report.to_markdown() for report in read_reports(path))
    except Exception as error:
        return error_html(sentence(error).replace(str(Path(path)), Path(path).name))
