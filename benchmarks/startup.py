"""How long it takes until something is there: help, a look at a system, the first image.

    python benchmarks/startup.py

Each in a fresh process, in turns: importing torch alone and torch with what diffusers needs for one UNet, which is the
floor for everything that runs a network; `controlkit --help`; `controlkit inspect ctrlora --base sd15 --rank 128`;
and the first image, `controlkit generate` on nano with a control that ships. The floor's time is part of the others'.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import numpy as np
from PIL import Image

NETWORKS = "from diffusers import AutoencoderKL, UNet2DConditionModel; from transformers import CLIPTextModel"


def commands(image: Path, out: Path) -> dict[str, list[str]]:
    """Name -> what is run."""
    verb = [sys.executable, "-m", "controlkit"]
    drawn = ["generate", "sailboat, noto style", "--control", f"canny={image}", "--out", str(out)]
    return {
        "import torch": [sys.executable, "-c", "import torch"],
        "import networks": [sys.executable, "-c", NETWORKS],
        "--help": [*verb, "--help"],
        "inspect": [*verb, "inspect", "ctrlora", "--base", "sd15", "--rank", "128", "--json"],
        "first image": [*verb, *drawn],
    }


def measure_all(rounds: int, warm_up: int, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Seconds of each."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "drawing.png"
        y, x = np.mgrid[:128, :128]
        disc = np.where(np.hypot(x - 64, y - 64) < 40, 40, 220).astype(np.uint8)
        Image.fromarray(np.stack([disc] * 3, -1)).save(image)
        out = Path(folder) / "pictures"
        ways: dict[str, Callable[[int], None]] = {
            name: _runner(words) for name, words in commands(image, out).items() if only is None or name in only
        }
        turns = measure.take_turns(ways, rounds, warm_up=warm_up)
        if "first image" in ways:
            assert list(out.glob("seed*.png")), "no image was drawn"
    return {"seconds": turns.times()}


def _runner(words: Sequence[str]) -> Callable[[int], None]:
    def run(_: int) -> None:
        made = subprocess.run(words, capture_output=True, text=True)
        if made.returncode:
            raise SystemExit(f"{' '.join(words)} ended with {made.returncode}:\n{made.stderr}")

    return run


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--out", default=None, help="the JSON file (default: in benchmarks/results)")
    args = parser.parse_args()
    case = measure_all(args.rounds, args.warm_up)
    print(measure.table(["what", "seconds"], list(case["seconds"].items())))
    measure.finish("startup", args, [case])


if __name__ == "__main__":
    main()
