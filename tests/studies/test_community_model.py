"""The study of a fine-tuned base at toy size."""

from __future__ import annotations

import numpy as np

from controlkit.bases.load import load_base
from controlkit.formats.load import save_control
from controlkit.studies import community_model
from controlkit.studies.community_model import CommunityModel, run_community_model


def samples(*args, **more):
    raise AssertionError("a second run has nothing to sample")


def test_a_control_on_a_fine_tuned_base_directly_and_by_offset(
    tiny_base, tiny_control, base_folder, icons_file, tmp_path, monkeypatch
):
    save_control(tmp_path / "canny.safetensors", tiny_control, tiny_base)
    settings = CommunityModel(
        out=str(tmp_path / "study"),
        base=str(base_folder),
        control=str(tmp_path / "canny.safetensors"),
        icons=str(icons_file),
        steps=2,
        batch_size=2,
        learning_rate=0.01,
        images=2,
        sampling_steps=2,
    )
    made = run_community_model(settings)
    (report,) = made.reports
    assert report.settings["mode"] == "balanced" and "mode balanced" in report.notes[-1]
    first, _, moved = report.settings["controls"].values()
    assert first["fingerprint"] != moved["fingerprint"] and first["base"] != moved["base"]
    monkeypatch.setattr(community_model, "generate_controlled", samples)
    monkeypatch.setattr(community_model, "generate_uncontrolled", samples)
    assert run_community_model(settings).reports == made.reports
    assert [row[0] for row in report.rows] == [
        "the base, its control",
        "community model, control as it is",
        "community model, control by offset",
    ]
    assert all(isinstance(value, float) and np.isfinite(value) for row in report.rows for value in row[1:4])
    assert made.files["images"].is_file()
    tuned = load_base(tmp_path / "study" / "base" / "base")
    assert tuned.fingerprint != tiny_base.fingerprint
    # What is not trained is the same.
    mine, theirs = tuned.vae.state_dict(), tiny_base.vae.state_dict()
    assert all(np.allclose(mine[name], theirs[name], atol=1e-3) for name in mine)
