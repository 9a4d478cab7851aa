"""The page: its tabs, its looks, and how it is mounted in the server's application."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import RedirectResponse

from controlkit.server.service import Service
from controlkit.ui.adapt_tab import adapt_tab
from controlkit.ui.client import Client
from controlkit.ui.generate_tab import generate_tab
from controlkit.ui.guard import NoAddresses
from controlkit.ui.runs import Workplace
from controlkit.ui.work_tabs import compare_tab, pairs_tab

PATH = "/ui"
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_EVENTS_AT_ONCE = 32
"""Handlers that run at once; they wait for the server's queue, which is the limit."""
_CSS = """
.control-row { border-left: 3px solid var(--color-accent); }
.pixels img { width: 100%; height: 100%; object-fit: contain; }
/* The editor centres its image once, by the width it has before the condition image beside it is there. */
@media (min-width: 768px) { .control-image { max-width: 60%; } }
.pixels img, #results img, #slider img { image-rendering: pixelated; }
#message:empty, #message .prose:empty { display: none; }
.error { color: #b91c1c; background: #fef2f2; border: 1px solid #fecaca; border-radius: 8px; padding: 8px 12px; }
.dark .error { color: #fecaca; background: #450a0a; border-color: #7f1d1d; }
footer { display: none !important; }
"""


def theme() -> Any:
    """The looks; fonts of the system, so that nothing is loaded from elsewhere."""
    return gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=list(_FONTS),
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


def mount(app: FastAPI, service: Service, work: Path) -> None:
    """Mount the page at `PATH`, and send those who open the address itself there.

    Args:
        work: folder for uploaded pairs and runs.
    """
    client, place = Client(service), Workplace(work, service.settings.execution.device, service.offer_control)
    atexit.register(place.stop_all)
    with gr.Blocks(title="controlkit", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        gr.Markdown("## controlkit")
        with gr.Tab("Generate", id="generate") as tab:
            generate_tab(blocks, tab, client)
        with gr.Tab("Pairs", id="pairs"):
            pairs_tab(place)
        with gr.Tab("Adapt", id="adapt") as tab:
            adapt_tab(place, service, tab)
        with gr.Tab("Compare", id="compare"):
            compare_tab(place)
    blocks.queue(default_concurrency_limit=_EVENTS_AT_ONCE, api_open=False)

    @app.get("/", include_in_schema=False)
    async def home() -> RedirectResponse:
        return RedirectResponse(f"{PATH}/")

    gr.mount_gradio_app(
        app,
        blocks,
        PATH,
        theme=theme(),
        css=_CSS,
        show_error=False,
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        max_file_size=service.limits.body * 10**6,
    )
    app.add_middleware(NoAddresses, path=PATH)
