"""The callback of a step: progress, previews, cancellation; and Ctrl-C."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from controlkit.apps import generate as verb
from controlkit.apps.cli import main
from controlkit.bases.latent_rgb import (
    FLUX_LATENT_RGB,
    NANO_LATENT_RGB,
    SD1_LATENT_RGB,
    SD3_LATENT_RGB,
    SDXL_LATENT_RGB,
    fit_latent_rgb,
    latents_to_rgb,
)
from controlkit.bases.load import load_base
from controlkit.bases.schedules.rectified_flow import RectifiedFlow
from controlkit.bases.schedules.variance_preserving import VariancePreserving
from controlkit.nano.evaluation_sets import read_set
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample_prompts
from controlkit.sampling.uses import ControlUse
from refusals import check, refused


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_estimate_of_clean_latents_inverts_the_noise(prediction):
    schedule = RectifiedFlow({}) if prediction == "flow" else VariancePreserving({"prediction_type": prediction})
    z, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor(400)
    times = t.expand(2)
    estimate = schedule.clean(schedule.target(z, noise, times), schedule.add_noise(z, noise, times), t)
    assert torch.allclose(estimate, z, atol=1e-4)


def test_steps_keep_no_graph_even_with_a_control_in_training(tiny_base, tiny_control, monkeypatch):
    modes, predict = [], tiny_base.predict
    monkeypatch.setattr(
        tiny_base,
        "predict",
        lambda *args, **more: modes.append(torch.is_inference_mode_enabled()) or predict(*args, **more),
    )
    control = copy.deepcopy(tiny_control).requires_grad_(True)
    use = ActiveControl(control=control, hint=control.encode(torch.rand(1, 3, 64, 64), tiny_base))
    (batch,) = sample_prompts(tiny_base, prompts=["a"], seeds=[0], steps=2, uses=[use])
    assert modes and all(modes) and not batch.requires_grad


def test_matrices_have_a_row_for_each_channel():
    assert [len(rows) for rows in (SD1_LATENT_RGB, SDXL_LATENT_RGB, SD3_LATENT_RGB, NANO_LATENT_RGB)] == [4, 4, 16, 5]
    assert len(FLUX_LATENT_RGB) == 17


def test_a_fit_finds_a_linear_autoencoder():
    matrix = torch.rand(5, 3) / 5
    z = torch.randn(3, 4, 8, 8) / 4
    images = latents_to_rgb(z, matrix.tolist()).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.allclose(torch.tensor(fit_latent_rgb(z, images)), matrix, atol=1e-4)


def test_the_matrix_of_nano_is_the_fit_of_its_autoencoder():
    """If nano's autoencoder changed: print the fit and replace the constant."""
    base = load_base("nano")

    def read(name):
        images = np.stack(read_set(name).images)
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        return base.encode_image(x), torch.nn.functional.avg_pool2d(x, base.factor)

    z, targets = read("seen")
    assert np.allclose(fit_latent_rgb(z, targets), NANO_LATENT_RGB, atol=0.01)
    assert base.latent_rgb is NANO_LATENT_RGB
    z, targets = read("held-out")
    error = (latents_to_rgb(z, NANO_LATENT_RGB) - targets).square().mean()
    assert 1 - error / targets.var(dim=(0, 2, 3)).mean() > 0.89


def test_previews_show_the_images():
    """At the last step the preview is the image, up to the matrix; in the middle it is already near."""
    differences = {}
    previews = {}

    def watch(step):
        previews[step.step] = [np.asarray(image, float) for image in step.preview()]
        assert (step.steps, step.images) == (10, range(2))

    made = generate(GenerateRequest(prompt="red apple, noto style", seeds=(0, 1), steps=10), on_step=watch)
    size = previews[1][0].shape[1::-1]
    assert size == (16, 16)
    small = [np.asarray(one.image.resize(size, Image.Resampling.BOX), float) for one in made.images]
    for step, images in previews.items():
        differences[step] = np.mean([np.abs(one - two).mean() for one, two in zip(images, small, strict=True)])
    assert differences[10] < 25 and differences[10] < differences[1]


