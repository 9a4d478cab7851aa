"""The tab *Adapt*: train an adapter on pairs, watch it, stop and resume."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import gradio as gr
from PIL import Image

from controlkit.errors import UserError
from controlkit.evaluation.report import Report
from controlkit.server.service import Service
from controlkit.ui.client import sentence
from controlkit.ui.generate_tab import error_html, status_html
from controlkit.ui.runs import RunState, Workplace
from controlkit.ui.work_tabs import PRIVATE

_BASE_CONTROL = "nano/base"
"""Chosen at first."""


class _Tab:
    """The components and what they do."""

    def __init__(self, place: Workplace, service: Service, tab: gr.Tab) -> None:
        self.place, self.service, self.tab = place, service, tab
        self.watching: dict[str, object] = {}
        """Session of a browser -> mark of the handler that shows a run; another one takes its place."""

    def build(self) -> None:
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self._settings()
            with gr.Column(scale=5, min_width=320):
                self._results()
        outputs = [self.message, self.loss, self.score, self.preview, self.report, self.download]
        inputs = [self.name, self.pairs, self.base, self.control, self.steps, self.rate]
        self.start.click(self._start, inputs, outputs, trigger_mode="multiple", **PRIVATE)
        gr.on([self.name.change, self.tab.select], self._look, self.name, outputs, trigger_mode="multiple", **PRIVATE)
        self.stop.click(self._stop, self.name, self.message, **PRIVATE)
        self.pairs.focus(lambda: gr.update(choices=self.place.pairs()), None, self.pairs, **PRIVATE)
        self.name.focus(lambda: gr.update(choices=self.place.runs()), None, self.name, **PRIVATE)

    def _settings(self) -> None:
        bases, controls = list(self.service.catalogue.bases), list(self.service.catalogue.base_controls)
        first = _BASE_CONTROL if _BASE_CONTROL in controls else next(iter(controls), None)
        self.name = gr.Dropdown(
            self.place.runs(), value="mine", label="Run", allow_custom_value=True, elem_id="adapt-name",
            info="a new name, or that of a run to watch or resume",
        )  # fmt: skip
        self.pairs = gr.Dropdown(self.place.pairs(), label="Pairs", elem_id="adapt-pairs", allow_custom_value=True)
        with gr.Row():
            self.base = gr.Dropdown(bases, value=bases[0], label="Base", elem_id="adapt-base", min_width=130)
            self.control = gr.Dropdown(
                controls, value=first, label="Base control", elem_id="adapt-control", min_width=130,
                info=None if controls else "none is listed: --controls takes a folder with one",
            )  # fmt: skip
        with gr.Row():
            self.steps = gr.Number(200, label="Steps", precision=0, elem_id="adapt-steps", min_width=130)
            self.rate = gr.Number(0, label="Learning rate", info="0: that of the recipe", min_width=130)
        with gr.Row():
            self.start = gr.Button("Start or resume", variant="primary", elem_id="adapt-start")
            self.stop = gr.Button("Stop", elem_id="adapt-stop")
        self.download = gr.DownloadButton("Download the adapter", visible=False, elem_id="adapt-download")

    def _results(self) -> None:
        self.message = gr.HTML("", elem_id="adapt-message")
        with gr.Row():
            self.loss = gr.LinePlot(x="step", y="loss", title="Loss", height=220, min_width=200, elem_id="adapt-loss")
            self.score = gr.LinePlot(
                x="step", y="score", title="Score of the previews", height=220, min_width=200, elem_id="adapt-score"
            )
        self.preview = gr.Image(
            label="Held-out pairs: condition image, result, target", interactive=False, type="pil", format="png",
            elem_id="adapt-preview", buttons=["download"],
        )  # fmt: skip
        self.report = gr.Markdown("", elem_id="adapt-report")

    def _public(self, text: str) -> str:
        """A text without the paths of this machine."""
        return self.service.catalogue.without_paths(self.place.public(text))

    def _shown(self, state: RunState, name: str) -> tuple[Any, ...]:
        last = state.lines[-1] if state.lines else {}
        words = "running" if state.is_running else "stopped; start it again to resume"
        if state.is_stopping:
            words = "stopping; the state is saved first"
        done = state.adapter is not None and not state.is_running
        if state.is_complete and not state.is_running:
            words = f"done; Generate offers it as {name}"
        if last:
            scores = [f"{key} {value:.4g}" for key, value in last.items() if _is_shown(key, value)]
            words += f"; step {last['step']}, " + ", ".join(scores)
        has_failed = state.error and not state.is_running
        return (
            error_html(self._public(state.error or "")) if has_failed else status_html(f"{name}: {words}"),
            _points(state.lines, "loss", lambda key: key == "loss"),
            _points(state.lines, "score", _is_score),
            Image.open(state.preview) if state.preview is not None else None,
            self._public(Report(**state.report).to_markdown()) if state.report is not None else "",
            gr.update(value=str(state.adapter) if done else None, visible=done),
        )

    async def _watch(self, name: str, session: str) -> AsyncIterator[tuple[Any, ...]]:
        mark = self.watching[session] = object()
        try:
            while True:
                state = await asyncio.to_thread(self.place.state, name)
                if self.watching.get(session) is not mark:
                    return
                yield self._shown(state, name)
                if not state.is_running:
                    return
                await asyncio.sleep(1)
        finally:
            if self.watching.get(session) is mark:
                del self.watching[session]

    async def _look(self, name: str | None, request: gr.Request) -> AsyncIterator[Any]:
        """Show the run that is named, while it runs; nothing for a new name."""
        session, name = str(request.session_hash), (name or "").strip()
        mark = self.watching[session] = object()
        if name not in await asyncio.to_thread(self.place.runs):
            if self.watching.get(session) is not mark:
                return  # Start was pressed meanwhile: what it says stays
            nothing = ("", None, None, None, "", gr.update(visible=False))
            yield nothing
            # What the former watch was sending may arrive after that.
            await asyncio.sleep(1)
            if self.watching.get(session) is mark:
                del self.watching[session]
                yield nothing
            return
        async for each in self._watch(name, session):
            yield each

    async def _start(
        self,
        name: str | None,
        pairs: str | None,
        base: str,
        control: str | None,
        steps: float,
        rate: float | None,
        request: gr.Request,
    ) -> AsyncIterator[Any]:
        session = str(request.session_hash)
        self.watching.pop(session, None)
        try:
            name, catalogue = (name or "").strip(), self.service.catalogue
            if not control:
                raise UserError("choose a base control to train an adapter of", "missing-setting")
            other = catalogue.controls.get(name)
            if other is not None and not other.path.startswith(str(self.place.adapters)):
                raise UserError(f"there is a control {name} already; choose another name", "would-overwrite")
            try:
                await asyncio.to_thread(
                    self.place.start,
                    name,
                    pairs or "",
                    base=catalogue.bases[catalogue.find("bases", base)],
                    control=catalogue.base_controls[catalogue.find("base_controls", control)],
                    steps=int(steps or 0),
                    learning_rate=rate,
                )
            except UserError as error:
                if error.code != "in-use":
                    raise
                gr.Info(str(error))
            async for each in self._watch(name, session):
                yield each
        except Exception as error:
            yield error_html(self._public(sentence(error))), *[gr.skip()] * 5

    async def _stop(self, name: str) -> Any:
        try:
            await asyncio.to_thread(self.place.stop, name or "")
            return status_html("stopping; the state is saved first")
        except Exception as error:
            return error_html(self._public(sentence(error)))


def adapt_tab(place: Workplace, service: Service, tab: gr.Tab) -> None:
    """Build the contents of `tab`."""
    _Tab(place, service, tab).build()


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
