"""The package that people install: a source distribution and a wheel hold all that runs, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_BUILD = "from setuptools import build_meta as b; b.build_sdist(r'{out}'); b.build_wheel(r'{out}')"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both."""
    pytest.importorskip("setuptools", minversion="77")
    where = tmp_path_factory.mktemp("package")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "benchmarks/")):
            (where / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, where / "tree" / name)
    command = [sys.executable, "-c", _BUILD.format(out=where)]
    subprocess.run(command, cwd=where / "tree", check=True, capture_output=True)
    return where


@pytest.mark.slow
def test_both_hold_every_module_and_every_file_of_nano(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("controlkit/")}
        licences = [name for name in archive.namelist() if name.endswith(("/LICENSE", "/NOTICE"))]
    source = built / "tree" / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / "controlkit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted and len(licences) == 2
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in wanted} <= names and {"LICENSE", "NOTICE", "README.md"} <= names
    assert wheel.stat().st_size < 40e6


@pytest.mark.slow
def test_the_wheel_runs_the_demo_in_an_environment_of_its_own(built, tmp_path):
    """With the dependencies of this one: only controlkit itself is the wheel's."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    packages = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    python = tmp_path / "env" / "bin" / "python"
    (tmp_path / "empty").mkdir()
    where = subprocess.run(
        [python, "-c", "import controlkit; print(controlkit.__file__)"], capture_output=True, text=True
    )
    assert str(packages) in where.stdout, where
    subprocess.run([python, "-m", "controlkit", "demo"], cwd=tmp_path / "empty", check=True, capture_output=True)
    assert (tmp_path / "empty" / "controlkit-out" / "demo" / "sheet.png").is_file()
