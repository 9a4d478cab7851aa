"""Training an embedded base's autoencoder on icons."""

from __future__ import annotations

import torch

from controlkit.nano.recipes import AutoencoderRecipe
from controlkit.training.run import run


def test_an_autoencoder_continued_equals_one_in_one_go(tmp_path, icons_file):
    from diffusers import AutoencoderKL

    def recipe(out, steps):
        return AutoencoderRecipe(
            out=str(tmp_path / out), icons=str(icons_file), steps=steps, channels=(8, 8), batch_size=2, ema=0.9,
            min_lr_rate=1.0, warmup_steps=0, preview_every=100, log_every=1, device="cpu",
        )  # fmt: skip

    scores = run(recipe("whole", 6))
    run(recipe("broken", 3))
    assert run(recipe("broken", 6)) == scores
    assert set(scores) == {"psnr", "latent_std"}
    a, b = (AutoencoderKL.from_pretrained(tmp_path / out / "vae") for out in ("whole", "broken"))
    assert a.config.scaling_factor == b.config.scaling_factor
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
