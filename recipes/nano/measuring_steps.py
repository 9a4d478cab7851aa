"""The steps that make figures: evaluations, studies, images and pages."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from chart import draw_systems
from making import (
    ADAPTERS,
    BALANCED,
    BASE_CONDITIONS,
    FURTHER,
    RECIPES,
    TOGETHER,
    WITH_CANNY,
    MakeSettings,
    npm_pack,
    system_file,
    system_log,
)
from pages import marked, pages, render, without_figures
from results import Results
from steps import Outcome, Step, digest
from workshop import RESULTS, Workshop, made_of_files

from controlkit.files import sha256_of, write_atomically

_GUIDANCE = (
    *(("balanced", scale, 1.0) for scale in (1.0, 2.0, 3.0)),
    ("balanced", 3.0, 1.5),
    *(("control", scale, 1.0) for scale in (2.0, 3.0, 5.0)),
    *(("control", 3.0, weight) for weight in (0.7, 1.5)),
)
"""Mode, guidance scale and weight of each row of the table in docs/nano.md."""

_TELLING = ("figures", "results", "tables_of_nano", "tables_of_speed", "tables_of_studies", "tables_of_systems")
"""Modules that make text of results."""


class MeasuringSteps:
    """Steps that measure and tell."""

    def __init__(self, shop: Workshop, settings: MakeSettings) -> None:
        self.shop = shop
        self.settings = settings
        self.root = shop.root

    def steps(self) -> list[Step]:
        """All of them, in order."""
        return [*self._measured(), self._demo(), self._gallery(), self._pages()]

    def _measured(self) -> list[Step]:
        return [*self._evaluations(), self._quick_start(), *self._studies()]

    def _report(
        self,
        file: str,
        what: str,
        commands: dict[str, list[str]],
        reads: tuple[Path, ...],
        *images: str,
        minutes: float,
        version: int = 1,
    ) -> Step:
        def run() -> Outcome:
            outcome = self.shop.report(file, commands, **self._beside(file))
            if file == "systems":
                runs = json.loads((self.shop.results / f"{file}.json").read_text(encoding="utf-8"))["runs"]
                draw_systems(runs, self.shop.images / "systems.png")
            return outcome

        sets = self.shop.assets / "evaluation"
        return Step(
            name=f"evaluate-{file}",
            what=what,
            inputs=(*self.shop.base, *reads, sets),
            outputs=(self.shop.results / f"{file}.json", *(self.shop.images / image for image in images)),
            settings={"commands": {label: self.shop.shown(command) for label, command in commands.items()}},
            version=version,
            run=run,
            minutes=minutes,
        )

    def _beside(self, file: str) -> dict[str, Any]:
        """What a file of results has besides reports: label => plain value."""
        if file == "adapters":
            files = {f"nano/{name}": self.shop.control(f"nano/{name}") for name in (*BASE_CONDITIONS, *ADAPTERS)}
            return {"made": {"control": made_of_files(files)}}
        if file == "further":
            files = {name: system_file(self.shop, name) for name in FURTHER}
            scores = {name: _of_condition_images(name, self.settings) for name in FURTHER}
            return {"made": {"default": made_of_files(files)}, "condition_images": {"default": scores}}
        if file != "systems":
            return {}
        told = {system: self._described(system_file(self.shop, system)) for system in self.settings.systems}
        told["shipped"] = self._described(self.shop.control("canny"))
        values = {key: {system: one[key] for system, one in told.items()} for key in ("parameters", "gflop", "steps")}
        seconds = {system: _seconds_of_a_step(system_log(self.shop, system)) for system in self.settings.systems}
        return values | {"seconds_of_a_step": seconds}

    def _described(self, path: Path) -> dict[str, Any]:
        said = json.loads(self.shop.run(["inspect", str(path), "--base", "nano", "--json"]).printed)
        cost = next(value for name, value in said.items() if name.startswith("GFLOP"))
        each = cost.get("once a step", 0) + cost.get("each step of each image", 0)
        gflop = [cost.get("once for a condition", 0), each]
        steps = made_of_files({"": path})[""].get("steps", 0)
        return {"parameters": said["parameters"], "gflop": gflop, "steps": steps}

    def _system(self, name: str) -> str:
        return str(system_file(self.shop, name).relative_to(self.root))

    def _evaluations(self) -> list[Step]:
        wanted = self.settings
        few = [] if wanted.sampling_steps == 20 else ["--steps", str(wanted.sampling_steps)]
        base = ["evaluate", "base", "nano", *few]
        canny = ["evaluate", "control", "canny", *_images(wanted.images), *few]
        names = [f"nano/{name}" for name in (*BASE_CONDITIONS, *ADAPTERS)]
        adapters = ["evaluate", "control", *names, *_images(wanted.adapter_images), *few]
        guidance = ["evaluate", "control", "canny", "--sets", "seen", *_images(wanted.guidance_images), *few]
        systems = {
            system: [
                "evaluate",
                "control",
                self._system(system),
                *_images(wanted.images),
                *few,
                "--distance",
            ]
            for system in wanted.systems
        }
        shipped = (self.shop.control("canny"),)
        shown = ("nano.png", "canny.png", "boxes.png", "uni-controlnet.png", "controlnet-union.png")
        sheets = {image: ["--sheet", str(self.shop.images / image)] for image in shown}
        several = [*_images(wanted.adapter_images), *few]
        further = ["evaluate", "control", *map(self._system, FURTHER), *several]
        scenes = ["--icons", str(self.shop.icons.relative_to(self.root)), *_images(wanted.scenes), *few]
        return [
            self._report(
                "base",
                "evaluate the base",
                {"default": [*base, *sheets["nano.png"]]},
                (),
                "nano.png",
                minutes=3,
                version=2,
            ),
            self._report(
                "base-sampling",
                "the base under other guidance and samplers",
                {
                    "guidance 2": [*base, "--guidance", "2"],
                    "guidance 5": [*base, "--guidance", "5"],
                    "dpm++": [*base, "--sampler", "dpm++"],
                    "unipc": [*base, "--sampler", "unipc"],
                    "60 steps": [*base[:3], "--steps", str(3 * wanted.sampling_steps)],
                },
                (),
                minutes=18,
                version=2,
            ),
            self._report(
                "canny",
                "evaluate the canny ControlNet",
                {"control": [*canny, *sheets["canny.png"]], "balanced": [*canny, "--mode", "balanced"]},
                shipped,
                "canny.png",
                minutes=4,
            ),
            self._report(
                "guidance",
                "the canny ControlNet under modes, guidance scales and weights",
                {
                    f"{mode} {scale:g} {weight:g}": [
                        *guidance,
                        *("--mode", mode, "--guidance", f"{scale:g}", "--weight", f"{weight:g}"),
                    ]
                    for mode, scale, weight in _GUIDANCE
                },
                shipped,
                minutes=9,
            ),
            self._report(
                "adapters",
                "evaluate the adapters",
                {"control": adapters, "balanced": [*adapters, "--mode", "balanced"]},
                tuple(self.shop.control(name) for name in ("nano/base", *names)),
                minutes=12,
            ),
            self._report(
                "further",
                "evaluate adapters that do not ship",
                {"default": further},
                tuple(system_file(self.shop, name) for name in FURTHER),
                minutes=2,
            ),
            self._report(
                "systems",
                "evaluate other systems on canny",
                {**systems, "shipped": [*canny, "--distance"]},
                (*shipped, *(system_file(self.shop, system) for system in systems)),
                "systems.png",
                minutes=9,
            ),
            *(
                self._report(
                    name,
                    what,
                    {"default": ["evaluate", "control", self._system(name), *several, *sheets[image]]},
                    (system_file(self.shop, name),),
                    image,
                    minutes=minutes,
                    version=version,
                )
                for name, what, image, minutes, version in (
                    (
                        "uni-controlnet-local",
                        "evaluate each condition of Uni-ControlNet's local adapter",
                        "uni-controlnet.png",
                        6,
                        2,
                    ),
                    ("controlnet-union", "evaluate each task of ControlNet Union", "controlnet-union.png", 8, 1),
                )
            ),
            self._report(
                "scenes",
                "evaluate GLIGEN on scenes of two icons",
                {"default": ["evaluate", "scenes", self._system("gligen"), *scenes, *sheets["boxes.png"]]},
                (system_file(self.shop, "gligen"), self.shop.icons),
                "boxes.png",
                minutes=2,
            ),
        ]

    def _studies(self) -> list[Step]:
        pairs = self.root / "data" / "openmoji-pairs"
        adapters = tuple(self.shop.control(f"nano/{name}") for name in ("base", *BASE_CONDITIONS, *ADAPTERS))
        given = ["--control", "nano/base", "--given", f"openmoji={pairs.relative_to(self.root)}@lineart_given"]
        mode = ("mode=control", "parts=[budgets]", "budgets=[25,100,500]")
        learned = (self.shop.control("nano/base"), self.shop.icons, pairs)
        chosen = self.settings
        together = [system for system in TOGETHER if system in chosen.systems]
        mixes = [f"{self._system(system)}+{TOGETHER[system]}" for system in together]
        unicontrols = (("control", "unicontrol"), ("frozen", "unicontrol-frozen"))
        return [
            *self._openmoji(pairs),
            self._study(
                "new-condition",
                "new-condition",
                [*given, *_set(("ranks=[2,4,8,32,64]", "pair_counts=[100,1000,5000]", *chosen.new_condition))],
                learned,
                {"figure": "new-condition.png", "images": "new-condition-pictures.png"},
                minutes=100,
            ),
            self._study(
                "new-condition-control",
                "new-condition",
                [*given, *_set((*mode, *chosen.new_condition))],
                learned,
                {},
                minutes=30,
            ),
            self._study(
                "convergence",
                "convergence",
                _set(chosen.convergence),
                (self.shop.control("nano/base"), self.shop.icons),
                {"figure": "convergence.png"},
                minutes=55,
            ),
            self._study("several", "several-conditions", _set(chosen.several_conditions), adapters, {}, minutes=15),
            self._study(
                "several-canny",
                "several-conditions",
                _set((*chosen.several_canny, f"mixes=[{','.join(f'canny+{name}' for name in WITH_CANNY)}]")),
                (self.shop.control("canny"), *adapters),
                {"images": "together.png"},
                minutes=5,
            ),
            self._study(
                "several-systems",
                "several-conditions",
                _set((*chosen.several_systems, f"mixes=[{','.join(mixes)}]")),
                (*adapters, *(system_file(self.shop, system) for system in together)),
                {},
                minutes=6,
            ),
            self._study(
                "several-balanced",
                "several-conditions",
                _set((*chosen.several_balanced, "mode=balanced", f"mixes=[{'+'.join(BALANCED)}]")),
                adapters,
                {},
                minutes=3,
            ),
            self._study(
                "guidance-modes",
                "guidance-modes",
                _set(chosen.guidance_modes),
                (self.shop.control("canny"), self.shop.assets / "evaluation"),
                {"images": "guidance-modes.png"},
                minutes=5,
            ),
            self._study(
                "image-prompt",
                "image-prompt",
                ["--control", self._system("uni-controlnet-global"), *_set(chosen.image_prompt)],
                (system_file(self.shop, "uni-controlnet-global"), self.shop.assets / "evaluation"),
                {},
                minutes=5,
            ),
            self._study(
                "task-instructions",
                "task-instructions",
                _set((*chosen.task_instructions, *(f"{name}={self._system(file)}" for name, file in unicontrols))),
                tuple(system_file(self.shop, file) for _, file in unicontrols),
                {},
                minutes=25,
            ),
            self._study(
                "community",
                "community-model",
                _set(chosen.community_model),
                (self.shop.control("canny"), self.shop.icons),
                {"images": "community-model.png"},
                minutes=25,
            ),
            self._study(
                "ambiguous",
                "ambiguous-content",
                _set(chosen.ambiguous_content),
                (self.shop.control("canny"), *adapters),
                {},
                minutes=20,
            ),
        ]

    def _openmoji(self, pairs: Path) -> list[Step]:
        package = self.root / "data" / "openmoji" / "openmoji-17.0.0.tgz"

        def write() -> Outcome:
            script = self.root / RECIPES / "build_openmoji_pairs.py"
            subprocess.run([sys.executable, str(script), str(package), str(pairs)], cwd=self.root, check=True)
            return Outcome()

        return [
            Step(
                name="openmoji",
                what="the package openmoji from npm",
                outputs=(package,),
                run=partial(npm_pack, package.parent, "openmoji@17.0.0"),
                intermediate=True,
                data=True,
            ),
            Step(
                name="openmoji-pairs",
                what="pairs of OpenMoji's line art",
                inputs=(package,),
                outputs=(pairs,),
                run=write,
                intermediate=True,
                data=True,
            ),
        ]

    def _study(
        self,
        file: str,
        name: str,
        arguments: list[str],
        reads: tuple[Path, ...],
        images: dict[str, str],
        *,
        minutes: float,
    ) -> Step:
        reads = (*self.shop.base, *reads)
        return Step(
            name=f"study-{file}",
            what=f"controlkit study {name}",
            inputs=reads,
            outputs=(self.shop.results / f"{file}.json", *(self.shop.images / image for image in images.values())),
            settings={"arguments": arguments},
            run=partial(self.shop.study, file, name, arguments, reads, images),
            minutes=minutes,
        )

    def _quick_start(self) -> Step:
        script = self.root / "examples" / "captioned_images.py"
        steps = str(self.settings.quick_start_steps)

        def run() -> Outcome:
            work = self.shop.made / "quick-start"
            photos, pairs, adapter = work / "photos", work / "pairs", work / "run"
            shutil.rmtree(work, ignore_errors=True)
            command = [sys.executable, str(script), str(photos)]
            subprocess.run(command, cwd=self.root, env=self.shop.environment, check=True, stdout=sys.stderr)
            of_palette = str(pairs / "palette")
            self.shop.run(["pairs", str(photos), "--conditions", "palette", "--size", "64", "--out", str(pairs)])
            named = ["--control", "nano/base", "--name", "mine", "--steps", steps, "--out", str(adapter)]
            self.shop.run(["adapt", of_palette, *named])
            file = str(adapter / "mine.safetensors")
            held_out = ["--pairs", of_palette]
            return self.shop.report(
                "quick-start",
                {
                    "default": ["evaluate", "control", file, *held_out],
                    "base control": ["evaluate", "control", "nano/base", *held_out],
                },
            )

        return Step(
            name="quick-start",
            what="the README's adapter",
            inputs=(*self.shop.base, self.shop.control("nano/base"), self.shop.assets / "evaluation", script),
            outputs=(self.shop.results / "quick-start.json",),
            settings={"steps": steps},
            version=3,
            run=run,
            minutes=2,
        )

    def _demo(self) -> Step:
        sheet = self.shop.images / "demo.png"

        def run() -> Outcome:
            made = json.loads(self.shop.run(["demo", "--out", str(self.shop.made / "demo"), "--json"]).printed)
            write_atomically(sheet, lambda path: path.write_bytes(Path(made["sheet"]).read_bytes()))
            return Outcome()

        return Step(
            name="demo",
            what="the image of the demo",
            inputs=(*self.shop.base, *(self.shop.assets / name for name in ("controls", "demo"))),
            outputs=(sheet,),
            run=run,
            minutes=0.3,
        )

    def _gallery(self) -> Step:
        sheet, script = self.shop.images / "generate.png", self.root / RECIPES / "gallery.py"
        reads = (*self.shop.base, self.shop.control("canny"), self.shop.icons, script)
        steps = str(self.settings.gallery_steps)

        def run() -> Outcome:
            key = sha256_of(*(digest(path) or "" for path in reads), steps)[:12]
            where = ["--icons", str(self.shop.icons), "--work", str(self.shop.made / "gallery" / key)]
            command = [sys.executable, str(script), *where, "--steps", steps, "--out", str(sheet)]
            subprocess.run(command, cwd=self.root, env=self.shop.environment, check=True)
            return Outcome()

        return Step(
            name="gallery",
            what="the sheet of what generate can do, with two LoRAs",
            inputs=reads,
            outputs=(sheet,),
            settings={"steps": steps},
            run=run,
            minutes=12,
        )

    def _pages(self) -> Step:
        found = {page: text for page in pages(self.root) if marked(text := page.read_text(encoding="utf-8"))}
        staged = {page: self.shop.staged / page.relative_to(self.root) for page in found}

        def run() -> Outcome:
            results = Results(self.shop.results, (self.root / RESULTS).parent)
            without: set[str] = set()
            for page, copy in staged.items():
                # Read again: it may have been edited while the steps before ran.
                text, missing = render(page.read_text(encoding="utf-8"), results, str(page.relative_to(self.root)))
                without |= set(missing)
                write_atomically(copy, partial(Path.write_text, data=text, encoding="utf-8"))
            return Outcome(note=f"not measured yet: {', '.join(sorted(without))}" if without else "")

        results = {path for step in self._measured() for path in step.outputs if path.parent == self.shop.results}
        code = [digest(path) for path in sorted(Path(__file__).parent.glob("*.py")) if path.stem in _TELLING]
        measured = {path.name: digest(path) for path in sorted((self.root / RESULTS).parent.glob("*.json"))}
        around = {str(page.relative_to(self.root)): without_figures(text) for page, text in found.items()}
        return Step(
            name="pages",
            what="figures of nano in the pages",
            inputs=tuple(sorted(results)),
            outputs=tuple(staged.values()),
            settings={"pages": around, "figures": code, "benchmarks": measured},
            run=run,
            minutes=0.1,
            optional_inputs=True,
        )


def _seconds_of_a_step(log: Path) -> float:
    """Median time in seconds of a training step, which a busy machine changes less than the mean.

    Args:
        log: `log.jsonl` of a run.
    """
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return statistics.median(
        (after["seconds"] - before["seconds"]) / (after["step"] - before["step"])
        for before, after in pairwise([{"step": 0, "seconds": 0.0}, *lines])
        if after["step"] > before["step"] and after["seconds"] > before["seconds"]
    )


def _of_condition_images(name: str, settings: MakeSettings) -> float | None:
    """What the condition images themselves score on held-out images, where the score compares with the target."""
    from controlkit import conditions
    from controlkit.evaluation.sets import evaluation_set

    condition = conditions.find(name)
    if condition.fidelity.against != "target":
        return None
    targets = evaluation_set("held-out").first(settings.adapter_images).images
    given = [condition(target) for target in targets]
    return condition.mean_score(given, given, targets)


def _images(count: int) -> list[str]:
    return [] if count == 96 else ["--images", str(count)]


def _set(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]
