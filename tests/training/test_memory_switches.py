"""Switches that save memory leave gradients as they are, or say what they change."""

from __future__ import annotations

import copy
import dataclasses
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from toy_training import Toy, toy_recipe

import tiny
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.bases.prompt_encoding import TextOptions
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.controls.registry import find
from controlkit.data.pairs import write_pairs
from controlkit.formats.load import load_control, save_control
from controlkit.formats.metadata import read_metadata
from controlkit.training.control_objective import ControlObjective
from controlkit.training.memory import CPUOffload
from controlkit.training.recipes import recipes
from controlkit.training.run_folder import fingerprint
from controlkit.training.trainer import train
from refusals import refused

CPU = torch.device("cpu")
NOTHING = torch.nn.Identity()


def drawing(number: int) -> tuple[np.ndarray, np.ndarray, str]:
    rng = np.random.default_rng(number)
    image = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize((64, 64)))
    return 255 - image, image, f"thing {number % 4}"


@pytest.fixture
def settings(tmp_path, base_folder):
    write_pairs(tmp_path / "pairs", [drawing(number) for number in range(6)])
    return {
        "out": str(tmp_path / "run"),
        "pairs": str(tmp_path / "pairs"),
        "base": str(base_folder),
        "batch_size": 2,
        "device": "cpu",
        "score_pictures": 1,
        "steps": 2,
        "learning_rate": 0.01,
    }


@pytest.fixture
def base_control(tmp_path, tiny_base):
    """One whose residuals are not zero."""
    control = BaseControlNet.for_base(tiny_base)
    tiny_weights(control.network.controlnet_down_blocks)
    tiny_weights(control.network.controlnet_mid_block)
    path = tmp_path / "base.safetensors"
    save_control(path, control, tiny_base, dtype=torch.float32)
    return str(path)


