"""The figures of nano in the pages, by name."""

from __future__ import annotations

import tables_of_nano as nano
import tables_of_studies as studies
import tables_of_systems as systems
from results import Figure, three

FIGURES: dict[str, Figure] = {
    "base.table": Figure("base", nano.base_table, block=True),
    "base.card": Figure("base", nano.card_table, block=True),
    "base.top5": Figure("base", lambda r: three(nano.value(r, nano.RETRIEVAL, 1))),
    "base.top5-percent": Figure("base", lambda r: f"{nano.value(r, nano.RETRIEVAL, 1):.0%}".replace("%", " %")),
    "base.top5-ceiling-percent": Figure("base", lambda r: f"{nano.value(r, nano.RETRIEVAL, 2):.1%}".replace("%", " %")),
    "base.top5-row": Figure("base", nano.base_row(nano.RETRIEVAL, 1, 2, 2, 3)),
    "base.colour-row": Figure("base", nano.base_row(nano.COLOUR, 1, 2, 2, 3)),
    "base.distance-row": Figure("base", nano.base_row(nano.SEEN, 3, 0, 0, 0)),
    "base.autoencoder": Figure(
        "base",
        lambda r: f"{nano.value(r, nano.AUTOENCODER, 0):.1f} dB PSNR, {nano.value(r, nano.AUTOENCODER, 0, 2):.3f} SSIM",
    ),
    "base.top5-guidance-2": Figure("base-sampling", nano.sampling("guidance 2")),
    "base.top5-guidance-5": Figure("base-sampling", nano.sampling("guidance 5")),
    "base.top5-dpm": Figure("base-sampling", nano.sampling("dpm++")),
    "base.top5-unipc": Figure("base-sampling", nano.sampling("unipc")),
    "base.top5-60-steps": Figure("base-sampling", nano.sampling("60 steps")),
    "canny.table": Figure("canny", nano.canny_table, block=True),
    "canny.summary": Figure(
        "canny", nano.canny_summary("held-out", "{ends}: {gap} of the gap closed ({balanced} with `--mode balanced`)")
    ),
    "canny.row": Figure(
        "canny", nano.canny_summary("held-out", "{ends} (gap closed {gap}; {balanced} with `--mode balanced`)")
    ),
    "canny.openmoji-row": Figure("canny", nano.canny_summary("openmoji", "{ends} (gap closed {gap}; {balanced})")),
    "canny.guidance": Figure("guidance", nano.guidance_table, block=True),
    "systems.table": Figure("systems", systems.systems_table, block=True),
    "adapters.table": Figure("adapters", nano.adapters_table, block=True),
    "new-condition.budgets": Figure("new-condition", studies.budgets_table, block=True),
    "new-condition.claims": Figure("new-condition", studies.claims_table, block=True),
    "new-condition.ablation": Figure("new-condition", studies.ablation_table, block=True),
    "new-condition.ranks-and-pairs": Figure("new-condition", studies.ranks_and_pairs_table, block=True),
    "new-condition.mode-control": Figure("new-condition-control", studies.mode_table, block=True),
    "new-condition.pixel": Figure("new-condition", studies.new_condition("pixel")),
    "new-condition.hints": Figure("new-condition", studies.new_condition("lineart_color_hints")),
    "new-condition.hints-control": Figure(
        "new-condition-control", studies.new_condition("lineart_color_hints", "new-condition-control")
    ),
    "uni-controlnet-local.table": Figure("uni-controlnet-local", systems.local_table, block=True),
    "several-systems.table": Figure("several-systems", systems.several_systems_table, block=True),
    "task-instructions.table": Figure("task-instructions", systems.task_instructions_table, block=True),
    "scenes.table": Figure("scenes", systems.scenes_table, block=True),
    "convergence.table": Figure("convergence", studies.convergence_table, block=True),
    "several.table": Figure("several", studies.several_table, block=True),
    "ambiguous.table": Figure("ambiguous", studies.ambiguous_table, block=True),
    "community.table": Figure("community", studies.community_table, block=True),
    "community.text-encoders": Figure("community", studies.text_encoder_table, block=True),
    "community.distance": Figure("community", studies.community_distances),
}
"""Name in the pages => figure."""
