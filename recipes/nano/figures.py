"""The figures in the pages, by name."""

from __future__ import annotations

import tables_of_nano as nano
import tables_of_speed as speed
import tables_of_studies as studies
import tables_of_systems as systems
from results import Figure, Speed, three, two

_STEPS = (
    ("adapter", "cpu", "adapter_training-sd15-256-cpu"),
    ("adapter", "h200-1", "adapter_training-sd15-512-cuda-no-checkpointing"),
    ("adapter", "h200-4", "adapter_training-sd15-512-cuda-batch-4"),
    ("controlnet", "cpu", "controlnet_training-sd15-256-cpu"),
    ("controlnet", "h200-4", "controlnet_training-sd15-512-cuda-batch-4"),
)
"""Training steps in the README: network, where, file of results."""

FIGURES: dict[str, Figure | Speed] = {
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
    "further.table": Figure("further", nano.further_table, block=True),
    "quick-start.gap": Figure("quick-start", lambda r: two(r.report("quick-start")["rows"][0][4])),
    "quick-start.base": Figure("quick-start", lambda r: two(r.report("quick-start", "base control")["rows"][0][4])),
    "new-condition.budgets": Figure("new-condition", studies.budgets_table, block=True),
    "new-condition.claims": Figure("new-condition", studies.claims_table, block=True),
    "new-condition.ablation": Figure("new-condition", studies.ablation_table, block=True),
    "new-condition.ranks-and-pairs": Figure("new-condition", studies.ranks_and_pairs_table, block=True),
    "new-condition.mode-control": Figure("new-condition-control", studies.mode_table, block=True),
    "new-condition.ends": Figure("new-condition", studies.ends_of_new_conditions),
    "new-condition.seconds": Figure("new-condition", studies.seconds_of_an_adapter),
    "new-condition.pixel": Figure("new-condition", studies.new_condition("pixel")),
    "new-condition.hints": Figure("new-condition", studies.new_condition("lineart_color_hints")),
    "new-condition.hints-control": Figure(
        "new-condition-control", studies.new_condition("lineart_color_hints", "new-condition-control")
    ),
    "uni-controlnet-local.table": Figure(
        "uni-controlnet-local", systems.conditions_table("uni-controlnet-local"), block=True
    ),
    "controlnet-union.table": Figure("controlnet-union", systems.conditions_table("controlnet-union"), block=True),
    "image-prompt.table": Figure("image-prompt", systems.image_prompt_table, block=True),
    "guidance-modes.table": Figure("guidance-modes", studies.guidance_modes_table, block=True),
    "guidance-modes.ends": Figure("guidance-modes", studies.guidance_modes_ends),
    "several-balanced.both": Figure("several-balanced", studies.both_of_a_mix),
    "several-systems.table": Figure("several-systems", systems.several_systems_table, block=True),
    "task-instructions.table": Figure("task-instructions", systems.task_instructions_table, block=True),
    "scenes.table": Figure("scenes", systems.scenes_table, block=True),
    "convergence.table": Figure("convergence", studies.convergence_table, block=True),
    "several.table": Figure("several", studies.several_table("several"), block=True),
    "several-canny.table": Figure("several-canny", studies.several_table("several-canny"), block=True),
    "ambiguous.table": Figure("ambiguous", studies.ambiguous_table, block=True),
    "community.table": Figure("community", studies.community_table, block=True),
    "community.text-encoders": Figure("community", studies.text_encoder_table, block=True),
    "speed.ctrlora-sampling": Speed(speed.ctrlora_sampling, block=True),
    "speed.controlnet-sampling": Speed(speed.controlnet_sampling, block=True),
    "speed.adapter-training": Speed(speed.adapter_training, block=True),
    "speed.controlnet-training": Speed(speed.controlnet_training, block=True),
    "base.steps-or-width": Speed(nano.steps_or_width_table, block=True, file="steps-or-width"),
    "speed.memory": Speed(speed.memory, block=True),
    "speed.what-pays": Speed(speed.what_pays("what_pays-nano-64-cpu", "nano, 4 images (8 rows under CFG)"), block=True),
    "speed.what-pays-sd15": Speed(
        speed.what_pays(
            "what_pays-sd15-256-cpu",
            "Stable Diffusion 1.5 at 256 x 256, 1 image (2 rows), one core of an Intel Xeon without bf16 arithmetic",
        ),
        block=True,
    ),
    "speed.what-pays-amx": Speed(
        speed.what_pays("what_pays-nano-64-cpu-amx", "nano, 32 images (64 rows in a call), one core with AMX"),
        block=True,
    ),
    "speed.busy": Speed(speed.busy_table, block=True),
    "speed.demo": Speed(speed.time_of("busy_machine-nano-64-cpu", "seconds", "demo, ours, alone")),
    "speed.demo-busy": Speed(speed.time_of("busy_machine-nano-64-cpu", "seconds", "demo, ours, busy")),
    **{
        f"speed.call-{wait}-{when}": Speed(
            speed.time_of("busy_machine-sd15-256-cpu", "seconds", f"call, {wait}, {when}")
        )
        for wait in ("ours", "spinning")
        for when in ("alone", "busy")
    },
    "speed.ctrlora-nano-1": Speed(speed.time_of("ctrlora_sampling-nano-64-cpu", "seconds", "plan")),
    "speed.ctrlora-nano-4": Speed(speed.time_of("ctrlora_sampling-nano-64-cpu", "seconds", "plan", case=1)),
    "speed.ctrlora-h200-1": Speed(speed.time_of("ctrlora_sampling-sd15-512-cuda", "seconds", "plan")),
    "speed.ctrlora-h200-4": Speed(speed.time_of("ctrlora_sampling-sd15-512-cuda", "seconds", "plan", case=1)),
    "speed.ctrlora-h200-reference-1": Speed(speed.time_of("ctrlora_sampling-sd15-512-cuda", "seconds", "reference")),
    "speed.ctrlora-h200-reference-4": Speed(
        speed.time_of("ctrlora_sampling-sd15-512-cuda", "seconds", "reference", case=1)
    ),
    "speed.controlnet-h200": Speed(speed.time_of("controlnet_sampling-sd15-512-cuda", "seconds", "ours")),
    "speed.controlnet-h200-diffusers": Speed(
        speed.time_of("controlnet_sampling-sd15-512-cuda", "seconds", "diffusers")
    ),
    **{
        f"speed.{name}-step-{place}{suffix}": Speed(speed.time_of(file, "seconds_a_step", way))
        for name, place, file in _STEPS
        for way, suffix in (("ours", ""), ("reference", "-reference"))
    },
    "speed.adapter-ratio": Speed(speed.ratio_of("adapter_training-sd15-256-cpu", "reference_to_ours")),
    "speed.adapter-ratio-without": Speed(
        speed.ratio_of("adapter_training-sd15-256-cpu-no-checkpointing", "reference_to_ours")
    ),
    "speed.adapter-ratio-h200": Speed(speed.ratio_of("adapter_training-sd15-512-cuda-batch-4", "reference_to_ours")),
    "speed.controlnet-ratio-h200": Speed(
        speed.ratio_of("controlnet_training-sd15-512-cuda-batch-4", "reference_to_ours")
    ),
    "speed.ctrlora-ratio-h200-1": Speed(speed.ratio_of("ctrlora_sampling-sd15-512-cuda", "reference_to_plan")),
    "speed.ctrlora-ratio-h200-4": Speed(speed.ratio_of("ctrlora_sampling-sd15-512-cuda", "reference_to_plan", case=1)),
    "speed.controlnet-ratio": Speed(speed.ratio_of("controlnet_training-sd15-256-cpu", "reference_to_ours")),
    "speed.peak": Speed(speed.peak_of("+ frozen weights in bf16")),
    "speed.peak-checkpointing": Speed(speed.peak_of("+ gradient checkpointing")),
    "speed.peak-controlnet": Speed(speed.peak_of("ControlNet, float32, nothing saved")),
    "community.distance": Figure("community", studies.community_distances),
}
"""Name in the pages => figure."""
