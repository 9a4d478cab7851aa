"""The steps of making nano: what each reads, writes and runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from figures import Results
from pages import marked, pages, render, without_figures
from steps import Outcome, Step, digest
from workshop import ASSETS, NETWORKS, Workshop, assemble_base, made_of_files, parts_of

from controlkit.errors import UserError
from controlkit.files import write_atomically

RECIPES = Path("recipes/nano")

BASE_CONDITIONS = (
    *("canny", "softedge_sobel", "scribble", "color_regions", "silhouette", "grayscale"),
    *("blur", "inpaint", "outpaint"),
)
"""Those of recipes/nano/ctrlora-base.yaml, whose adapters are trained with the base control."""

ADAPTERS = {
    "palette": "palette",
    "pixel": "pixel",
    "lineart_color_hints": "lineart_color_hints",
    "lineart": "lineart_xdog",
}
"""Adapters that are trained on the finished base control => their conditions."""


@dataclass(frozen=True, kw_only=True)
class MakeSettings:
    """What is trained and measured. The defaults are those of the pages."""

    adapter_steps: tuple[str, ...] = ("palette=1000", "pixel=1000", "lineart_color_hints=1000", "lineart=500")
    """Optimiser steps of each adapter."""
    pairs: int = 1000
    """Pairs to learn each of them from."""
    system_steps: tuple[str, ...] = ("controlnet-mlp=800", "controlnet-lite=800", "controlnet-xs=1600")
    """Optimiser steps of the other systems that are compared on canny."""
    images: int = 96
    """Images of each set on which canny controls are evaluated."""
    adapter_images: int = 32
    """The same for adapters."""
    guidance_images: int = 48
    """Images on which modes, guidance scales and weights are compared."""
    sampling_steps: int = 20
    """DDIM steps."""
    new_condition: tuple[str, ...] = ()
    """Settings of the study new-condition, `key=value`."""
    several_conditions: tuple[str, ...] = ("images=32",)
    """Settings of the study several-conditions."""
    community_model: tuple[str, ...] = ()
    """Settings of the study community-model."""


class Plan:
    """The steps of making nano.

    Args:
        base: `shipped`, `scratch`, `further`, or a path of weights.
    """

    def __init__(self, workshop: Workshop, settings: MakeSettings, base: str) -> None:
        self.shop = workshop
        self.settings = settings
        self.base = base
        self.root = workshop.root
        self.data = self.root / "data"

    def steps(self) -> list[Step]:
        """All of them, in order."""
        return [
            *self._icons(),
            *self._base(),
            *self._controls(),
            *self._adapters(),
            *self._systems(),
            *self._evaluations(),
            *self._studies(),
            self._demo(),
            self._pages(),
        ]

    # Data

    def _icons(self) -> list[Step]:
        from controlkit.nano.icons import STYLES, render_sets

        packages = self.data / "icons"
        names = [f"@{file.replace('iconify-json-', 'iconify-json/')}" for file in STYLES.values()]

        def fetch() -> Outcome:
            return _npm_pack(packages, *names)

        def draw() -> Outcome:
            render_sets(str(packages), str(self.shop.icons))
            return Outcome()

        return [
            Step(
                name="packages",
                what="icon packages from npm",
                outputs=(packages,),
                settings={"packages": names},
                run=fetch,
                intermediate=True,
                data=True,
            ),
            Step(
                name="icons",
                what="render the icons",
                inputs=(packages,),
                outputs=(self.shop.icons,),
                run=draw,
                intermediate=True,
                data=True,
            ),
        ]

    # The base

    def _base(self) -> list[Step]:
        if self.base == "shipped":
            return []
        nano, made = self.root / ASSETS / "nano", self.shop.made / "base"
        steps = []
        if self.base == "scratch":
            steps += self._from_scratch(made)
        elif self.base == "further":
            shipped = tuple(nano / name for name in NETWORKS)
            settings = (f"start={ASSETS / 'nano'}",)
            steps.append(self._concepts(made, settings, shipped))
        given = made if self.base in ("scratch", "further") else Path(self.base).resolve()

        def assemble() -> Outcome:
            assemble_base(given, nano, self.shop.assets / "nano")
            return Outcome()

        parts = (given,) if steps else tuple(parts_of(given))
        steps.append(
            Step(
                name="nano",
                what=f"the base's folder, from {'its training' if steps else self.base}",
                inputs=parts or (given,),
                outputs=self.shop.base,
                run=assemble,
                minutes=0.2,
            )
        )
        return steps

    def _from_scratch(self, made: Path) -> list[Step]:
        autoencoder, first = self.shop.made / "autoencoder", self.shop.made / "base-first"
        return [
            self._training(
                "autoencoder", "autoencoder.yaml", (self.shop.icons,), {"vae": autoencoder / "vae"}, minutes=30
            ),
            self._training(
                "base",
                "base.yaml",
                (self.shop.icons, autoencoder / "vae"),
                {"base": first},
                settings=(f"autoencoder={autoencoder}",),
                minutes=186,
            ),
            self._concepts(made, (f"start={first}",), (first,)),
        ]

    def _concepts(self, made: Path, settings: Sequence[str], reads: tuple[Path, ...]) -> Step:
        reads = (self.shop.icons, self.root / RECIPES / "concepts.txt", *reads)
        return self._training("concepts", "base-concepts.yaml", reads, {"base": made}, settings=settings, minutes=396)

    # Controls

    def _controls(self) -> list[Step]:
        reads = (*self.shop.base, self.shop.icons)
        names = ("base", *BASE_CONDITIONS)
        return [
            self._training(
                "canny",
                "controlnet-canny.yaml",
                reads,
                {"canny.safetensors": self.shop.control("canny")},
                start="canny",
                places=("",),
                minutes=174,
                intermediate=False,
            ),
            self._training(
                "ctrlora",
                "ctrlora-base.yaml",
                reads,
                {f"{name}.safetensors": self.shop.control(f"nano/{name}") for name in names},
                start="base",
                places=("ctrlora", "nano"),
                minutes=84,
                intermediate=False,
            ),
        ]

    def _adapters(self) -> list[Step]:
        folder = self.shop.made / "pairs"

        def write() -> Outcome:
            from controlkit import conditions
            from controlkit.data.pairs import write_pairs
            from controlkit.nano.icons import IconSets
            from controlkit.studies.new_condition import icon_pairs

            sets = IconSets(str(self.shop.icons))
            for name in ADAPTERS.values():
                write_pairs(folder / name, icon_pairs(sets, conditions.find(name), self.settings.pairs))
            return Outcome()

        pairs = Step(
            name="pairs",
            what="pairs for the new adapters",
            inputs=(self.shop.icons,),
            outputs=tuple(folder / name for name in ADAPTERS.values()),
            settings={"pairs": self.settings.pairs},
            run=write,
            intermediate=True,
        )
        return [
            pairs,
            *(
                self._training(
                    f"adapter-{name}",
                    "ctrlora-adapter.yaml",
                    (*self.shop.base, self.shop.control("nano/base"), folder / ADAPTERS[name]),
                    {f"{name}.safetensors": self.shop.control(f"nano/{name}")},
                    settings=(
                        f"pairs={(folder / ADAPTERS[name]).relative_to(self.root)}",
                        f"condition={ADAPTERS[name]}",
                        f"name={name}",
                        f"steps={steps}",
                    ),
                    places=("ctrlora", "nano"),
                    minutes=4 * steps / 500,
                    intermediate=False,
                )
                for name, steps in _counts(self.settings.adapter_steps).items()
            ),
        ]

    def _systems(self) -> list[Step]:
        return [
            self._training(
                system,
                f"{system}.yaml",
                (*self.shop.base, self.shop.icons),
                {"canny.safetensors": self._system(system)},
                settings=(f"steps={steps}",),
                minutes=20 * steps / 800,
            )
            for system, steps in _counts(self.settings.system_steps).items()
        ]

    def _system(self, system: str) -> Path:
        return self.shop.made / "systems" / f"{system}.safetensors"

    def _training(
        self,
        name: str,
        recipe: str,
        reads: tuple[Path, ...],
        results: dict[str, Path],
        *,
        settings: Sequence[str] = (),
        start: str | None = None,
        places: Sequence[str] = (),
        minutes: float,
        intermediate: bool = True,
    ) -> Step:
        return Step(
            name=name,
            what=f"train {RECIPES / recipe}",
            inputs=(self.root / RECIPES / recipe, *reads),
            outputs=tuple(results.values()),
            settings={"settings": [one.replace(f"{self.root}/", "") for one in settings]},
            run=partial(self.shop.train, name, self.root / RECIPES / recipe, reads, results, settings, start, places),
            minutes=minutes,
            training=True,
            intermediate=intermediate,
        )

    # Figures

    def _report(
        self,
        file: str,
        what: str,
        commands: dict[str, list[str]],
        reads: tuple[Path, ...],
        *images: str,
        minutes: float,
    ) -> Step:
        def run() -> Outcome:
            return self.shop.report(file, commands, **self._beside(file))

        sets = self.shop.assets / "evaluation"
        return Step(
            name=f"evaluate-{file}",
            what=what,
            inputs=(*self.shop.base, *reads, sets),
            outputs=(self.shop.results / f"{file}.json", *(self.shop.images / image for image in images)),
            settings={"commands": {label: self.shop.shown(command) for label, command in commands.items()}},
            run=run,
            minutes=minutes,
        )

    def _beside(self, file: str) -> dict[str, Any]:
        """What a file of results has besides reports: label => plain value."""
        if file == "adapters":
            files = {f"nano/{name}": self.shop.control(f"nano/{name}") for name in (*BASE_CONDITIONS, *ADAPTERS)}
            return {"made": {"control": made_of_files(files)}}
        if file != "systems":
            return {}
        told = {system: self._described(self._system(system)) for system in _counts(self.settings.system_steps)}
        told["controlnet"] = self._described(self.shop.control("canny"))
        return {key: {system: one[key] for system, one in told.items()} for key in ("parameters", "gflop", "steps")}

    def _described(self, path: Path) -> dict[str, Any]:
        said = json.loads(self.shop.run(["inspect", str(path), "--base", "nano", "--json"]).printed)
        cost = next(value for name, value in said.items() if name.startswith("GFLOP"))
        gflop = [cost.get(name, 0) for name in ("once for a condition", "each step of each image")]
        steps = made_of_files({"": path})[""].get("steps", 0)
        return {"parameters": said["parameters"], "gflop": gflop, "steps": steps}

    def _evaluations(self) -> list[Step]:
        wanted = self.settings
        few = [] if wanted.sampling_steps == 20 else ["--steps", str(wanted.sampling_steps)]
        base = ["evaluate", "base", "nano", *few]
        canny = ["evaluate", "control", "canny", *_images(wanted.images), *few]
        names = [f"nano/{name}" for name in (*BASE_CONDITIONS, *ADAPTERS)]
        adapters = ["evaluate", "control", *names, *_images(wanted.adapter_images), *few]
        guidance = ["evaluate", "control", "canny", "--sets", "seen", *_images(wanted.guidance_images), *few]
        systems = {
            system: ["evaluate", "control", str(self._system(system)), *_images(wanted.images), *few]
            for system in _counts(wanted.system_steps)
        }
        shipped = (self.shop.control("canny"),)
        sheets = {image: ["--sheet", str(self.shop.images / image)] for image in ("nano.png", "canny.png")}
        return [
            self._report(
                "base", "evaluate the base", {"default": [*base, *sheets["nano.png"]]}, (), "nano.png", minutes=3
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
                "systems",
                "evaluate other systems on canny",
                {**systems, "controlnet": canny},
                (*shipped, *(self._system(system) for system in systems)),
                minutes=6,
            ),
        ]

    def _studies(self) -> list[Step]:
        pairs = self.data / "openmoji-pairs"
        adapters = tuple(self.shop.control(f"nano/{name}") for name in ("base", *BASE_CONDITIONS, *ADAPTERS))
        given = ["--control", "nano/base", "--given", f"openmoji={pairs.relative_to(self.root)}@lineart_given"]
        mode = ("mode=control", "parts=[budgets]", "budgets=[25,100,500]")
        learned = (self.shop.control("nano/base"), self.shop.icons, pairs)
        chosen = self.settings
        return [
            *self._openmoji(pairs),
            self._study(
                "new-condition",
                "new-condition",
                [*given, *_set(("ranks=[2,4,8,32,64]", "pair_counts=[100,1000,5000]", *chosen.new_condition))],
                learned,
                {"figure": "new-condition.png", "images": "new-condition-pictures.png"},
                minutes=400,
            ),
            self._study(
                "new-condition-control",
                "new-condition",
                [*given, *_set((*mode, *chosen.new_condition))],
                learned,
                {},
                minutes=90,
            ),
            self._study("several", "several-conditions", _set(chosen.several_conditions), adapters, {}, minutes=15),
            self._study(
                "community",
                "community-model",
                _set(chosen.community_model),
                (self.shop.control("canny"), self.shop.icons),
                {"images": "community-model.png"},
                minutes=25,
            ),
        ]

    def _openmoji(self, pairs: Path) -> list[Step]:
        package = self.data / "openmoji" / "openmoji-17.0.0.tgz"

        def write() -> Outcome:
            script = self.root / RECIPES / "build_openmoji_pairs.py"
            subprocess.run([sys.executable, str(script), str(package), str(pairs)], cwd=self.root, check=True)
            return Outcome()

        return [
            Step(
                name="openmoji",
                what="the package openmoji from npm",
                outputs=(package,),
                run=partial(_npm_pack, package.parent, "openmoji@17.0.0"),
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

    def _pages(self) -> Step:
        texts = {page: page.read_text(encoding="utf-8") for page in pages(self.root)}
        found = {page: text for page, text in texts.items() if marked(text)}
        staged = {page: self.shop.staged / page.relative_to(self.root) for page in found}

        def run() -> Outcome:
            results, without = Results(self.shop.results), set()
            for page, copy in staged.items():
                text, missing = render(found[page], results, str(page.relative_to(self.root)))
                without |= set(missing)
                write_atomically(copy, partial(Path.write_text, data=text, encoding="utf-8"))
            return Outcome(note=f"not measured yet: {', '.join(sorted(without))}" if without else "")

        made = [*self._evaluations(), *self._studies()]
        results = {path for step in made for path in step.outputs if path.parent == self.shop.results}
        around = {str(page.relative_to(self.root)): without_figures(text) for page, text in found.items()}
        return Step(
            name="pages",
            what="figures of nano in the pages",
            inputs=tuple(sorted(results)),
            outputs=tuple(staged.values()),
            settings={"pages": around, "figures": digest(Path(__file__).with_name("figures.py"))},
            run=run,
            minutes=0.1,
            intermediate=True,
            optional_inputs=True,
        )


_GUIDANCE = (
    *(("balanced", scale, 1.0) for scale in (1.0, 2.0, 3.0)),
    ("balanced", 3.0, 1.5),
    *(("control", scale, 1.0) for scale in (2.0, 3.0, 5.0)),
    *(("control", 3.0, weight) for weight in (0.7, 1.5)),
)
"""Mode, guidance scale and weight of each row of the table in docs/nano.md."""


def _npm_pack(folder: Path, *packages: str) -> Outcome:
    """Download packages into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["npm", "pack", *packages], cwd=folder, check=True, stdout=sys.stderr)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"npm pack {' '.join(packages)} failed ({error}); it needs npm and a registry") from error
    return Outcome()


def _counts(texts: Sequence[str]) -> dict[str, int]:
    """`name=number` texts as a mapping."""
    try:
        return {name: int(number) for name, _, number in (text.partition("=") for text in texts)}
    except ValueError as error:
        raise UserError(f"{', '.join(texts)}: expected name=number") from error


def _images(count: int) -> list[str]:
    return [] if count == 96 else ["--images", str(count)]


def _set(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]
