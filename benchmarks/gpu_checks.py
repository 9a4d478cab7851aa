"""What has to hold on a GPU before anything is timed there.

    python benchmarks/gpu_checks.py --device cuda --out checks.json

On nano, in float32:

- sampling: every system of nano that takes one image draws with CUDA graphs what it draws without, to 1e-4; so does
  the base alone, under every solver of nano. Systems that act inside the base's pass run eagerly, and say so;
- training: a ControlNet and a CtrLoRA adapter end with graphs, and with data workers, with the states (weights and
  moments) that they have without, to 1e-4 and 1e-5;
- resume: a run that was stopped in the middle ends with the weights of one that was not, to 1e-5.

Says of each whether graphs or eager calls ran. Status 1 if a difference is above its bound, if a check ends with an
error (the others still run), or if on CUDA `auto` ran eagerly where a graph is possible. Convolutions are in float32,
not TF32. On the CPU everything runs eagerly, and the comparison is of two eager runs. The global adapter needs the
extra `metrics`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import measure
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from controlkit import conditions
from controlkit.bases.base import Base
from controlkit.bases.load import load_base
from controlkit.bases.meta import meta_base
from controlkit.controls.control import Acts, Control
from controlkit.controls.inputs import encode_images, takes_one_image
from controlkit.controls.registry import registry
from controlkit.evaluation.sets import evaluation_set
from controlkit.files import write_json
from controlkit.formats.describe import can_be_made
from controlkit.images import to_tensor
from controlkit.sampling.graphs import NetworkCalls
from controlkit.sampling.plan import ActiveControl
from controlkit.sampling.sampler import sample
from controlkit.training.recipes import build_recipe
from controlkit.training.run import run_recipe

BOUND, RESUMED_BOUND = 1e-4, 1e-5
STEPS = 10
"""Of sampling: enough that a capture pays."""
SOLVERS = ("ddim", "dpm++", "unipc", "ddpm")
TRAINED = {
    "controlnet": {"system": "controlnet"},
    "ctrlora": {"system": "ctrlora-adapter", "rank": 4, "control": "nano/base"},
}


@dataclass
class Check:
    """One comparison."""

    name: str
    ran: str
    """`graph`, or `eager` with the reason."""
    difference: float | None
    """None if it ended with an error."""
    bound: float
    graph_expected: bool = False
    """Whether eager calls are a failure on CUDA."""

    def passed(self, device: torch.device) -> bool:
        """Whether the difference is within its bound, and graphs ran where they should."""
        eager = self.graph_expected and device.type == "cuda" and not self.ran.startswith("graph")
        return self.difference is not None and self.difference <= self.bound and not eager


Group = tuple[str, Callable[[], Iterator[Check]]]
"""A name, and checks of which the later ones need the earlier ones."""


def run_groups(groups: Iterable[Group]) -> Iterator[Check]:
    """The checks of all groups. An error ends its group, with a check that tells it, and not the others."""
    for name, checks in groups:
        try:
            yield from checks()
        except Exception as error:
            traceback.print_exc()
            told = " ".join(str(error).split())[:300]
            yield Check(name, f"error: {type(error).__name__}: {told}", None, BOUND)


def sampling_groups(base: Base) -> Iterator[Group]:
    """Images with graphs against images without."""
    drawing = evaluation_set("held-out").examples[0]
    image = to_tensor([conditions.find("canny")(drawing.image)]).to(base.device)

    def drawn(mode: str, uses: list[ActiveControl], **settings: Any) -> tuple[Tensor, str]:
        calls = NetworkCalls(base, mode)
        batches = sample(base, prompt=drawing.caption, seeds=(3, 4), uses=uses, steps=STEPS, calls=calls, **settings)
        return torch.cat(list(batches)), ran_as(calls.report.to_json())

    def check(name: str, uses: list[ActiveControl], *, graph_expected: bool, **settings: Any) -> Iterator[Check]:
        eager, _ = drawn("off", uses, **settings)
        made, ran = drawn("auto", uses, **settings)
        again, _ = drawn("auto", uses, **settings)  # from graphs that were captured before
        difference = max(measure.largest_difference(eager, each) for each in (made, again))
        yield Check(f"sampling: {name}", ran, difference, BOUND, graph_expected)

    def of_system(kind: type[Control]) -> Iterator[Check]:
        torch.manual_seed(0)
        control = kind.for_base(base).to(base.device).eval().requires_grad_(False)
        with torch.no_grad():
            for parameter in control.parameters():
                parameter += 0.02 * torch.randn(parameter.shape).to(parameter)
        if len(control.conditions) > 1:
            control = control.for_condition(control.conditions[0])
        use = ActiveControl(control, encode_images(control, image, base))
        yield from check(kind.kind, [use], graph_expected=Acts.TAPS not in control.acts)

    for solver in SOLVERS:
        name = f"no control, {solver}"
        yield f"sampling: {name}", partial(check, name, [], graph_expected=True, sampler=solver)
    on_meta = meta_base("nano")
    for kind in registry().values():
        is_own = kind.__module__.startswith("controlkit.controls.")
        if is_own and takes_one_image(kind) and can_be_made(kind, on_meta):
            yield f"sampling: {kind.kind}", partial(of_system, kind)


def ran_as(report: dict[str, Any]) -> str:
    """`graph` if any call did, else `eager` with the reasons."""
    if not report["graph"]:
        return f"eager: {', '.join(report['why'])}"
    rest = f"; {report['eager']} eager ({', '.join(report['why'])})" if report["eager"] else ""
    return f"graph, {report['graph']} calls{rest}"


def write_pairs(folder: Path, count: int = 24) -> None:
    """Pairs of held-out images and their edges."""
    for name in ("target", "source"):
        (folder / name).mkdir(parents=True)
    canny = conditions.find("canny")
    lines = []
    for number, example in enumerate(evaluation_set("held-out").examples[:count]):
        Image.fromarray(example.image).save(folder / "target" / f"{number}.png")
        Image.fromarray(canny(example.image)).save(folder / "source" / f"{number}.png")
        lines.append(
            f'{{"target": "target/{number}.png", "source": "source/{number}.png", "prompt": "{example.caption}"}}'
        )
    (folder / "prompt.json").write_text("\n".join(lines), encoding="utf-8")


def training_groups(device: str, folder: Path, steps: int = 6) -> Iterator[Group]:
    """Runs with graphs, with workers and resumed against plain ones."""
    write_pairs(folder / "pairs")

    def run(name: str, system: dict[str, Any], **changes: Any) -> tuple[dict[str, Tensor], str]:
        settings = {
            **system,
            "name": "canny",
            "condition": "canny",
            "pairs": str(folder / "pairs"),
            "out": str(folder / name),
            "steps": steps,
            "batch_size": 4,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "min_lr_rate": 1.0,  # constant, whatever the number of steps
            "log_every": 2,
            "save_every": 3,
            "preview_every": 1000,
            "score_pictures": 1,
            "precision": "fp32",
            "device": device,
            "held_out": 0.2,
            **changes,
        }
        trained = run_recipe(build_recipe(settings, origin="gpu_checks"))
        state = load_file(str(folder / name / "state.safetensors"))
        return {key: value for key, value in state.items() if value.is_floating_point()}, trained.base_runs

    def of_system(kind: str, system: dict[str, Any]) -> Iterator[Check]:
        plain, _ = run(f"{kind}-plain", system, graphs="off", data_workers=0)
        graphed, ran = run(f"{kind}-graphs", system, graphs="auto", data_workers=0)
        yield Check(f"training {kind}: graphs", ran, apart(plain, graphed), BOUND, graph_expected=True)
        ahead, ran = run(f"{kind}-workers", system, graphs="off", data_workers=2)
        yield Check(f"training {kind}: data workers", ran, apart(plain, ahead), RESUMED_BOUND)
        run(f"{kind}-resumed", system, graphs="auto", steps=3)
        resumed, ran = run(f"{kind}-resumed", system, graphs="auto")
        yield Check(f"training {kind}: resumed", ran, apart(graphed, resumed), RESUMED_BOUND)

    for kind, system in TRAINED.items():
        yield f"training {kind}", partial(of_system, kind, system)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of the states of two runs."""
    if a.keys() != b.keys():
        raise ValueError(f"states differ in their tensors: {sorted(a.keys() ^ b.keys())[:4]}")
    return max(measure.largest_difference(a[key], b[key]) for key in a)


def main(arguments: list[str] | None = None) -> int:
    """Run all checks, print and write them; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=("sampling", "training"), default=None)
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    checks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, measure.without_tf32():
        parts: dict[str, Callable[[], Iterator[Group]]] = {
            "sampling": lambda: sampling_groups(load_base("nano", device=args.device)),
            "training": lambda: training_groups(args.device, Path(folder)),
        }
        chosen = [args.only] if args.only else list(parts)
        for check in chain(*(run_groups(parts[name]()) for name in chosen)):
            passed = check.passed(device)
            told = "" if check.difference is None else f"{check.difference:.2g} "
            print(f"{'ok  ' if passed else 'FAIL'} {check.name}: {told}({check.ran})", flush=True)
            checks.append({**asdict(check), "passed": passed})
            if args.out is not None:  # what is known counts, whatever happens next
                write_json(args.out, {"machine": measure.machine(device), "checks": checks})
    return 0 if all(check["passed"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
