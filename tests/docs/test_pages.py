"""The links, images and Python examples of the pages."""

from __future__ import annotations

import re
from importlib.resources import files

import numpy as np
import pytest
from page_commands import PAGES, ROOT, page_commands
from PIL import Image

from controlkit.apps.cli import main
from controlkit.conditions import find
from controlkit.images import read_image, resize_cover


def links() -> list[tuple[str, str]]:
    """Targets in this repository, with the document that names them."""
    found = []
    for document in PAGES:
        targets = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
        found += [(str(document.relative_to(ROOT)), target) for target in targets if "://" not in target]
    return found


def test_there_are_links_to_look_at():
    assert len(links()) > 20
    assert {"README.md", "docs/training.md"} <= {document for document, _ in links()}


def test_the_example_of_two_controls_follows_both(tmp_path, monkeypatch):
    (command,) = [words for _, words in page_commands(ROOT / "README.md") if words.count("--control") == 2]
    monkeypatch.chdir(ROOT)  # the example's paths are those of a clone
    drawing = str(files("controlkit") / "assets" / "demo" / "sailboat.png")
    words = [*command[1:], "--seeds", "2", "--steps", "6"]
    assert main([*words, "--out", str(tmp_path / "both")]) == 0
    assert main(["generate", words[1], *words[-4:], "--out", str(tmp_path / "none")]) == 0
    wanted = np.asarray(resize_cover(read_image(drawing), 64, 64))
    scores = {}
    for name in ("canny", "palette"):
        given = find(name)(wanted)
        for folder in ("both", "none"):
            made = [np.asarray(read_image(tmp_path / folder / f"seed{seed}.png")) for seed in (0, 1)]
            scores[name, folder] = np.mean([find(name).score(given, one) for one in made])
    assert scores["canny", "both"] > scores["canny", "none"] + 0.3
    assert scores["palette", "both"] < 0.5 * scores["palette", "none"]


def test_the_python_example_of_the_readme_runs(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert len(list((tmp_path / "images" / "python").glob("seed*.png"))) == 4


def test_the_examples_of_the_page_for_python_run_one_after_another(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 8
    drawing = Image.open(str(files("controlkit") / "assets" / "demo" / "sailboat.png")).convert("RGB")
    (tmp_path / "photos").mkdir()
    drawing.save(tmp_path / "photo.png")
    for number in range(12):
        drawing.rotate(30 * number).save(tmp_path / "photos" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("controlkit.data.engine.cores", lambda: 1)
    few = {"steps=20": "steps=2", '"steps": 500': '"steps": 1, "batch_size": 2', ".first(32)": ".first(2)"}
    for block in blocks:
        for many, fewer in few.items():
            block = block.replace(many, fewer)
        # These take minutes or the rendered icons; their parts are tested elsewhere.
        if "ck.train(" not in block and "ck.evaluate_base(" not in block:
            exec(compile(block, "python.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "images" / "seed1.png").is_file() and (tmp_path / "runs/mine/mine.safetensors").is_file()


def test_every_name_of_the_package_is_there_and_one_that_the_page_uses():
    import controlkit

    assert all(getattr(controlkit, name) is not None for name in controlkit.__all__)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\bck\.(\w+)", page)) == set(controlkit.__all__) - {"__version__"}


@pytest.mark.parametrize(("document", "target"), links())
def test_links_and_images_of_the_pages_exist(document, target):
    assert ((ROOT / document).parent / target).exists()


def heading_anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_anchors_of_links_are_headings():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                linked = (page.parent / target) if target else page
                assert anchor in heading_anchors(linked.read_text(encoding="utf-8")), (page.name, target, anchor)


def test_the_page_of_conditions_names_every_one_and_shows_the_example_as_it_is():
    from controlkit.conditions import registry

    page = (ROOT / "docs" / "conditions.md").read_text(encoding="utf-8")
    missing = [name for name in registry() if f"| `{name}` |" not in page]
    assert missing == []
    code = (ROOT / "examples" / "my_condition.py").read_text(encoding="utf-8").split('"""', 2)[2].strip()
    assert code in page
