"""Images of diffusers' pipelines and ours, from the same weights, prompts and seeds."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

from controlkit.sampling.sampler import sample

PROMPT = "red apple, noto style, on a blue background"
NEGATIVE = "cat face"
SEEDS = (3, 11)
STEPS = 5


def parts(base):
    return {
        "vae": base.vae,
        "text_encoder": base.text_encoder,
        "tokenizer": base.tokenizer,
        "unet": base.unet,
        "scheduler": DDIMScheduler.from_config(base.scheduler_config),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def generators(seeds=SEEDS):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def ours(base, uses=(), **changes):
    settings = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "seeds": SEEDS,
        "steps": STEPS,
        "guidance": 4.0,
    }
    return torch.cat(list(sample(base, uses=uses, **{**settings, **changes})))


def theirs(pipeline, **changes):
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "pt", "eta": 0.0}
    return pipeline(
        [PROMPT] * len(SEEDS),
        negative_prompt=[NEGATIVE] * len(SEEDS),
        generator=generators(),
        **{**settings, **changes},
    ).images


def assert_same(a, b, tolerance):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance
