"""Control LoRAs of FLUX.1: parity with diffusers' pipeline, files of every maker, weights, training, errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file
from transformer_training import check_training

from controlkit.bases.load import load_base
from controlkit.controls.apply import predict_under
from controlkit.controls.flux_control_lora import FluxControlLora
from controlkit.formats.convert import convert
from controlkit.formats.describe import describe
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.sampling.generate import generate
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.request import GenerateRequest
from controlkit.sampling.sampler import sample
from controlkit.sampling.uses import ControlUse
from controlkit.training.memory import checkpoint_activations
from refusals import refused
from tiny import build_tiny_flux, parts_of, saved_pipeline

SEEDS = (3, 11)
SETTINGS = {"prompt": "red apple", "seeds": SEEDS, "steps": 4, "guidance": 4.0}


@pytest.fixture(scope="module")
def base():
    return build_tiny_flux()


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(base, tmp_path):
    return saved_pipeline(base, tmp_path / "flux")


def trained(base, seed=1, *, whole=False, condition=None):
    """A control as after training.

    Args:
        whole: with biases and norms of its own, as Black Forest Labs'.
    """
    torch.manual_seed(seed)
    control = FluxControlLora.for_base(base, condition, rank=4)
    if whole:
        layers = {path: (*sizes[:3], True) for path, sizes in control.layers.items()}
        modules = base.transformer.named_modules()
        norms = {path: 8 for path, _ in modules if path.rpartition(".")[2].startswith(("norm_q", "norm_added"))}
        control = FluxControlLora(layers, norms, condition)
    for name, parameter in control.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norms" in name else 0.0, std=0.2)
    return control.eval().requires_grad_(False)


@pytest.fixture
def theirs(monkeypatch):
    """Images of diffusers' pipeline, with the mode of the condition's latent in place of a sample."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())

    def make(tensors, image, weight=1.0):
        pipeline = FluxControlPipeline(**parts_of(build_tiny_flux()))
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights({name: value.clone() for name, value in tensors.items()}, adapter_name="control")
        pipeline.set_adapters("control", weight)
        return pipeline(
            [SETTINGS["prompt"]] * len(SEEDS),
            control_image=image * 2 - 1,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            num_inference_steps=SETTINGS["steps"],
            guidance_scale=SETTINGS["guidance"],
            output_type="pt",
            width=64,
            height=64,
        ).images

    return make


def ours(base, *uses, **changes):
    return torch.cat(list(sample(base, uses=list(uses), **{**SETTINGS, **changes})))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.6])
def test_images_are_those_of_diffusers(base, image, theirs, whole, weight):
    control = trained(base, whole=whole)
    expected = theirs(control.file_state(), image, weight)
    made = ours(base, ActiveControl(control, control.encode(image, base), weight=weight))
    assert (made - expected).abs().max() < 1e-4
    assert (made - ours(base)).abs().max() > 0.01


def test_it_acts_at_its_steps_alone_and_leaves_the_base_as_it_is(base, image):
    control = trained(base)
    hint, plain = control.encode(image, base), ours(base)
    first = ours(base, ActiveControl(control, hint, end=0.5))
    assert (first - plain).abs().max() > 0.01
    assert (first - ours(base, ActiveControl(control, hint))).abs().max() > 0.01
    assert torch.equal(ours(base, ActiveControl(control, hint, weight=0.0)), plain)
    assert torch.equal(ours(base), plain)


def test_two_of_them_add_up(base, image):
    """The sum of their layers' outputs, each on its own condition."""
    first, second = trained(base), trained(base, seed=2)
    uses = [ActiveControl(each, each.encode(image, base)) for each in (first, second)]
    both = ours(base, *uses)
    for use in uses:
        assert (both - ours(base, use)).abs().max() > 0.01
    halves = [ActiveControl(first, uses[0].hint, weight=0.5)] * 2
    assert (ours(base, *halves) - ours(base, uses[0])).abs().max() < 1e-4


def test_two_with_norms_of_their_own_are_refused(base, image):
    controls = [trained(base, seed, whole=True) for seed in (1, 2)]
    with refused("contradiction", "norm_q"):
        ours(base, *(ActiveControl(each, each.encode(image, base)) for each in controls))


def test_a_new_one_adds_nothing(base, image):
    control = FluxControlLora.for_base(base, rank=4).eval()
    assert torch.equal(ours(base, ActiveControl(control, control.encode(image, base))), ours(base))
    assert control.layers["x_embedder"] == (32, 4, 16, False) and len(control.layers) == 1 + 3 * 12 + 4 * 3
    with refused("out-of-range", "rank is 0"):
        FluxControlLora.for_base(base, rank=0)


