"""The base and the control that ship: real trained weights, in diffusers' hands and in ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from controlkit.bases.folders import nano_folder
from controlkit.bases.load import load_base
from controlkit.conditions import find
from controlkit.controls.controlnet import ControlNet
from controlkit.controls.ctrlora import CtrLoRA
from controlkit.evaluation.sampling import EvalControl, generate_controlled
from controlkit.evaluation.sets import evaluation_set
from controlkit.formats.load import find_control, load_control, shipped_controls
from controlkit.images import to_tensor
from controlkit.nano.icons import background_colour
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample
from refusals import refused

PROMPT = "red apple, noto style, on a blue background"


@pytest.fixture(scope="module")
def nano():
    return load_base()


@pytest.fixture(scope="module")
def canny(nano):
    return load_control("canny", nano)


@pytest.fixture(scope="module")
def edges():
    from controlkit.conditions import find

    return to_tensor([find("canny")(evaluation_set("held-out").examples[0].image)])


def test_diffusers_draws_with_nano_and_no_code_of_ours(nano):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(nano_folder())
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        PROMPT,
        num_inference_steps=10,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]
    (ours,) = sample(nano, prompt=PROMPT, seeds=[3], steps=10, guidance=4.0)
    assert np.abs(made - ours[0].permute(1, 2, 0).numpy()).max() < 1e-3
    assert background_colour((made * 255).astype(np.uint8)) == "blue"


def test_the_canny_control_draws_what_diffusers_draws_with_it(nano, canny, edges):
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

    assert isinstance(canny, ControlNet)
    pipeline = StableDiffusionControlNetPipeline(
        vae=nano.vae,
        text_encoder=nano.text_encoder,
        tokenizer=nano.tokenizer,
        unet=nano.unet,
        controlnet=canny.to_diffusers(),
        scheduler=DDIMScheduler.from_config(nano.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        PROMPT,
        image=edges,
        width=64,
        height=64,
        num_inference_steps=10,
        guidance_scale=4.0,
        controlnet_conditioning_scale=0.9,
        control_guidance_end=0.8,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images
    use = ActiveControl(canny, canny.encode(edges, nano), weight=0.9, end=0.8)
    (ours,) = sample(nano, prompt=PROMPT, seeds=[5], uses=[use], steps=10, guidance=4.0)
    assert (made - ours).abs().max() < 1e-3


def test_a_image_depends_on_its_seed_alone(nano, canny, edges):
    use = ActiveControl(canny, canny.encode(edges, nano))
    (together,) = sample(nano, prompt=PROMPT, seeds=[1, 2, 3], uses=[use], steps=8)
    for index, seed in enumerate([1, 2, 3]):
        (alone,) = sample(nano, prompt=PROMPT, seeds=[seed], uses=[use], steps=8)
        assert (alone[0] - together[index]).abs().max() < 1e-4


def test_a_fresh_controlnet_changes_nothing(nano, edges):
    control = ControlNet.for_base(nano).eval()
    use = ActiveControl(control, control.encode(edges, nano))
    (without,) = sample(nano, prompt=PROMPT, seeds=[1], steps=4)
    (with_it,) = sample(nano, prompt=PROMPT, seeds=[1], uses=[use], steps=4)
    assert torch.equal(without, with_it)


def test_the_canny_control_steers(nano, canny):
    """Twelve held-out images: the edges of the result follow those that were given."""
    condition = find("canny")
    drawings = evaluation_set("held-out").examples[:12]
    given = [condition(drawing.image) for drawing in drawings]
    prompts = [drawing.caption for drawing in drawings]
    without, steered = (
        generate_controlled(nano, uses, prompts, steps=8)
        for uses in ([], [EvalControl(control=canny, condition_images=given)])
    )
    truths = [drawing.image for drawing in drawings]
    baseline, score = (condition.mean_score(given, made, truths) for made in (without, steered))
    assert score > baseline + 0.2


def test_sizes_other_than_the_trained_one_are_drawn(nano):
    (wide,) = sample(nano, prompt=PROMPT, seeds=[0], steps=2, width=96, height=64)
    assert wide.shape == (1, 3, 64, 96)


def test_what_ships_is_small():
    files = [*nano_folder().rglob("*.safetensors"), *shipped_controls().values()]
    assert sum(Path(file).stat().st_size for file in files) <= 36e6


def test_the_adapters_that_ship_share_one_base_control(nano):
    shared: dict = {}
    names = [name for name in shipped_controls() if name.startswith("nano/") and name != "nano/base"]
    adapters = {name: load_control(name, nano, shared=shared) for name in names}
    assert len(names) >= 13
    assert all(isinstance(adapter, CtrLoRA) and adapter.condition for adapter in adapters.values())
    assert len({id(adapter.shared_network) for adapter in adapters.values()}) == len(shared) == 1


def test_names_of_controls_mean_adapters_where_no_control_is_called_so():
    assert find_control("palette") == shipped_controls()["nano/palette"]
    assert find_control("color-palette") == shipped_controls()["nano/palette"]
    assert find_control("canny") == shipped_controls()["canny"]
    assert find_control("nano/canny") == shipped_controls()["nano/canny"]


@pytest.mark.parametrize("name", ["nano/blur", "nano/palette", "nano/pixel"])
def test_an_adapter_that_ships_steers(nano, name):
    adapter = load_control(name, nano)
    condition = find(adapter.condition)
    drawings = evaluation_set("held-out").examples[:8]
    given = [condition(drawing.image) for drawing in drawings]
    prompts = [drawing.caption for drawing in drawings]
    settings = {"steps": 8, "guidance": 3.0}
    scores = []
    for uses in ([], [EvalControl(control=adapter, condition_images=given)]):
        made = generate_controlled(nano, uses, prompts, **settings)
        every = zip(given, made, drawings, strict=True)
        scores.append(np.mean([condition.score(one, result, drawing.image) for one, result, drawing in every]))
    better = scores[1] > scores[0] if condition.fidelity.higher_is_better else scores[1] < scores[0]
    assert better and abs(scores[1] - scores[0]) > 0.1 * scores[0]


def test_several_adapters_at_once_just_work(tmp_path, nano):
    from controlkit.apps.cli import main

    drawing = evaluation_set("held-out").examples[0].image
    Image.fromarray(drawing).save(tmp_path / "a.png")
    words = ["generate", "red apple", "--steps", "4", "--out", str(tmp_path / "out")]
    image = tmp_path / "a.png"
    assert main([*words, "--control", f"palette={image}", "--control", f"nano/scribble={image}@0.7:0-0.8"]) == 0
    assert (tmp_path / "out" / "seed0.png").is_file()


def test_damaged_weights_are_named_by_the_network_that_has_them(nano, edges):
    damaged = load_control("canny", nano)
    name, weight = next(iter(damaged.named_parameters()))
    weight.data.view(-1)[0] = torch.nan
    use = ActiveControl(damaged, damaged.encode(edges, nano))
    with refused("damaged-file", damaged.title, name):
        list(sample(nano, prompt=PROMPT, seeds=[0], steps=2, uses=[use]))