def test_a_base_without_a_matrix_has_no_previews(tiny_base, monkeypatch):
    monkeypatch.setattr(type(tiny_base), "usual_latent_rgb", ())
    with refused("unsupported", tiny_base.name, "4"):
        generate(GenerateRequest(prompt="x", steps=1), base=tiny_base, on_step=lambda step: step.preview())


def test_a_callback_cancels_and_nothing_remains(tiny_base, tiny_control, condition_image, tmp_path):
    Image.fromarray(condition_image).convert("RGB").save(tmp_path / "edges.png")
    use = ControlUse(control="edges", image=str(tmp_path / "edges.png"), prepared=True)
    request = GenerateRequest(prompt="cat face", controls=(use,), seeds=(0, 1), batch_size=1, steps=4)
    settings = {"base": tiny_base, "controls": [tiny_control]}
    expected = generate(request, **settings)
    seen = []

    class Cancelled(Exception):
        pass

    def cancel(step):
        seen.append((step.done, step.total, step.step, [*step.images]))
        if step.done == 6:
            raise Cancelled

    finished = []
    with pytest.raises(Cancelled):
        generate(request, on_step=cancel, on_images=lambda made: finished.append(len(made.images)), **settings)
    assert seen == [(done, 8, (done - 1) % 4 + 1, [(done - 1) // 4]) for done in range(1, 7)]
    assert finished == [1]
    again = generate(request, **settings)
    for one, two in zip(expected.images, again.images, strict=True):
        assert one.image.tobytes() == two.image.tobytes()


@pytest.mark.parametrize("varied", [(), ("--prompt", "cat face")])
def test_an_interruption_keeps_the_finished_images(varied, base_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "apple", *varied, "--base", "base", "--steps", "2", "--seeds", "3", "--batch-size", "1"]
    count = 6 if varied else 3

    class Interrupted(verb.Progress):
        def __call__(self, done, total=None):
            super().__call__(done, total)
            if done == 2 * count - 1:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verb, "Progress", Interrupted)
        assert main([*words, "--out", "out"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and f"{count - 1} finished images are in out" in err
    finished = sorted(Path("out").glob("*.png"))
    assert len(finished) == count - 1
    before = {path: path.read_bytes() for path in finished}
    # Its settings draw all images, the same.
    assert main(["generate", "--from", "out", "--out", "out"]) == 0
    assert len(list(Path("out").glob("*.png"))) == count
    for path, data in before.items():
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(io.BytesIO(data))))


def test_an_interruption_before_the_first_image_leaves_nothing(base_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb.Progress, "__call__", interrupted)
    assert main(["generate", "apple", "--base", "base", "--steps", "2", "--out", "out"]) == 130
    assert not Path("out").exists() and "finished" not in capsys.readouterr().err


def test_previews_on_request(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "red apple", "--steps", "5", "--seeds", "3"]
    written = []
    from controlkit.sampling import step as module

    write = module.write_preview
    monkeypatch.setattr(module, "write_preview", lambda step, path: written.append(step.step) or write(step, path))
    assert main([*words, "--preview-every", "2", "--out", "out", "--json"]) == 0
    assert written == [2, 4, 5]
    assert Image.open("out/preview.png").size == (128, 128)  # three images in two columns
    images = json.loads(capsys.readouterr().out)["images"]
    assert len(images) == 3
    assert main([*words, "--out", "without"]) == 0
    assert not Path("without/preview.png").exists()
    for name in images:  # previews change nothing
        assert Path(name).read_bytes() == (Path("without") / Path(name).name).read_bytes()
    capsys.readouterr()
    assert main([*words, "--preview-every", "0"]) == 2
    check(capsys.readouterr().err, "out-of-range", "--preview-every", 0)
