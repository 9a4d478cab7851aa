"""Images a second of `controlkit pairs` against the bare OpenCV loop, with the same number of processes.

    python benchmarks/pairs.py --pictures 2000 --workers 2 --json pairs.json

Both read the same 512 x 512 JPEG files, draw Canny edges and write them as PNG. The loop does nothing else: no hashes,
no captions, no parameters of its own for each image, no manifest, nothing to resume from. The two take turns, so that
a busy machine slows both, and the start of the processes is counted for both. Beside the ratio of the rates stands that
of the processor time (of all processes), which other programs disturb less; it leaves out waiting for the disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from controlkit.data.engine import make_pairs
from controlkit.data.input_images import list_images
from controlkit.data.making import MakeSettings
from controlkit.data.workers import cores
from controlkit.files import write_json


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", default=None, metavar="FILE", help="also write the result to FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.images, args.size, args.workers, args.repeats)
    print(f"{args.images} images of {args.size} x {args.size}, {args.workers} processes, {args.repeats} repeats")
    for name in ("loop", "engine"):
        print(f"{name:7} {result[name]:8.1f} images/s (median)")
    print(f"ratio   {result['ratio']:8.3f} (engine / loop; by processor time {result['cpu_ratio']:.3f})")
    if args.json:
        write_json(args.json, result)


def measure(folder: Path, count: int, size: int, workers: int, repeats: int) -> dict[str, object]:
    """Images a second of both, and their ratio."""
    paths = draw_images(folder / "pictures", count, size)
    runs: dict[str, list[float]] = {"loop": [], "engine": []}
    cpu: dict[str, list[float]] = {"loop": [], "engine": []}
    for repeat in range(repeats):
        out = folder / str(repeat)
        works: dict[str, Callable[[], None]] = {
            "loop": lambda: bare_loop(paths, out / "loop", workers),  # noqa: B023
            "engine": lambda: engine(folder / "pictures", out / "engine", workers),  # noqa: B023
        }
        for name, work in works.items():
            wall, processor = seconds(work)
            runs[name].append(count / wall)
            cpu[name].append(1000 * processor / count)
        check_same(out / "loop", out / "engine" / "canny", paths)
    medians = {name: statistics.median(rates) for name, rates in runs.items()}
    cpu_ratio = statistics.median(cpu["loop"]) / statistics.median(cpu["engine"])
    facts = {"pictures": count, "size": size, "workers": workers, "opencv": cv2.__version__}
    ratios = {"ratio": medians["engine"] / medians["loop"], "cpu_ratio": cpu_ratio}
    return {**facts, **medians, **ratios, "runs": runs, "cpu_ms": cpu}


def engine(images: Path, out: Path, workers: int) -> None:
    """The verb without its command line: listing, hashes, captions, edges, manifest."""
    make_pairs(list_images([images]), out, MakeSettings(conditions=("canny",), fixed=True), workers=workers)


def bare_loop(paths: Sequence[Path], out: Path, workers: int) -> None:
    """Read, cv2.Canny, write."""
    out.mkdir(parents=True)
    shares = [(paths[first::workers], out) for first in range(workers)]
    if workers == 1:
        edges_of(*shares[0])
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(edges_of, *zip(*shares, strict=True)))


def edges_of(paths: Sequence[Path], out: Path) -> None:
    """One process's share of the loop."""
    cv2.setNumThreads(1)
    for path in paths:
        cv2.imwrite(str(out / f"{path.stem}.png"), cv2.Canny(cv2.imread(str(path)), 100, 200))


def draw_images(folder: Path, count: int, size: int) -> list[Path]:
    """JPEG files with shapes and the grain of a photograph, a caption beside each."""
    folder.mkdir(parents=True)
    paths = []
    for number in range(count):
        rng = np.random.default_rng(number)
        small = rng.integers(0, 256, (12, 12, 3), np.uint8)
        image = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
        for _ in range(12):
            colour = tuple(int(value) for value in rng.integers(0, 256, 3))
            corners = rng.uniform(0, size, (5, 2)).astype(np.int32)
            cv2.fillConvexPoly(image, cv2.convexHull(corners), colour, cv2.LINE_AA)
        grain = rng.normal(0, 6, image.shape)
        path = folder / f"{number:06d}.jpg"
        cv2.imwrite(str(path), np.clip(image + grain, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 92])
        path.with_suffix(".txt").write_text(f"shapes, number {number}")
        paths.append(path)
    return paths


def check_same(loop: Path, made: Path, paths: Sequence[Path]) -> None:
    """Both have all files, and drew the same edges up to the rounding of two JPEG decoders."""
    apart = []
    for path in paths[:: max(1, len(paths) // 20)]:
        one, two = (cv2.imread(str(folder / f"{path.stem}.png"), cv2.IMREAD_GRAYSCALE) for folder in (loop, made))
        apart.append(float(np.mean(one != two)))
    assert len(list(loop.iterdir())) == len(list(made.iterdir())) == len(paths)
    assert max(apart) < 0.02, f"edges differ in {max(apart):.1%} of the pixels"


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """How long it takes, and how much processor time of this process and of those that it starts."""
    started, before = time.perf_counter(), processor_seconds()
    work()
    return time.perf_counter() - started, processor_seconds() - before


def processor_seconds() -> float:
    """Processor time so far, of this process and of those that it started and that have ended."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, who))


if __name__ == "__main__":
    main()
