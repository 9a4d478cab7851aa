"""The cache against one file for each sample: opening it, a batch at random, and a second run against a first one.

    python benchmarks/cache.py --rows 2000 --json cache.json

Rows have the size of a Stable Diffusion latent in fp16 (4 x 64 x 64, 32 kB). The files are `np.save`'s, read by
`np.load`, which checks nothing; the cache checks every row when it is read first. Both take turns, after everything was
read once, so that neither pays for the disk. Prints one JSON object: seconds, and ratios (files / cache: above 1 the
cache is faster; first run / second run).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from controlkit.data.cache import Spec, Store
from controlkit.data.cached_rows import CachedRows
from controlkit.data.segments import Part, digests_of, write_segment
from controlkit.files import sha256_of, write_json

_SHAPE = (4, 64, 64)
_BATCH = 16


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--index", type=int, default=100_000, help="rows of the index that is opened")
    parser.add_argument("--pairs", type=int, default=256, help="pairs that nano encodes; 0 for none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default=None, metavar="FILE", help="also write the result to FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CONTROLKIT_CACHE"] = str(Path(folder) / "cache")
        result = {"index": index(args.index, args.repeats), "batch": batch(Path(folder), args.rows, args.repeats)}
        if args.pairs:
            result["run"] = run(Path(folder), args.pairs)
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)


def index(count: int, repeats: int) -> dict[str, Any]:
    """Seconds until every one of `count` rows is found."""
    spec = Spec(kind="index", model="", transform="")
    keys = np.frombuffer(np.random.default_rng(0).bytes(16 * count), "S16")
    write_segment(
        spec.folder(Store(spec).root), keys, {"x": Part(dtype="U8", shape=(4,))}, {"x": np.zeros((count, 4), np.uint8)}
    )
    return {"rows": count, "seconds": median(lambda: CachedRows(Store(spec), keys, _nothing, what=""), repeats)}


def batch(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """Seconds for a batch at random from the cache and from files, the same bytes."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (count, 2 * int(np.prod(_SHAPE))), np.uint8)
    keys = digests_of([sha256_of(str(number)) for number in range(count)])
    files = folder / "files"
    files.mkdir()
    for number, row in enumerate(rows):
        np.save(files / f"{number}.npy", row.view(np.float16).reshape(_SHAPE))

    def make(indices: Sequence[int]) -> tuple[dict[str, Part], dict[str, np.ndarray]]:
        return {"x": Part(dtype="F16", shape=_SHAPE)}, {"x": rows[list(indices)]}

    spec = Spec(kind="latents", model="", transform="")
    CachedRows(Store(spec), keys, make, what="encoding {count} rows")
    steps = [rng.integers(count, size=_BATCH) for _ in range(count // _BATCH)]
    cached = CachedRows(Store(spec), keys, _nothing, what="")
    first = seconds(lambda: [cached.gather(step) for step in steps]) / len(steps)  # every row is checked on the way
    times: dict[str, list[float]] = {"cache": [], "files": []}
    for _ in range(repeats):
        times["cache"].append(seconds(lambda: [cached.gather(step) for step in steps]) / len(steps))
        times["files"].append(seconds(lambda: [_from_files(files, step) for step in steps]) / len(steps))
    assert np.array_equal(cached.gather(steps[0])["x"], _from_files(files, steps[0]).reshape(_BATCH, -1).view(np.uint8))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rows": count,
        "batch": _BATCH,
        "cache_seconds": medians["cache"],
        "cache_first_seconds": first,
        "files_seconds": medians["files"],
        "ratio": medians["files"] / medians["cache"],
        "ratio_first": medians["files"] / first,
        "files_on_disk": {"cache": len(list(spec.folder(Store(spec).root).iterdir())), "files": count},
    }


def run(folder: Path, count: int) -> dict[str, Any]:
    """Seconds until a run with nano has latents and embeddings of its pairs, the first time and the second."""
    from controlkit.bases.load import load_base
    from controlkit.data.pairs import read_pairs, write_pairs
    from controlkit.training.pair_cache import PairCache

    base = load_base()

    def draw(number: int) -> tuple[np.ndarray, np.ndarray, str]:
        small = np.random.default_rng(number).integers(0, 256, (6, 6, 3), np.uint8)
        image = np.asarray(Image.fromarray(small).resize((base.size, base.size)))
        return 255 - image, image, f"image {number}"

    write_pairs(folder / "pairs", [draw(number) for number in range(count)])
    pairs = read_pairs(folder / "pairs")

    def prepare() -> None:
        kept = PairCache(base, pairs)
        kept.latents()
        kept.texts()

    first, second = seconds(prepare), seconds(prepare)
    return {"pairs": count, "first_seconds": first, "second_seconds": second, "ratio": first / second}


def median(work: Callable[[], object], repeats: int) -> float:
    """Of several times."""
    return statistics.median(seconds(work) for _ in range(repeats))


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _from_files(files: Path, chosen: np.ndarray) -> np.ndarray:
    return np.stack([np.load(files / f"{number}.npy") for number in chosen])


def _nothing(indices: Sequence[int]) -> tuple[dict[str, Part], dict[str, np.ndarray]]:
    raise AssertionError(f"rows {indices} should be there")


if __name__ == "__main__":
    main()