def test_gradients_are_the_same_with_checkpointing(image):
    gradients = []
    for checkpointed in (False, True):
        base = build_tiny_flux()
        control = trained(base).requires_grad_(True).train()
        if checkpointed:
            base.transformer.train()
            checkpoint_activations(base, control)
        torch.manual_seed(1)
        x_t, text = torch.randn(1, 4, 8, 8), base.encode_text(["red apple"])
        made = predict_under(control, base, x_t, torch.tensor([300.0]), text, control.encode(image, base))
        made.square().sum().backward()
        gradients.append([parameter.grad for parameter in control.parameters()])
    assert all(torch.allclose(*pair, rtol=1e-3, atol=1e-5) for pair in zip(*gradients, strict=True))


# Files


def same(base, first, second, image):
    return torch.equal(*(ours(base, ActiveControl(one, one.encode(image, base))) for one in (first, second)))


@pytest.mark.parametrize("whole", [False, True])
def test_it_is_saved_and_loaded(base, image, whole, tmp_path):
    control = trained(base, whole=whole, condition="canny")
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    loaded = load_control(path, base)
    assert loaded.condition == "canny" and same(base, control, loaded, image)
    facts = describe(path)
    assert facts["layers"] == "49" and facts["rank"] == "4" and ("norms of its own" in facts) == whole


def test_a_file_of_controlkit_is_one_for_diffusers(base, image, theirs, tmp_path):
    control = trained(base)
    path = save_control(tmp_path / "mine.safetensors", control, base, dtype=torch.float32)
    expected = theirs(load_file(path), image)
    assert (ours(base, ActiveControl(control, control.encode(image, base))) - expected).abs().max() < 1e-4


def wide(rank=2, alpha=None, **others):
    """Tensors of a control LoRA of FLUX.1's own widths, of two layers, as diffusers' script writes them."""
    torch.manual_seed(0)
    layers = {"x_embedder": (128, 3072), "transformer_blocks.0.attn.to_q": (3072, 3072)}
    tensors = {}
    for path, (read, made) in layers.items():
        tensors[f"transformer.{path}.lora_A.weight"] = torch.randn(rank, read)
        tensors[f"transformer.{path}.lora_B.weight"] = torch.randn(made, rank)
    settings = {} if alpha is None else {"transformer.r": rank, "transformer.lora_alpha": alpha, **others}
    return tensors, {"lora_adapter_metadata": json.dumps(settings)}


def test_those_of_diffusers_script_are_read(tmp_path):
    tensors, _ = wide()
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors, path)
    control = load_control(path)
    assert isinstance(control, FluxControlLora) and control.layers["x_embedder"] == (128, 2, 3072, False)
    assert all(torch.equal(value, tensors[name]) for name, value in control.file_state().items())
    convert(path, tmp_path / "mine.safetensors", to="controlkit", condition="depth")
    assert load_control(tmp_path / "mine.safetensors").condition == "depth"


def test_alpha_of_peft_is_multiplied_in(tmp_path):
    tensors, metadata = wide(alpha=1)
    save_file(tensors, tmp_path / "mine.safetensors", metadata)
    name = "transformer.x_embedder.lora_B.weight"
    assert torch.allclose(load_control(tmp_path / "mine.safetensors").file_state()[name], tensors[name] / 2)
    tensors, metadata = wide(alpha=1, **{"transformer.alpha_pattern": {"x_embedder": 4}})
    save_file(tensors, tmp_path / "mine.safetensors", metadata)
    with refused("unsupported", "alphas for single layers"):
        load_control(tmp_path / "mine.safetensors")
    save_file(tensors, tmp_path / "mine.safetensors", {"lora_adapter_metadata": "{"})
    with refused("damaged-file", "lora_adapter_metadata"):
        load_control(tmp_path / "mine.safetensors")


def names_of_black_forest_labs():
    """Names and shapes of the released files, at rank 2."""
    double = {"mod.lin": (1, 6), "attn.qkv": (1, 3), "attn.proj": (1, 1), "mlp.0": (1, 4), "mlp.2": (4, 1)}
    single = {"modulation.lin": (1, 3), "linear1": (1, 7), "linear2": (5, 1)}
    layers = {
        "img_in": (128, 3072),
        "txt_in": (4096, 3072),
        "final_layer.linear": (3072, 64),
        "final_layer.adaLN_modulation.1": (3072, 6144),
    }
    for part, width in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        layers |= {f"{part}.in_layer": (width, 3072), f"{part}.out_layer": (3072, 3072)}
    for block in range(19):
        for stream in ("img", "txt"):
            for name, (read, made) in double.items():
                layers[f"double_blocks.{block}.{stream}_{name}"] = (3072 * read, 3072 * made)
    for block in range(38):
        for name, (read, made) in single.items():
            layers[f"single_blocks.{block}.{name}"] = (3072 * read, 3072 * made)
    shapes = {}
    for name, (read, made) in layers.items():
        shapes |= {
            f"{name}.lora_A.weight": (2, read),
            f"{name}.lora_B.weight": (made, 2),
            f"{name}.lora_B.bias": (made,),
        }
    for norm in ("query_norm", "key_norm"):
        for block in range(19):
            shapes |= {f"double_blocks.{block}.{each}_attn.norm.{norm}.scale": (128,) for each in ("img", "txt")}
        shapes |= {f"single_blocks.{block}.norm.{norm}.scale": (128,) for block in range(38)}
    return shapes