def tiny_weights(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adapter_recipe(settings, base_control, **changes):
    return recipes()["ctrlora-adapter"](**{**settings, "control": base_control, "rank": 2, **changes})


def objective_of(system, settings, base_control, icons_file, **changes):
    if system == "adapter":
        objective = ControlObjective(adapter_recipe(settings, base_control, **changes), CPU)
        for name, parameter in objective.trained.named_parameters():
            if "lora_layer.up" in name:  # zero at first, which hides the other half
                tiny_weights(torch.nn.ParameterList([parameter]))
        return objective
    if system == "full":
        return ControlObjective(recipes()["ctrlora-full"](**settings, control=base_control, **changes), CPU)
    if system == "controlnet":
        objective = ControlObjective(recipes()["controlnet-pairs"](**settings, **changes), CPU)
        tiny.randomise_zero_convolutions(objective.control)
        return objective
    kept = {key: value for key, value in settings.items() if key != "pairs"}
    recipe = recipes()["ctrlora-base"](
        **kept, icons=str(icons_file), conditions=("canny", "palette"), rank=2, variants=1, **changes
    )
    objective = ControlObjective(recipe, CPU)
    for module in objective.trained.modules():
        if isinstance(module, torch.nn.Module) and hasattr(module, "up") and isinstance(module.up, torch.nn.Linear):
            tiny_weights(module.up)
    tiny_weights(objective.control.network.controlnet_down_blocks)
    return objective


def gradients(objective, step: int = 0, bf16: bool = False):
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = objective.loss(step)
    loss.backward()
    named = objective.trained.named_parameters()
    return loss.item(), {name: value.grad for name, value in named if value.grad is not None}


@pytest.mark.parametrize("system", ["adapter", "full", "controlnet", "base"])
def test_gradients_are_the_same_with_checkpointing(system, settings, base_control, icons_file):
    made = []
    for on in (False, True):
        objective = objective_of(system, settings, base_control, icons_file, gradient_checkpointing=on)
        networks = (
            objective.base.unet,
            *objective.trained.modules(),
            *getattr(objective, "control", NOTHING).modules(),
        )
        assert any(getattr(module, "is_gradient_checkpointing", False) for module in networks) == on
        made.append(gradients(objective))
    (loss, plain), (again, checkpointed) = made
    assert loss == pytest.approx(again, rel=1e-6)
    assert plain.keys() == checkpointed.keys()
    assert sum(value.abs().sum().item() for value in plain.values()) > 0
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("system", ["adapter", "full", "controlnet", "base"])
def test_bf16_stores_what_is_frozen_in_bf16_and_trains_in_float32(system, settings, base_control, icons_file):
    plain = objective_of(system, settings, base_control, icons_file)
    small = objective_of(system, settings, base_control, icons_file, precision="bf16")
    assert all(p.dtype == torch.bfloat16 for network in small.base.networks for p in network.parameters())
    assert all(p.dtype == torch.float32 for p in small.parameters())
    frozen = [p for p in small.control.parameters() if not p.requires_grad]
    assert all(p.dtype == torch.bfloat16 for p in frozen) and bool(frozen) == (system == "adapter")
    loss, gradient = gradients(plain)
    rounded, near = gradients(small, bf16=True)
    assert rounded == pytest.approx(loss, rel=0.03)
    whole, other = (torch.cat([g[name].flatten() for name in gradient]) for g in (gradient, near))
    assert torch.cosine_similarity(whole, other, dim=0) > 0.98


def test_the_denoiser_comes_to_the_device_once_it_is_bf16_and_what_is_cached_has_left(
    settings, base_control, monkeypatch
):
    events = []
    load, move = Base.to, CPUOffload._move

    def loaded(base, *args, denoiser_aside=False, **options):
        events.append(f"loaded, the denoiser aside: {denoiser_aside}")
        return load(base, *args, denoiser_aside=denoiser_aside, **options)

    def moved(offload, device):
        events.append("encoders moved away")
        move(offload, device)

    monkeypatch.setattr(Base, "to", loaded)
    monkeypatch.setattr(CPUOffload, "_move", moved)
    monkeypatch.setattr(Base, "place_denoiser", lambda base: events.append(f"placed as {base.dtype}"))
    ControlObjective(adapter_recipe(settings, base_control, precision="bf16"), CPU)
    assert events == ["loaded, the denoiser aside: True", "encoders moved away", "placed as torch.bfloat16"]


ALONE = {
    name: kind
    for name, kind in {**tiny.unet_systems(), **{name: find(name) for name in tiny.OF_TRANSFORMERS}}.items()
    # The pre-computed ControlNet reads the empty prompt, which meta tensors do not have.
    if kind.companion is None and name != "controlnet-precomputed"
}


def options_of(kind):
    """No options, and each switch of the system turned over."""
    fields = () if kind.Options is None else dataclasses.fields(kind.Options)
    switches = [{field.name: not field.default} for field in fields if isinstance(field.default, bool)]
    return [{}, *(each for each in switches if "light" not in each)]  # no light T2I-Adapter fits nano


@pytest.mark.parametrize(("system", "options"), [(name, each) for name in ALONE for each in options_of(ALONE[name])])
def test_a_new_control_is_on_the_device_of_a_base_whose_denoiser_is_aside(system, options):
    known = tiny.OF_TRANSFORMERS.get(system)
    base = load_base("nano") if known is None else tiny.tiny_of_known(known)
    base.to("meta", denoiser_aside=True)
    assert base.denoiser.device == CPU
    control = ALONE[system].for_base(base, **options)
    assert {tensor.device.type for tensor in (*control.parameters(), *control.buffers())} == {"meta"}


def test_a_placed_denoiser_is_on_the_device_of_the_other_networks(tiny_base):
    base = copy.deepcopy(tiny_base).to("meta", denoiser_aside=True)
    assert base.device.type == base.vae.device.type == "meta"
    base.place_denoiser()
    assert base.device.type == base.denoiser.device.type == "meta"


def test_an_adapter_trained_over_bf16_fits_the_base_control_it_came_from(settings, base_control):
    recipe = adapter_recipe(settings, base_control, precision="bf16", gradient_checkpointing=True)
    (path,) = train(ControlObjective(recipe, CPU), recipe).files
    told = read_metadata(path)
    assert told["control.base_control_fingerprint"] == read_metadata(base_control)["control.fingerprint"]
    base = load_base(recipe.base)
    shared = load_control(base_control, base)
    assert isinstance(shared, BaseControlNet)
    assert isinstance(load_control(path, base, shared={shared.fingerprint(): shared}), CtrLoRA)
    assert told["control.base_fingerprint"] == base.fingerprint


def test_what_is_cached_waits_on_the_cpu_and_the_autoencoder_comes_back_for_previews(tiny_base, monkeypatch):
    base, moves, cuda = copy.deepcopy(tiny_base), [], torch.device("cuda")
    for name in ("vae", "text_encoder", "unet"):
        monkeypatch.setattr(getattr(base, name), "to", lambda device, name=name: moves.append((name, device)))
    offload = CPUOffload(base, lambda prompts: None)
    assert moves == [("text_encoder", CPU), ("vae", CPU)]
    offload.device = cuda
    with offload.suspended():
        assert moves[2:] == [("vae", cuda)]
    assert moves[3:] == [("vae", CPU)]


def test_previews_need_no_text_encoder(settings, base_control, tmp_path, monkeypatch):
    """The embeddings of their prompts are cached."""
    objective = ControlObjective(adapter_recipe(settings, base_control), CPU)
    monkeypatch.setattr(type(objective.base), "encode_text", None)
    objective.preview(1, tmp_path)
    assert list(tmp_path.glob("0000001.png"))


def test_other_prompts_are_encoded_where_the_text_encoder_is(tiny_base):
    red = tiny_base.encode_text(["red"])
    offload = CPUOffload(tiny_base, lambda prompts: red if list(prompts) == ["red"] else None)
    both = tiny_base.encode_text(["red", "blue"]).tokens
    assert torch.equal(offload.encode_text(["red", "blue"]).tokens, both)
    assert torch.equal(offload.encode_text(["red"]).tokens, red.tokens)
    other = CPUOffload(tiny_base, lambda prompts: tiny_base.encode_text(["blue"]))
    assert torch.equal(other.encode_text(["red"], None, TextOptions(negative=True)).tokens, red.tokens)


def test_the_switches_are_not_what_tells_runs_apart_where_they_change_nothing(tmp_path):
    recipe = toy_recipe(tmp_path)
    assert fingerprint(recipe) == fingerprint(dataclasses.replace(recipe, optimizer="adamw"))
    assert fingerprint(recipe) != fingerprint(dataclasses.replace(recipe, optimizer="adamw8bit"))
    pairs = {"out": "a", "pairs": "b", "control": "c"}
    on, off = recipes()["ctrlora-adapter"](**pairs, gradient_checkpointing=True), recipes()["ctrlora-adapter"](**pairs)
    assert fingerprint(on) == fingerprint(off)


def test_the_8_bit_optimiser_is_never_replaced_silently(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    recipe = toy_recipe(tmp_path, optimizer="adamw8bit")
    with refused("missing-package", "bitsandbytes", "controlkit[lowmem]", "optimizer=adamw"):
        train(Toy(recipe), recipe)
    with refused("unknown-name", "'sgd'", "adamw or adamw8bit"):
        toy_recipe(tmp_path, optimizer="sgd")


def test_8_bit_training_goes_on_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes")
    changes = {"optimizer": "adamw8bit", "width": 2048}  # small tensors stay in 32 bits
    whole = Toy(toy_recipe(tmp_path / "whole", **changes))
    train(whole, whole.recipe)
    broken = Toy(toy_recipe(tmp_path / "broken", **changes), at={4: _power_cut})
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, broken.recipe)
    going_on = Toy(toy_recipe(tmp_path / "broken", **changes))
    train(going_on, going_on.recipe)
    assert going_on.steps_seen == [3, 4, 5]
    for name, value in whole.weights().items():
        assert torch.equal(going_on.weights()[name], value), name


def _power_cut(_loss: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("power cut")
