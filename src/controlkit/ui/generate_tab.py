"""The tab *Generate*: prompt, controls, settings, results, and X/Y sheets."""

from __future__ import annotations

import html
import io
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi.concurrency import run_in_threadpool
from PIL import Image

from controlkit.conditions.condition import is_of_labels
from controlkit.errors import UserError
from controlkit.images import resize_cover, shapes_differ
from controlkit.sampling.request import SAMPLERS
from controlkit.sampling.seeds import parse_seeds
from controlkit.server.catalogue import TASK, word_of
from controlkit.server.limits import Limits
from controlkit.server.spec import Spec
from controlkit.ui.client import Client, in_words_of_page, sentence
from controlkit.ui.control_rows import (
    OWN_MODE,
    ControlRow,
    background,
    computed,
    condition_of,
    control_row,
    drawn,
    offered,
    task_update,
)
from controlkit.ui.files import painted, settings_in
from controlkit.ui.first_values import FIRST_CONTROL, FIRST_PROMPT, first_seeds, first_steps
from controlkit.ui.loras import LoraFields
from controlkit.ui.restoring import Restored
from controlkit.ui.results import SIDES, write_files
from controlkit.ui.start_image import StartFields
from controlkit.ui.xy_sheet import AXES, draw_sheet

OWN = "default"
"""Stands for the base's own sampler, and its own autoencoder."""
_NUMBERS = ("guidance", "width", "height", "hires", "hires_strength", "clip_skip")
"""Number fields whose 0 means the default."""
_OF_CONDITION = 'data-of="condition image"'


def error_html(text: str, attribute: str = "") -> str:
    """A message of an error."""
    return f'<div class="error" role="alert" {attribute}>{html.escape(text)}</div>'


def status_html(text: str) -> str:
    """A message of progress."""
    return f'<div role="status">{html.escape(text)}</div>'


