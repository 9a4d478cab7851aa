"""Parts of the page that need no browser."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from refusals import check, refused


def test_the_page_says_which_package_is_missing():
    code = """
import sys
sys.modules["gradio"] = None
import controlkit.apps.cli
sys.exit(controlkit.apps.cli.main(["ui", "--port", "0"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    check(done.stderr, "missing-package", "controlkit[ui]")


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "ä", "a" * 61])
def test_names_are_no_paths(name):
    from controlkit.ui.files import checked_name

    with refused("out-of-range"):
        checked_name(name)


@pytest.mark.parametrize("entry", ["../out.png", "/etc/x.png", "a/../../x.png", "..\\x.png"])
def test_a_zip_stays_in_its_folder(tmp_path, entry):
    from controlkit.ui.runs import Workplace

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("fine.png", b"x")
        file.writestr(entry, b"x")
    place = Workplace(tmp_path / "work")
    with refused("bad-data"):
        place.add_zip("mine", tmp_path / "a.zip")
    assert place.pairs() == [] and not (tmp_path / "out.png").exists()
    (tmp_path / "b.zip").write_bytes(b"no zip")
    with refused("unreadable-file"):
        place.add_zip("mine", tmp_path / "b.zip")
