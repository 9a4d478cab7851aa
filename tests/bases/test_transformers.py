"""What holds of every base with a transformer: controls for UNets, controls that add tokens, readings of prompts."""

from __future__ import annotations

import pytest
import torch
from original_names import original_flux2, original_z_image
from safetensors.torch import save_file

import tiny
from controlkit.bases.load import load_base
from controlkit.bases.prompt_encoding import TextOptions
from controlkit.controls.control import Acts
from controlkit.formats.load import load_control, save_control
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample
from refusals import refused

OF_UNETS = list(tiny.unet_systems().values())


@pytest.fixture(
    scope="module",
    params=[
        tiny.build_tiny_sd3,
        tiny.build_tiny_flux,
        tiny.build_tiny_z_image,
        tiny.build_tiny_qwen_image,
        tiny.build_tiny_flux2,
        tiny.build_tiny_flux2_klein,
        tiny.build_tiny_sana,
    ],
)
def base(request):
    return request.param()


@pytest.mark.parametrize("kind", [kind for kind in OF_UNETS if kind.acts != Acts.TOKENS])
def test_controls_of_a_unet_are_refused_in_words(base, kind):
    with refused("incompatible", base.name):
        kind.for_base(base)


@pytest.mark.parametrize("kind", [kind for kind in OF_UNETS if kind.acts == Acts.TOKENS])
def test_controls_that_add_tokens_alone_act(base, kind, tmp_path):
    control = load_control(save_control(tmp_path / "tokens.safetensors", kind.for_base(base), base), base)
    assert control.incompatibility(base) is None
    use = ActiveControl(control, torch.rand(1, next(control.parameters()).shape[-1]))
    settings = {"prompt": "red apple", "seeds": (1,), "steps": 2, "guidance": 4.0, "width": 64, "height": 64}
    made, plain = (torch.cat(list(sample(base, uses=uses, **settings))) for uses in ([use], []))
    assert made.isfinite().all() and (made - plain).abs().max() > 1e-3


@pytest.mark.parametrize(("options", "said"), [({"syntax": "weighted"}, "weighted"), ({"clip_skip": 2}, "clip_skip")])
def test_other_readings_of_prompts_are_refused(base, options, said):
    if "clip_skip" in options and base.family_title == "Stable Diffusion 3":
        pytest.skip("has layers of CLIP to choose from")
    with refused("unsupported", base.name, base.family_title, said):
        base.encode_text(["red apple"], options=TextOptions(**options))


@pytest.mark.parametrize(
    ("build", "original"),
    [
        (tiny.build_tiny_z_image, original_z_image),
        (tiny.build_tiny_qwen_image, lambda transformer: transformer.state_dict()),
        (tiny.build_tiny_flux2, original_flux2),
        (tiny.build_tiny_flux2_klein, original_flux2),
    ],
)
@pytest.mark.parametrize(("scale", "mark"), [("scale_weight", "scaled_fp8"), ("weight_scale", None)])
def test_a_file_of_scaled_float8_is_multiplied_by_its_scales(build, original, scale, mark, tmp_path):
    """FLUX.1's widths are fixed in diffusers."""
    base, tensors = build(), {}
    for name, value in original(base.transformer).items():
        if name.endswith(".weight") and value.ndim == 2:
            factor = value.abs().max() / 448
            tensors[name] = (value / factor).to(torch.float8_e4m3fn)
            tensors[f"{name.removesuffix('weight')}{scale}"] = factor
        else:
            tensors[name] = value.contiguous()
    if mark is not None:
        tensors[mark] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "mine.safetensors")
    tiny.saved_pipeline(base, tmp_path / "mine")
    loaded = load_base(tmp_path / "mine.safetensors")
    for (name, own), made in zip(base.transformer.named_parameters(), loaded.transformer.parameters(), strict=True):
        assert (made - own).abs().max() <= 0.07 * own.abs().max(), name
    assert loaded.transformer.dtype == torch.float32
    assert load_base(tmp_path / "mine.safetensors", dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


def test_tokens_of_a_control_do_not_depend_on_prompts_beside_it(base):
    torch.manual_seed(3)
    short, long = "red apple", "red apple on a blue table, " * 4
    x_t, t, more = torch.randn(1, base.latent_channels, 8, 8), torch.tensor([500.0]), None
    made = []
    for prompts in ([short], [short, long]):
        (text,) = base.fitted(base.encode_text(prompts))
        more = torch.randn(1, 4, text.tokens.shape[2]) if more is None else more
        extended = text.extended(more.expand(len(text), -1, -1))
        rows = len(prompts)
        made.append(base.predict(x_t.expand(rows, -1, -1, -1), t.expand(rows), extended)[:1])
    assert torch.allclose(*made, atol=1e-5)
    assert not torch.allclose(made[0], base.predict(x_t, t, base.fitted(base.encode_text([short]))[0]), atol=1e-4)