class _Tab:
    """The components and what they do."""

    def __init__(self, client: Client, tab: gr.Tab) -> None:
        self.client, self.tab = client, tab
        self.running: dict[tuple[str, str], str] = {}
        """Session of a browser, and `images` or `sheet` -> id of its request, for the button that cancels."""
        self.cancelled: set[str] = set()
        """Sessions whose sheet is to end."""

    def build(self, blocks: gr.Blocks) -> None:
        catalogue, limits = self.client.service.catalogue, self.client.service.limits
        shows_nano = "nano" in catalogue.bases
        with gr.Row():
            with gr.Column(scale=6, min_width=320):
                self.prompt = gr.Textbox(
                    FIRST_PROMPT if shows_nano else "", label="Prompt", lines=2, elem_id="prompt", max_length=10_000
                )
                with gr.Row():
                    self.draw = gr.Button("Generate", variant="primary", elem_id="draw", scale=3)
                    self.cancel = gr.Button("Cancel", elem_id="cancel", scale=1, min_width=80)
                self.rows = self._rows()
                self.add = gr.Button("Add a control", size="sm", elem_id="add-control")
                self.start = StartFields()
                self.loras = LoraFields(list(catalogue.loras))
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    self._settings(list(catalogue.bases), limits)
                with gr.Accordion("X/Y sheet", open=False, elem_id="xy"):
                    self._sheet()
                with gr.Accordion("Settings of an image", open=False, elem_id="restore"):
                    self.dropped = gr.File(
                        label="A PNG from here or of `controlkit generate`, or its settings.json",
                        file_types=[".png", ".json"],
                        elem_id="dropped",
                        height=120,
                    )
            with gr.Column(scale=5, min_width=320):
                self._results()
        self._connect(blocks)

    def _rows(self) -> list[ControlRow]:
        service = self.client.service
        known = offered(service.catalogue)
        demo = (
            Image.open(str(files("controlkit") / "assets" / "demo" / "sailboat.png"))
            .convert("RGB")
            .resize((512, 512), Image.Resampling.LANCZOS)
        )
        first = FIRST_CONTROL if FIRST_CONTROL in known else next(iter(known), None)
        rows = []
        for index in range(service.limits.controls):
            is_first = index == 0 and first is not None
            image = {"background": demo, "layers": [], "composite": demo} if is_first else None
            rows.append(
                control_row(
                    index, service.catalogue, visible=is_first, control=first if is_first else None, image=image
                )
            )
        return rows

    def _settings(self, bases: list[str], limits: Limits) -> None:
        self.negative = gr.Textbox("", label="Negative prompt", max_length=10_000)
        with gr.Row():
            self.base = gr.Dropdown(bases, value=bases[0], label="Base", min_width=150)
            self.seeds = gr.Textbox(
                first_seeds(limits), label="Seeds", info="3,5,9-12; -1 is random", elem_id="seeds", min_width=150
            )
            self.steps = gr.Slider(
                1, limits.steps, first_steps(limits), step=1, label="Steps", elem_id="steps", min_width=150
            )
        with gr.Row():
            self.guidance = gr.Number(0, label="Guidance scale", info="0: the base's", min_width=120)
            self.sampler = gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler", min_width=120)
            self.width, self.height = (
                gr.Number(0, label=name.title(), info="0: the base's", precision=0, elem_id=name, min_width=120)
                for name in ("width", "height")
            )
        with gr.Row():
            self.hires = gr.Number(0, label="Hires factor", info="0: one pass", elem_id="hires", min_width=150)
            self.hires_strength = gr.Number(0, label="Hires strength", info="0: default", min_width=150)
            self.clip_skip = gr.Number(0, label="Clip skip", info="0: the base's", precision=0, min_width=120)
            vaes = list(self.client.service.catalogue.vaes)
            self.vae = gr.Dropdown(
                [OWN, *vaes], value=OWN, label="VAE", visible=bool(vaes), elem_id="vae", min_width=150
            )
        if words := [word_of(name) for name in self.client.service.catalogue.embeddings]:
            gr.Markdown(f"Words of embeddings, for both prompts: {', '.join(words)}", elem_id="words")

    def _sheet(self) -> None:
        self.axes = []
        for name, setting, values in (("X", "weight", "0, 0.5, 1, 1.5"), ("Y", "seed", "0-1")):
            with gr.Row():
                key = gr.Dropdown(["none", *AXES], value=setting, label=f"{name}: setting", min_width=140, scale=1)
                text = gr.Textbox(values, label=f"{name}: values", info="comma, or | between", min_width=180, scale=2)
            self.axes.append((key, text))
        self.draw_sheet = gr.Button("Generate the sheet", elem_id="draw-sheet")
        self.sheet = gr.Image(
            label="Sheet", interactive=False, type="filepath", format="png", elem_id="sheet", buttons=["download"]
        )

    def _results(self) -> None:
        self.message = gr.HTML("", elem_id="message")
        self.live = gr.Image(
            label="In the making", visible=False, interactive=False, type="filepath", format="png", height=220,
            elem_id="live", elem_classes="pixels", buttons=[],
        )  # fmt: skip
        self.gallery = gr.Gallery(
            label="Results", columns=2, height="auto", object_fit="contain", format="png", type="filepath",
            elem_id="results", buttons=["download", "fullscreen"], interactive=False, allow_preview=False,
        )  # fmt: skip
        self.before = gr.Radio(list(SIDES), value=SIDES[0], label="Compare with")
        self.slider = gr.ImageSlider(
            label="Before and after", type="filepath", format="png", elem_id="slider", interactive=False,
            buttons=["download"], max_height=430,
        )  # fmt: skip
        self.download = gr.DownloadButton("Download all", visible=False, elem_id="download")
        self.result = gr.State(None)
        self.selected = gr.State(0)

    @property
    def request_inputs(self) -> list[Any]:
        return [
            *(self.prompt, self.negative, self.base, self.seeds, self.steps, self.guidance, self.sampler),
            *(self.width, self.height, self.hires, self.hires_strength, self.clip_skip, self.vae, self.shown),
            *(*self.start.inputs, *self.loras.inputs),
            *(component for row in self.rows for component in row.inputs),
        ]

    def _connect(self, blocks: gr.Blocks) -> None:
        self.shown = gr.State([row.group.visible for row in self.rows])
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        outputs = [self.message, self.live, self.gallery, self.before, self.slider, self.download]
        outputs += [self.result, self.selected]
        self.draw.click(self._draw, set(self.request_inputs), outputs, scroll_to_output=True, **private)
        axes = {component for axis in self.axes for component in axis}
        self.draw_sheet.click(self._draw_sheet, {*self.request_inputs, *axes}, [self.message, self.sheet], **private)
        self.cancel.click(self._cancel, None, self.message, **private)
        self.gallery.select(self._select, [self.result, self.before], [self.selected, self.slider], **private)
        self.before.change(self._compare, [self.result, self.selected, self.before], self.slider, **private)
        groups = [row.group for row in self.rows]
        self.add.click(self._add_row, self.shown, [self.shown, *groups], **private)
        self.start.take.click(self._take, [self.result, self.selected], [self.start.image, self.message], **private)
        self.dropped.upload(self._restore, self.dropped, [self.message, *self._restored], **private)
        lists = [row.control for row in self.rows]
        for event in (blocks.load, self.tab.select):
            event(self._listed, None, lists, **private)
        for row in self.rows:
            self._connect_row(row, blocks, groups, private)

    def _connect_row(self, row: ControlRow, blocks: gr.Blocks, groups: list[Any], private: dict[str, Any]) -> None:
        def remove(shown: list[bool]) -> list[Any]:
            return self._with_row(shown, row.index, False)

        row.remove.click(remove, self.shown, [self.shown, *groups], **private)

        async def preview(values: dict[Any, Any]) -> Any:
            return await self._preview(row, values)

        inputs = {row.control, row.task, row.image, row.prepared, *row.parameters.inputs, self.message}
        inputs |= {self.base, self.width, self.height}
        outputs = [row.preview, self.message]
        changes = [row.control.change, row.task.change, row.image.change, row.image.input, row.image.upload]
        changes.append(row.prepared.change)
        changes += [field.change for field in (*row.parameters.fields, self.base, self.width, self.height)]
        gr.on(changes, preview, inputs, outputs, trigger_mode="always_last", **private)
        if row.index == 0:
            blocks.load(preview, inputs, outputs, **private)

        def parameters(name: str | None, task: str | None) -> list[Any]:
            return row.parameters.updates(condition_of(self.client.service.catalogue, name, task))

        def other_control(name: str | None) -> list[Any]:
            return [gr.update(**task_update(self.client.service.catalogue, name)), *parameters(name, None)]

        row.control.input(other_control, row.control, [row.task, *row.parameters.outputs], **private)
        row.task.input(parameters, [row.control, row.task], list(row.parameters.outputs), **private)

        def mask(masked: bool, image: Any, mask: Any) -> Any:
            strokes, shown = painted(mask), drawn(image)
            fits = strokes is not None and shown is not None and not shapes_differ(strokes.size, shown.size)
            if not masked or fits:  # what is painted stays, also while it is hidden
                return gr.update(visible=masked or "hidden")
            return gr.update(visible=True, value=background(image))

        def other_image(masked: bool, image: Any) -> Any:
            return background(image) if masked else None

        row.masked.change(mask, [row.masked, row.image, row.mask], row.mask, **private)
        gr.on([row.image.upload, row.image.clear], other_image, [row.masked, row.image], row.mask, **private)

    # Rows of controls

    def _with_row(self, shown: list[bool], index: int, visible: bool) -> list[Any]:
        shown = [visible if each == index else before for each, before in enumerate(shown)]
        return [shown, *(gr.update(visible=each) for each in shown)]

    def _add_row(self, shown: list[bool]) -> list[Any]:
        free = [index for index, visible in enumerate(shown) if not visible]
        if not free:
            gr.Info(self.client.sizes)
            return [shown, *(gr.skip() for _ in shown)]
        return self._with_row(shown, free[0], True)

    def _listed(self) -> Any:
        """Lists of the controls that the server has now: one may have been trained since the page was built."""
        names = offered(self.client.service.catalogue)
        updates = [gr.update(choices=names) for _ in self.rows]
        return updates[0] if len(updates) == 1 else updates

    async def _preview(self, row: ControlRow, values: dict[Any, Any]) -> tuple[Any, Any]:
        """The condition image that a control would be given."""
        name, catalogue = values[row.control], self.client.service.catalogue
        own, image = row.condition(values, catalogue), row.given(values, catalogue)
        if image is None or not name:
            return None, gr.skip()
        width, height = values[self.width], values[self.height]
        try:
            condition = None if values[row.prepared] else computed(own)
            if not (width and height):
                side = await run_in_threadpool(_own_size, catalogue.bases[values[self.base]])
                width, height = width or side, height or side
            self.client.service.limits.check_size(int(width), int(height), None)
            of_labels = values[row.prepared] and is_of_labels(own)
            sized = resize_cover(image, int(width), int(height), nearest=of_labels)
            parameters = row.parameters.values(values, condition)
            found = await self.client.condition_image(sized, condition, parameters)
        except Exception as error:
            return None, error_html(sentence(error), _OF_CONDITION)
        # What was wrong with a condition image is not any more; other messages stay, errors of Generate among them.
        return found, "" if _OF_CONDITION in (values[self.message] or "") else gr.skip()

    def _take(self, result: dict[str, Any] | None, index: int) -> tuple[Any, Any]:
        """Put the selected result into the start image."""
        if not result:
            return gr.skip(), error_html("there is no result yet; draw one first")
        return self.start.taken(result["images"][index]), gr.skip()

    # Drawing

    def _body(self, values: Mapping[Any, Any]) -> dict[str, Any]:
        """The body of a request.

        Raises:
            UserError: a value cannot be used.
        """
        sampler, vae, catalogue = values[self.sampler], values[self.vae], self.client.service.catalogue
        rows = [row for row in self.rows if values[self.shown][row.index]]
        return {
            "prompt": values[self.prompt],
            "negative_prompt": values[self.negative],
            "base": values[self.base],
            "seeds": list(parse_seeds(values[self.seeds], "Seeds")),
            "steps": values[self.steps],
            "sampler": None if sampler == OWN else sampler,
            **{name: _number(values[getattr(self, name)]) for name in _NUMBERS},
            "vae": None if vae == OWN else vae,
            "loras": self.loras.body(values),
            "embeddings": catalogue.embeddings_in(f"{values[self.prompt]}\n{values[self.negative]}"),
            **self.start.body(values),
            "controls": [body for row in rows if (body := row.body(values, catalogue)) is not None],
        }

    async def _draw(self, values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        session = str(request.session_hash)
        numbers = [row.index + 1 for row in self.rows if values[self.shown][row.index] and values[row.control]]
        try:
            body = self._body(values)
            spec, sent = await self.client.spec(body)
            spec.start_image = spec.request["image"] is not None
            job = await self.client.submit(spec, sent)
            self.running[session, "images"] = job.id
            async for now in self.client.watch(job.id):
                shown: dict[Any, Any] = {self.message: status_html(now.line)}
                if now.preview is not None:
                    shown[self.live] = gr.update(value=Image.open(io.BytesIO(now.preview)), visible=True)
                yield shown
            yield await self._finished(job.id, spec, sent, numbers)
        except Exception as error:
            text = in_words_of_page(sentence(error), numbers)
            yield {self.message: error_html(text), self.live: gr.update(visible=False)}
        finally:
            await self._left(session, "images")

    async def _finished(
        self, name: str, spec: Spec, sent: Mapping[str, bytes], numbers: Sequence[int]
    ) -> dict[Any, Any]:
        service = self.client.service
        job = await service.job(name)
        values = (job.result if job is not None else None) or {}
        images, maps, start = [await service.files(name, role) for role in ("images", "maps", "start")]
        hidden = gr.update(visible=False)
        if not images:
            return {self.message: status_html("cancelled"), self.live: hidden}
        result, archive = await run_in_threadpool(write_files, spec, sent, values, images, maps, start)
        assert job is not None and job.started is not None and job.finished is not None
        count = "1 image" if len(images) == 1 else f"{len(images)} images"
        words = [f"{count} in {job.finished - job.started:.1f} s"]
        words += [in_words_of_page(note, numbers) for note in values["notes"]]
        if job.state == "cancelled":
            words.insert(0, "cancelled; finished until then:")
        return {
            self.message: status_html("; ".join(words)),
            self.live: hidden,
            self.gallery: gr.update(
                value=[(path, f"seed {seed}") for path, seed in zip(result["images"], values["seeds"], strict=True)],
                selected_index=None,
            ),
            self.before: gr.update(value=_side(result)),
            self.slider: self._compare(result, 0, _side(result)),
            self.download: gr.update(value=str(archive), visible=True),
            self.result: result,
            self.selected: 0,
        }

    async def _cancel(self, request: gr.Request) -> Any:
        session = str(request.session_hash)
        self.cancelled.add(session)
        names = [name for (owner, _), name in self.running.items() if owner == session]
        for name in names:
            await self.client.service.cancel(name)
        return status_html("cancelling" if names else "nothing is being drawn")

    async def _left(self, session: str, kind: str) -> None:
        """Forget a request. If its browser has gone, it still runs, and nobody can have its images: it is cancelled."""
        name = self.running.pop((session, kind), None)
        if name is not None:
            await self.client.service.cancel(name)

    def _select(self, result: dict[str, Any] | None, before: str, event: gr.SelectData) -> tuple[int, Any]:
        index = int(event.index)
        return index, self._compare(result, index, before)

    def _compare(self, result: dict[str, Any] | None, index: int, before: str) -> Any:
        """The two sides of the slider; empty without a control."""
        if not result or not result[before] or index >= len(result["images"]):
            return None
        return (result[before][0], result["images"][index])

    # X/Y sheets

    async def _draw_sheet(self, values: dict[Any, Any], request: gr.Request) -> AsyncIterator[dict[Any, Any]]:
        session = str(request.session_hash)
        self.cancelled.discard(session)
        try:
            axes = [(values[key], values[text]) for key, text in self.axes if values[key] != "none"]
            spec, sent = await self.client.spec(self._body(values))
            async for line, sheet in draw_sheet(
                self.client, spec, sent, axes, lambda: session in self.cancelled, lambda job: self._now(session, job)
            ):
                shown: dict[Any, Any] = {self.message: status_html(line)}
                if sheet is not None:
                    shown[self.sheet] = sheet
                yield shown
        except Exception as error:
            yield {self.message: error_html(sentence(error))}
        finally:
            await self._left(session, "sheet")

    def _now(self, session: str, job: str) -> None:
        self.running[session, "sheet"] = job

    # Settings of an image

    @property
    def _restored(self) -> list[Any]:
        """What `_restore` sets, after the message."""
        rows = [
            each
            for row in self.rows
            for each in (row.group, row.control, row.task, row.weight, row.start, row.end, row.mode, row.prepared)
        ]
        parameters = [each for row in self.rows for each in row.parameters.outputs]
        return [
            *(self.prompt, self.negative, self.base, self.seeds, self.steps, self.guidance, self.sampler),
            *(self.width, self.height, self.hires, self.hires_strength, self.clip_skip, self.vae),
            *(*self.start.settings, *self.loras.outputs, self.shown, *rows, *parameters),
        ]

    def _restore(self, path: str | None) -> list[Any]:
        """The settings in a dropped file. Images stay as they are: a PNG does not hold them."""
        nothing = [gr.skip()] * len(self._restored)
        if path is None:
            return [gr.skip(), *nothing]
        try:
            stored = Restored.of(settings_in(path), self.client.service.catalogue, len(self.rows))
        except UserError as error:
            text = str(error).replace(str(Path(path).parent) + "/", "")
            return [error_html(text), *nothing]
        except Exception as error:
            return [error_html(sentence(error)), *nothing]
        fields, base = stored.fields, gr.skip() if stored.base is None else stored.base
        vae = OWN if stored.vae is None else stored.vae
        notes, most = list(stored.notes), self.client.service.limits.steps
        if fields["steps"] > most:
            notes.append(f"steps is {most}, the most here, in place of {fields['steps']}")
        values = [
            *(fields["prompt"], fields["negative_prompt"], base, stored.seeds, min(fields["steps"], most)),
            *(fields["guidance"], fields["sampler"] or OWN, fields["width"], fields["height"], fields["hires"]),
            *(fields["hires_strength"], fields["clip_skip"], vae),
            *(*self.start.updates(fields), *self.loras.updates(stored.loras)),
            [index < len(stored.controls) for index in range(len(self.rows))],
        ]
        parameters: list[Any] = []
        for index, row in enumerate(self.rows):
            if index >= len(stored.controls):
                values += [gr.update(visible=False), *[gr.skip()] * 7]
                parameters += [gr.skip()] * len(row.parameters.outputs)
                continue
            use = stored.controls[index]
            # Generate checks the value against the slider's ends.
            weight = gr.update(value=use["weight"], minimum=min(0, use["weight"]), maximum=max(2, use["weight"]))
            catalogue, task = self.client.service.catalogue, (use["inputs"] or {}).get(TASK)
            tasks = task_update(catalogue, use["control"], task)
            values += [gr.update(visible=True), use["control"], gr.update(**tasks)]
            values += [weight, use["start"], use["end"], use["mode"] or OWN_MODE, use["prepared"]]
            condition = condition_of(catalogue, use["control"], tasks["value"])
            parameters += row.parameters.updates(condition, use["parameters"])
        done = "; ".join(["settings restored; images of controls and the start image stay as they are", *notes])
        return [status_html(done), *values, *parameters]


def generate_tab(blocks: gr.Blocks, tab: gr.Tab, client: Client) -> None:
    """Build the contents of `tab`."""
    _Tab(client, tab).build(blocks)


def _side(result: Mapping[str, Any]) -> str:
    """What a result is compared with at first."""
    return next((side for side in SIDES if result[side]), SIDES[0])


def _own_size(base: str) -> int:
    """Side in pixels of what a base draws by default, from its configuration."""
    from controlkit.bases.meta import meta_base

    return meta_base(base).size


def _number(value: Any) -> Any:
    """A number field; 0, which Gradio makes of an empty one, means the default."""
    return None if value in (None, 0) else value
