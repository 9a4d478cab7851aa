"""The study of fine-tuned bases at toy size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from controlkit.bases.load import load_base
from controlkit.controls.ctrlora import BaseControlNet, CtrLoRA
from controlkit.controls.t2i_adapter import T2IAdapterControl
from controlkit.formats.load import save_control
from controlkit.studies import community_model
from controlkit.studies.community_model import KEPT, REPLACED, WAYS, CommunityModel, run_community_model
from refusals import refused


def samples(*args, **more):
    raise AssertionError("a second run has nothing to sample")


@pytest.fixture
def settings(tiny_base, tiny_control, base_folder, icons_file, tmp_path):
    """A ControlNet, and an adapter with its base control beside it."""
    shared = BaseControlNet.for_base(tiny_base)
    shared.add_adapter("palette", 2, seed=0)
    with torch.no_grad():
        for parameter in shared.adapters["palette"].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    save_control(tmp_path / "base.safetensors", shared, tiny_base)
    save_control(tmp_path / "palette.safetensors", CtrLoRA(shared, "palette", "palette"), tiny_base, companion="base")
    save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base)
    return {
        "out": str(tmp_path / "study"),
        "base": str(base_folder),
        "controls": tuple(str(tmp_path / f"{name}.safetensors") for name in ("canny", "palette")),
        "icons": str(icons_file),
        "styles": ("twemoji", "noto"),
        "steps": 2,
        "text_steps": 1,
        "batch_size": 2,
        "learning_rate": 1e-3,
        "images": 2,
        "sampling_steps": 2,
    }


def test_controls_on_fine_tuned_bases_directly_and_by_offset(settings, tiny_base, tmp_path, monkeypatch):
    made = run_community_model(CommunityModel(**settings))
    canny, palette, summary, encoders = made.reports
    assert canny.settings["mode"] == "balanced" and "mode balanced" in canny.notes[-1]
    for report in (canny, palette):
        assert [row[0] for row in report.rows] == [
            f"{style}: {how}"
            for style in settings["styles"]
            for how in (
                "the base, its control",
                "community model, control as it is",
                "community model, control by offset",
            )
        ]
        assert all(isinstance(value, float) and np.isfinite(value) for row in report.rows for value in row[1:4])
        assert report.facts["distance"] == max(report.facts["distances"].values()) > 0
        # Of a control: unchanged weights on another base, other weights by offset, for each style.
        used = list(report.settings["controls"].values())
        prints = [each["fingerprint"] for each in used]
        assert prints[0] == prints[1] == prints[3] == prints[4] and len({prints[0], prints[2], prints[5]}) == 3
        assert len({each["base"]["content"] for each in used}) == 3
    assert len({each.get("companion") for each in palette.settings["controls"].values()}) == 3
    assert [row[0] for row in summary.rows] == list(settings["controls"]) and len(summary.rows[0]) == 4
    words = [row[0].partition(": ")[2] for row in encoders.rows]
    assert words == 2 * ["the base", *(f"{what}, {way}" for what in (KEPT, REPLACED) for way in WAYS)]
    assert all(0 <= row[-1] <= 1 for row in encoders.rows)
    assert made.files["images"].is_file()

    monkeypatch.setattr(community_model, "generate_controlled", samples)
    monkeypatch.setattr(community_model, "generate_uncontrolled", samples)
    # Some gap may be NaN, which equals nothing: the tiny base's autoencoder has random weights.
    assert repr(run_community_model(CommunityModel(**settings)).reports) == repr(made.reports)

    with refused("resume-mismatch", tmp_path / "study" / "bases", "learning_rate", 0.001, 0.002):
        run_community_model(CommunityModel(**{**settings, "learning_rate": 2e-3}))

    tuned = load_base(tmp_path / "study" / "bases" / "twemoji" / "base")
    assert tuned.fingerprint != tiny_base.fingerprint
    # What is not trained is the same.
    mine, theirs = tuned.vae.state_dict(), tiny_base.vae.state_dict()
    assert all(np.allclose(mine[name], theirs[name], atol=1e-3) for name in mine)

    # The replaced text encoder is another one than that of the base, which fine-tuning moves little.
    own, kept, replaced = (
        base.encode_text(["red apple", "sailboat"]).tokens
        for base in (
            tiny_base,
            load_base(tmp_path / "study/bases/text-encoder-kept/base"),
            load_base(tmp_path / "study/bases/text-encoder-replaced/base"),
        )
    )
    assert (kept - own).pow(2).mean() < 0.1 * (replaced - own).pow(2).mean()


def test_it_leaves_out_the_text_encoder_and_refuses_what_it_cannot_compare(settings, tiny_base, tmp_path, monkeypatch):
    settings = {**settings, "styles": ("noto",), "controls": settings["controls"][1:], "text_steps": None}
    monkeypatch.chdir(tmp_path)
    made = run_community_model(CommunityModel(**settings))
    assert run_community_model(CommunityModel(**{**settings, "out": "study"})).reports[0].rows == made.reports[0].rows
    assert len(made.reports) == 2 and not (tmp_path / "study/bases/text-encoder-kept").exists()
    adapter = save_control(tmp_path / "t.safetensors", T2IAdapterControl.for_base(tiny_base, "canny"), tiny_base)
    with refused("wrong-kind", adapter, "t2i-adapter"):
        run_community_model(CommunityModel(**{**settings, "controls": (str(adapter),)}))
    with refused("out-of-range", "images is 100000", "noto"):
        run_community_model(CommunityModel(**{**settings, "images": 100_000, "out": str(tmp_path / "more")}))
    assert not (tmp_path / "more").exists()
    with refused("unknown-name", "openmoji", "twemoji"):
        CommunityModel(styles=("openmoji",))
    for name in ("styles", "controls"):
        with refused("missing-setting", name):
            CommunityModel(**{name: ()})
    with refused("contradiction", "styles", "noto"):
        CommunityModel(styles=("noto", "twemoji", "noto"))
    with refused("contradiction", "controls", "canny"):
        CommunityModel(controls=("canny", "canny"))
    with refused("out-of-range", "text_steps", 0):
        CommunityModel(text_steps=0)