def test_those_of_black_forest_labs_are_read(tmp_path):
    tensors = {name: torch.zeros(shape) for name, shape in names_of_black_forest_labs().items()}
    tensors["img_in.lora_B.weight"] += 2
    last = "final_layer.adaLN_modulation.1"
    for half in ("A", "B"):
        tensors[f"{last}.lora_{half}.weight"] = torch.randn(tensors[f"{last}.lora_{half}.weight"].shape)
    path = tmp_path / "flux1-canny-dev-lora.safetensors"
    save_file(tensors, path)
    control = load_control(path)
    assert isinstance(control, FluxControlLora)
    assert control.layers["x_embedder"] == (128, 2, 3072, True) and control.layers["proj_out"] == (3072, 2, 64, True)
    assert len(control.norms) == 19 * 4 + 38 * 2
    read = control.file_state()
    assert read["transformer.x_embedder.lora_B.weight"].eq(2).all()
    # Black Forest Labs have shift and scale of the last norm the other way round.
    shift, scale = (tensors[f"{last}.lora_B.weight"] @ tensors[f"{last}.lora_A.weight"]).chunk(2)
    name = "transformer.norm_out.linear.lora"
    assert torch.allclose(read[f"{name}_B.weight"] @ read[f"{name}_A.weight"], torch.cat([scale, shift]), atol=1e-5)
    del tensors["double_blocks.7.img_mlp.2.lora_B.weight"]
    save_file(tensors, path)
    with refused("damaged-file", path, "double_blocks.7.img_mlp.2"):
        load_control(path)


def test_a_lora_that_reads_no_condition_is_none(tmp_path):
    tensors, _ = wide()
    tensors["transformer.x_embedder.lora_A.weight"] = torch.zeros(2, 64)
    save_file(tensors, tmp_path / "style.safetensors")
    with refused("wrong-kind", "LoRA"):
        load_control(tmp_path / "style.safetensors")


def test_a_damaged_file_is_refused(base, tmp_path):
    path = save_control(tmp_path / "mine.safetensors", trained(base), base)
    tensors = load_file(path)
    tensors.pop("transformer.transformer_blocks.0.attn.to_k.lora_B.weight")
    save_file(tensors, path, read_metadata(path))
    with refused("damaged-file", path, "to_k.lora_B.weight"):
        load_control(path, base)
    tensors, _ = wide()
    tensors.pop("transformer.x_embedder.lora_B.weight")
    save_file(tensors, tmp_path / "foreign.safetensors")
    with refused("damaged-file", tmp_path / "foreign.safetensors", "x_embedder.lora_B"):
        load_control(tmp_path / "foreign.safetensors")


# Errors


def test_it_says_which_base_it_needs(base, tiny_base, tmp_path):
    with refused("incompatible", "transformer of FLUX.1", "UNet2DConditionModel"):
        FluxControlLora.for_base(tiny_base)
    path = save_control(tmp_path / "mine.safetensors", trained(base), base)
    with refused("incompatible", path, "transformer of FLUX.1"):
        load_control(path, tiny_base)
    shallow = build_tiny_flux(num_layers=2)
    assert (
        trained(base).incompatibility(shallow) == "it has a layer transformer_blocks.2.attn.to_q, which the base lacks"
    )
    wider = build_tiny_flux(num_attention_heads=4)
    assert "its channels of" in trained(base).incompatibility(wider)


@pytest.mark.parametrize("size", [(60, 64), (64, 60)])
def test_an_image_of_another_size_is_refused(base, size):
    with refused("wrong-size", "60"):
        FluxControlLora.for_base(base).encode(torch.zeros(1, 3, *size), base)


# From the command line


def test_it_is_used_by_name_of_its_file(base, folder, tmp_path):
    path = save_control(tmp_path / "mine.safetensors", trained(base, condition="canny"), base, dtype=torch.float32)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "photo.png")
    made = []
    for weight in (1.0, 0.4):
        use = ControlUse(control=str(path), image=str(tmp_path / "photo.png"), weight=weight)
        result = generate(GenerateRequest(prompt="red apple", base=str(folder), controls=(use,), steps=2))
        made.append(result.images[0].image.tobytes())
    assert made[0] != made[1] and load_base(folder).fingerprint == base.fingerprint


def test_it_is_trained_resumed_and_used(folder, tmp_path):
    own = {"system": "flux-control-lora", "rank": "4", "gradient_checkpointing": "true"}
    check_training(folder, tmp_path, trains="lora_B", **own)
