"""Write the 200 captioned images of nano's `seen` evaluation set to a folder, to stand in for your own images.

    python examples/captioned_images.py photos

The folder has the layout that `controlkit pairs` reads: `NAME.png` and its caption in `NAME.txt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

import controlkit as ck


def main(folder: Path) -> None:
    """Write 64 x 64 PNG files and their captions to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, drawing in enumerate(ck.evaluation_set("seen").examples):
        path = folder / f"{number:03d}.png"
        Image.fromarray(drawing.image).save(path)
        path.with_suffix(".txt").write_text(drawing.caption, encoding="utf-8")
    print(f"{number + 1} captioned images: {folder}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/captioned_images.py FOLDER")
    main(Path(sys.argv[1]))
