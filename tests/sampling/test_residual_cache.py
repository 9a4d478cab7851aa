"""Residuals kept between calls, and several adapters in one pass: other work, the same images."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from controlkit.bases.residuals import Residuals
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.images import to_tensor
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.residual_cache import ResidualCache, digest, identity_of
from controlkit.sampling.sampler import sample


class Counted:
    """Counts the passes of a network."""

    def __init__(self, network: nn.Module) -> None:
        self.rows: list[int] = []
        self._handle = network.register_forward_pre_hook(lambda _module, args: self.rows.append(len(args[0])))

    def take(self) -> list[int]:
        rows, self.rows = self.rows, []
        return rows


@pytest.fixture
def controls(tiny_base):
    """Two adapters of one base control, steering strongly."""
    torch.manual_seed(0)
    shared = BaseControlNet.for_base(tiny_base)
    for seed, name in enumerate(("palette", "lineart")):
        adapter = shared.add_adapter(name, rank=2 + seed, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    shared.eval().requires_grad_(False)
    return [CtrLoRA(shared, "palette", "palette"), CtrLoRA(shared, "lineart", "lineart")]


@pytest.fixture
def uses(controls, tiny_base, condition_image):
    images = [to_tensor([condition_image]), 1 - to_tensor([condition_image])]
    return [
        ActiveControl(control, control.encode(image, tiny_base), weight)
        for control, image, weight in zip(controls, images, (0.8, 1.0), strict=True)
    ]


def draw(base, uses, seeds=(0, 1), cache=None, prompt="red apple"):
    return torch.cat(list(sample(base, prompt=prompt, seeds=seeds, uses=uses, steps=5, cache=cache)))


def test_adapters_of_one_base_control_run_in_one_pass_and_draw_what_they_draw_apart(tiny_base, uses, monkeypatch):
    counted = Counted(uses[0].control.base_control.network)
    together = draw(tiny_base, uses)
    passes = counted.take()
    assert passes == [2 * 2 * 5]  # both adapters, both halves of guidance, all steps
    monkeypatch.setattr(CtrLoRA, "shared_network", property(lambda self: None))
    apart = draw(tiny_base, uses)
    assert len(counted.take()) == 2
    assert not torch.equal(together, draw(tiny_base, []))
    assert (together - apart).abs().max() < 1e-4


def test_a_second_batch_under_the_same_condition_runs_no_control(tiny_base, uses):
    counted = Counted(uses[0].control.base_control.network)
    cache = ResidualCache(64)
    first = draw(tiny_base, uses, cache=cache)
    assert counted.take()
    again = draw(tiny_base, uses, cache=cache)
    other_seeds = draw(tiny_base, uses, seeds=(2, 3), cache=cache)
    assert counted.take() == []
    assert torch.equal(first, again)
    assert (other_seeds - draw(tiny_base, uses, seeds=(2, 3))).abs().max() < 1e-5


def test_another_prompt_condition_or_weight_in_place_is_not_mistaken_for_the_same(tiny_base, uses, condition_image):
    cache = ResidualCache(64)
    counted = Counted(uses[0].control.base_control.network)
    draw(tiny_base, uses[:1], cache=cache)
    counted.take()
    draw(tiny_base, uses[:1], cache=cache, prompt="sailboat")
    assert counted.take()
    other = ActiveControl(uses[0].control, uses[0].hint * 0.5)
    draw(tiny_base, [other], cache=cache)
    assert counted.take()
    with torch.no_grad():
        next(uses[0].control.base_control.parameters()).add_(0.1)
    changed = draw(tiny_base, uses[:1], cache=cache)
    assert counted.take()
    assert torch.equal(changed, draw(tiny_base, uses[:1]))


def test_the_strength_of_a_control_can_change_without_running_it_again(tiny_base, uses):
    cache = ResidualCache(64)
    draw(tiny_base, uses[:1], cache=cache)
    counted = Counted(uses[0].control.base_control.network)
    weaker = [ActiveControl(uses[0].control, uses[0].hint, 0.3)]
    drawn = draw(tiny_base, weaker, cache=cache)
    assert counted.take() == []
    assert (drawn - draw(tiny_base, weaker)).abs().max() < 1e-5


def test_the_cache_stays_within_its_bound_and_drops_what_was_used_least_recently(controls):
    cache = ResidualCache(3 * 4 * 1000 / 2**20)
    residuals = [Residuals({"skip.0": torch.zeros(1, 1000) + i}) for i in range(4)]
    for i in range(3):
        cache.put(i, controls[0], residuals[i])
    assert cache.get(0) is not None
    cache.put(3, controls[0], residuals[3])
    assert len(cache) == 3
    assert cache.bytes <= cache.limit
    assert cache.get(1) is None
    assert cache.get(0) is not None
    cache.put("too large", controls[0], Residuals({"skip.0": torch.zeros(1, 100_000)}))
    assert cache.get("too large") is None
    cache.clear()
    assert len(cache) == 0 == cache.bytes


def test_a_control_loaded_in_inference_mode_has_a_key(tiny_base, uses):
    with torch.inference_mode():
        control = copy.deepcopy(uses[0].control)
    assert identity_of(control) == identity_of(control) != identity_of(uses[0].control)


def test_an_adapter_in_the_place_of_another_is_another(tiny_base, uses):
    cache, shared = ResidualCache(), uses[0].control.base_control
    draw(tiny_base, uses[:1], cache=cache)
    state = {name: value + 0.2 for name, value in shared.adapter_state_dict("palette").items()}
    shared.remove_adapter("palette")
    shared.load_adapter("palette", state)
    assert torch.equal(draw(tiny_base, uses[:1], cache=cache), draw(tiny_base, uses[:1]))


def test_a_base_control_that_another_adapter_is_selected_on_is_another(tiny_base, uses):
    cache, shared = ResidualCache(), uses[0].control.base_control
    use = ActiveControl(shared, uses[0].hint)
    drawn = []
    for selected in ("palette", "lineart", None):
        shared.select(selected)
        drawn.append(draw(tiny_base, [use], cache=cache))
        assert torch.equal(drawn[-1], draw(tiny_base, [use]))
    assert not torch.equal(drawn[0], drawn[1])


def test_hints_of_other_shapes_have_other_keys():
    assert digest(torch.zeros(1, 3, 64, 128)) != digest(torch.zeros(1, 3, 128, 64))
    assert digest(torch.zeros(4, dtype=torch.int32)) != digest(torch.zeros(4))


def test_two_adapters_in_one_pass_run_under_autocast(tiny_base, uses):
    control, text = uses[0].control.base_control, tiny_base.encode_text(["red apple"])
    hint = torch.cat([use.hint for use in uses])
    apart = control(None, torch.tensor([500]), text, hint, adapters=("palette", "lineart"))
    with torch.autocast("cpu", torch.bfloat16):
        made = control(None, torch.tensor([500]), text, hint, adapters=("palette", "lineart"))
    for mine, theirs in zip(made.tensors(), apart.tensors(), strict=True):
        assert (mine.float() - theirs).norm() < 0.1 * theirs.norm()
