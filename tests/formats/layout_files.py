"""What the tests of layouts share: small controls in files, and what they compute."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import T2IAdapter
from safetensors.torch import load_file
from torch import nn

from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.formats.load import save_control


def shaken(module: nn.Module, seed: int = 1, size: float = 0.3) -> nn.Module:
    """Every parameter moved by noise, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return module


def trained_pair(base, folder: Path, *, rank: int = 3, dtype=torch.float32) -> tuple[CtrLoRA, Path, Path]:
    """An adapter and its base control, as after training, and the files of both."""
    shared = shaken(BaseControlNet.for_base(base), size=0.05)
    shaken(shared.add_adapter("palette", rank, seed=2), 3, size=0.1)
    control = CtrLoRA(shared, "palette", "palette").eval().requires_grad_(False)
    shared_file = save_control(folder / "base.safetensors", shared, base, dtype=dtype)
    return (
        control,
        save_control(folder / "palette.safetensors", control, base, companion="base", dtype=dtype),
        shared_file,
    )


def t2i_adapter(kind: str) -> T2IAdapter:
    """A small T2I-Adapter of random weights."""
    torch.manual_seed(0)
    factor = 16 if kind == "full_adapter_xl" else 8
    channels = [8, 16, 24] if kind == "light_adapter" else [8, 16, 24, 24]
    return T2IAdapter(3, channels, 3 if kind == "light_adapter" else 2, factor, kind).eval()


def residuals(control, base) -> list[torch.Tensor]:
    """What a control adds for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    x_t, image = torch.randn(2, 4, 16, 16, generator=generator), torch.rand(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        hint = control.encode(image, base)
        made = control(x_t, torch.tensor([10, 900]), base.encode_text(["a", "b"]), hint)
    return list(made.tensors())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two states have the same names and the same bits."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file or of a folder with one file of them."""
    return load_file(path if path.is_file() else next(path.glob("*.safetensors")))
