"""Adapters together and alone, at toy size."""

from __future__ import annotations

import math

import pytest
import torch

from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.errors import UserError
from controlkit.formats.load import save_control
from controlkit.studies.several_conditions import SeveralConditions, run_several_conditions


@pytest.fixture
def adapters(tiny_base, tmp_path):
    """Files of two adapters that steer, on one base control."""
    shared = BaseControlNet.for_base(tiny_base)
    generator = torch.Generator().manual_seed(0)
    save_control(tmp_path / "base.safetensors", shared, tiny_base)
    files = []
    for name in ("palette", "canny"):
        adapter = shared.add_adapter(name, 2, seed=1)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        control = CtrLoRA(shared, name, name)
        files.append(save_control(tmp_path / f"{name}.safetensors", control, tiny_base, companion="base"))
    return [str(path) for path in files]


def test_a_mix_is_judged_by_each_of_its_conditions_and_timed(adapters, base_folder, tmp_path):
    settings = SeveralConditions(
        out=str(tmp_path / "study"),
        base=str(base_folder),
        mixes=("+".join(adapters),),
        pictures=3,
        sampling_steps=2,
        timed=(1, 3),
    )
    made = run_several_conditions(settings)
    fidelity, speed = made.reports
    assert [row[1] for row in fidelity.rows] == adapters
    assert all(isinstance(value, float) and math.isfinite(value) for row in fidelity.rows for value in row[2:])
    assert [row[0] for row in speed.rows] == ["1", "3"]
    assert all(float(str(row[-1])) < 1e-4 for row in speed.rows)
    assert made.files["pictures"].is_file()


def test_a_mode_that_there_is_not_is_no_setting():
    with pytest.raises(UserError, match="did you mean balanced"):
        SeveralConditions(mode="balance")


def test_one_adapter_is_no_mix(adapters):
    with pytest.raises(UserError, match="join two or more"):
        SeveralConditions(mixes=(adapters[0],))
