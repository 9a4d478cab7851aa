"""`Family`: what is known of a kind of model before one is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from controlkit.bases.component import Component, Configurations


class Family(ABC):
    """The parts of a family's models, the models that are known, and how folders and files are recognised."""

    components: ClassVar[tuple[Component, ...]]
    """The parts of the family's diffusers folder, in order; the last network is the denoiser, the others encode text or
    images."""
    known: ClassVar[Mapping[str, Configurations]]
    """Name of a well-known model -> its configurations: enough to count its parameters without a download."""
    required_settings: ClassVar[Mapping[str, tuple[str, ...]]]
    """Network -> settings that its configuration must have."""
    pipeline: ClassVar[str]
    """Class name of its diffusers pipeline."""
    lora_loader: ClassVar[str | None] = None
    """Class of `diffusers.loaders` that maps other tools' names of layers of LoRAs, for a transformer."""
    lora_names: ClassVar[str] = ""
    """Pattern of the beginnings of the names that it maps."""
    index_entries: ClassVar[Mapping[str, Any]] = {}
    """Entries of its `model_index.json` besides the components."""

    @classmethod
    def denoiser_component(cls) -> Component:
        """The component of the denoising network."""
        return [component for component in cls.components if component.is_network][-1]

    @classmethod
    def settings_in(cls, folder: Path) -> dict[str, Any]:
        """Further constructor arguments, read from a diffusers folder."""
        return {}

    @classmethod
    def is_folder_of(cls, folder: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether these configurations of a diffusers folder belong to this family, judged by its denoiser."""
        denoiser = cls.denoiser_component()
        return (
            denoiser.name in folder
            and folder[denoiser.name].get("_class_name", denoiser.class_name) == denoiser.class_name
        )

    @classmethod
    @abstractmethod
    def recognise(cls, shapes: Mapping[str, tuple[int, ...]], name: str) -> str | None:
        """The entry of `known` that a single file in the original format matches; None if it is of another family.

        Args:
            shapes: name -> shape of its tensors.
            name: of the file, for errors.

        Raises:
            UserError: it is of this family but incomplete.
        """

    @classmethod
    def configurations_of_file(
        cls, known: Configurations, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]
    ) -> tuple[Configurations, list[str]]:
        """The `known` configurations adapted to a single file, without components that it lacks; and notes for the
        user, each to follow the file's name."""
        return known, []

    @classmethod
    def settings_of_file(cls, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """Settings of the denoiser that the shapes of a single file determine, to compare with the folder beside it."""
        return {}

    @classmethod
    def lora_of(cls, layer: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a layer of a LoRA under diffusers' names, as `lora_loader` made them, corrected.

        Args:
            layer: as the file calls it.
        """
        return dict(tensors)

    @classmethod
    @abstractmethod
    def tokenizer_for(cls, component: Component, configurations: Configurations) -> Any:
        """The tokenizer of single files and well-known models.

        Raises:
            UserError: it does not ship with controlkit.
        """
