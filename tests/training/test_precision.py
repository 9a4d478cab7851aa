"""The precision of training."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from controlkit.training.precision import attention_precision, uses_bf16
from controlkit.training.recipes import read_recipe

RECIPE = Path(__file__).parents[2] / "recipes/sd15/ctrlora-adapter.yaml"
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "has_amx", "expected"),
    [
        ("fp32", True, False),
        ("bf16", False, True),
        ("auto", False, False),
        ("auto", True, True),
    ],
)
def test_auto_is_bf16_on_a_processor_with_amx(precision, has_amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True} if has_amx else {})
    assert uses_bf16(read_recipe(RECIPE, [f"precision={precision}"]), CPU) is expected


def heads(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, length, 8, generator=generator).requires_grad_() for length in (16, 6, 6))


def attended(bf16: bool) -> tuple[torch.Tensor, ...]:
    """The output of attention in a bf16 step and its gradients, with or without `attention_precision`."""
    query, key, value = heads(seed=0)
    with attention_precision(CPU, bf16=bf16):
        with torch.autocast("cpu", torch.bfloat16):
            made = F.scaled_dot_product_attention(query.bfloat16(), key=key.bfloat16(), value=value.bfloat16())
        made.float().square().sum().backward()
    return made, query.grad, key.grad, value.grad  # type: ignore[return-value]


def test_attention_of_bf16_steps_on_a_cpu_is_computed_in_fp32():
    query, key, value = (one.detach().bfloat16().float() for one in heads(seed=0))
    expected = F.scaled_dot_product_attention(query, key, value)
    made, *gradients = attended(bf16=True)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, expected.bfloat16())
    for gradient, other in zip(gradients, attended(bf16=False)[1:], strict=True):
        assert torch.allclose(gradient, other, rtol=0.05, atol=0.05 * other.abs().max().item())


def test_attention_in_fp32_keeps_masks():
    query, key, value = heads(seed=1)
    mask = torch.tensor([True, True, True, False, False, False]).expand(16, 6)
    bias = torch.zeros(16, 6).masked_fill(~mask, -torch.inf)
    with attention_precision(CPU, bf16=True), torch.autocast("cpu", torch.bfloat16):
        by_mask = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        by_bias = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.bfloat16())
    few = F.scaled_dot_product_attention(query, key[:, :, :3], value[:, :, :3])
    assert torch.allclose(by_mask, few, atol=1e-6)
    assert torch.allclose(by_bias, few, atol=1e-6)


def test_attention_is_left_alone_in_fp32_with_checkpointing_and_on_other_devices():
    assert isinstance(attention_precision(CPU, bf16=False), nullcontext)
    assert isinstance(attention_precision(CPU, bf16=True, recomputed=True), nullcontext)
    assert isinstance(attention_precision(torch.device("cuda"), bf16=True), nullcontext)
