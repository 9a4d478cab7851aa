"""The steps that make weights: icons, the base, its controls and adapters, and other systems to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from making import (
    ADAPTERS,
    BASE_CONDITIONS,
    FURTHER,
    ICON_PACKAGES,
    RECIPES,
    SYSTEMS,
    MakeSettings,
    counts,
    npm_pack,
    system_file,
    system_log,
)
from steps import Outcome, Step
from workshop import ASSETS, NETWORKS, Workshop, assemble_base, parts_of


class TrainingSteps:
    """Steps that make weights.

    Args:
        base: `shipped`, `scratch`, `further`, or a path of weights.
    """

    def __init__(self, shop: Workshop, settings: MakeSettings, base: str) -> None:
        self.shop = shop
        self.settings = settings
        self.base = base
        self.root = shop.root

    def steps(self) -> list[Step]:
        """All of them, in order."""
        return [*self._icons(), *self._base(), *self._controls(), *self._adapters(), *self._systems()]

    # Data

    def _icons(self) -> list[Step]:
        from controlkit.nano.icons import render_sets

        packages = self.root / "data" / "icons"

        def fetch() -> Outcome:
            return npm_pack(packages, *ICON_PACKAGES)

        def draw() -> Outcome:
            render_sets(str(packages), str(self.shop.icons))
            return Outcome()

        return [
            Step(
                name="packages",
                what="icon packages from npm",
                outputs=(packages,),
                settings={"packages": ICON_PACKAGES},
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
                settings=(f"autoencoder={autoencoder.relative_to(self.root)}",),
                minutes=186,
            ),
            self._concepts(made, (f"start={first.relative_to(self.root)}",), (first,)),
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
                minutes=116,
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
        new, further = (counts(steps) for steps in (self.settings.adapter_steps, self.settings.further_steps))
        return [
            self._pairs("pairs", "pairs for the new adapters", tuple(ADAPTERS.values())),
            *(
                self._adapter(name, ADAPTERS[name], steps, self.shop.control(f"nano/{name}"), intermediate=False)
                for name, steps in new.items()
            ),
            self._pairs("pairs-further", "pairs for adapters that do not ship", FURTHER),
            *(
                self._adapter(name, name, steps, system_file(self.shop, name), intermediate=True)
                for name, steps in further.items()
            ),
        ]

    def _pairs(self, name: str, what: str, conditions: Sequence[str]) -> Step:
        folder = self.shop.made / "pairs"

        def write() -> Outcome:
            from controlkit.conditions import find
            from controlkit.data.pairs import write_pairs
            from controlkit.nano.icons import IconSets
            from controlkit.studies.new_condition import icon_pairs

            sets = IconSets(str(self.shop.icons))
            for condition in conditions:
                write_pairs(folder / condition, icon_pairs(sets, find(condition), self.settings.pairs))
            return Outcome()

        return Step(
            name=name,
            what=what,
            inputs=(self.shop.icons,),
            outputs=tuple(folder / condition for condition in conditions),
            settings={"pairs": self.settings.pairs},
            run=write,
            intermediate=True,
        )

    def _adapter(self, name: str, condition: str, steps: int, file: Path, *, intermediate: bool) -> Step:
        pairs = self.shop.made / "pairs" / condition
        return self._training(
            f"adapter-{name}",
            "ctrlora-adapter.yaml",
            (*self.shop.base, self.shop.control("nano/base"), pairs),
            {f"{name}.safetensors": file},
            settings=(
                f"pairs={pairs.relative_to(self.root)}",
                f"condition={condition}",
                f"name={name}",
                f"steps={steps}",
            ),
            places=("ctrlora", "nano"),
            minutes=4 * steps / 500,
            intermediate=intermediate,
        )

    def _systems(self) -> list[Step]:
        return [
            self._training(
                f"system-{system}",
                "systems.yaml",
                (*self.shop.base, self.shop.icons),
                {"canny.safetensors": system_file(self.shop, system), "log.jsonl": system_log(self.shop, system)},
                settings=(*SYSTEMS[system], f"steps={self.settings.systems_steps}"),
                minutes=self.settings.systems_steps / 100,
            )
            for system in self.settings.systems
        ] + [
            *(
                self._training(
                    f"system-{name}",
                    f"{name}.yaml",
                    (*self.shop.base, self.shop.icons),
                    {f"{file}.safetensors": system_file(self.shop, name)},
                    settings=(f"steps={steps}",),
                    minutes=steps / steps_a_minute,
                )
                for name, file, steps, steps_a_minute in (
                    ("uni-controlnet-local", "local", self.settings.local_steps, 47),
                    ("uni-controlnet-global", "global", self.settings.global_steps, 100),
                    ("controlnet-union", "union", self.settings.union_steps, 100),
                )
            ),
            *(
                self._training(
                    f"system-{name}",
                    "unicontrol.yaml",
                    (*self.shop.base, self.shop.icons),
                    {"unicontrol.safetensors": system_file(self.shop, name)},
                    settings=(*options, f"steps={self.settings.unicontrol_steps}"),
                    minutes=self.settings.unicontrol_steps / 60,
                )
                for name, options in (("unicontrol", ()), ("unicontrol-frozen", ("freeze_hypernet=true",)))
            ),
            self._training(
                "system-gligen",
                "gligen.yaml",
                (*self.shop.base, self.shop.icons, self.root / RECIPES / "concepts.txt"),
                {"boxes.safetensors": system_file(self.shop, "gligen")},
                settings=(f"steps={self.settings.gligen_steps}",),
                minutes=self.settings.gligen_steps / 51,
            ),
        ]

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
            settings={"settings": list(settings)},
            run=partial(self.shop.train, name, self.root / RECIPES / recipe, reads, results, settings, start, places),
            minutes=minutes,
            training=True,
            starts=start is not None,
            intermediate=intermediate,
        )
