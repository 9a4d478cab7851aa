"""The components of a base: the networks, tokenizers and the scheduler of a diffusers folder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Configurations = Mapping[str, Mapping[str, Any]]
"""Component -> its configuration, under the names of a diffusers folder."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One component of a family of bases."""

    name: str
    """Of its folder, such as `text_encoder`."""
    library: str
    """`diffusers` or `transformers`."""
    class_name: str
    """Of the library."""
    optional: bool = False
    """Whether a base may lack it."""

    @property
    def is_tokenizer(self) -> bool:
        """Whether it has a vocabulary and no weights."""
        return self.name.startswith("tokenizer")

    @property
    def is_scheduler(self) -> bool:
        """Whether it is a configuration alone."""
        return self.name == "scheduler"

    @property
    def is_network(self) -> bool:
        """Whether it has weights."""
        return not self.is_tokenizer and not self.is_scheduler

    @property
    def config_file(self) -> str:
        """Path of its configuration in a diffusers folder."""
        return f"{self.name}/scheduler_config.json" if self.is_scheduler else f"{self.name}/config.json"

    def load_class(self) -> Any:
        """Its class."""
        return getattr(importlib.import_module(self.library), self.class_name)

    def build(self, config: Mapping[str, Any]) -> Any:
        """A network of this configuration, with fresh weights, on torch's default device."""
        kind = self.load_class()
        plain = {key: value for key, value in config.items() if not key.startswith("_")}
        return kind(kind.config_class.from_dict(plain)) if self.library == "transformers" else kind(**plain)


def clip_components(*numbers: str, projected: tuple[str, ...] = ()) -> tuple[Component, ...]:
    """CLIP's tokenizers and text encoders.

    Args:
        numbers: what follows their names: `""`, `"_2"`.
        projected: those of `numbers` whose encoder has a projection.
    """
    made: list[Component] = []
    for number in numbers:
        kind = "CLIPTextModelWithProjection" if number in projected else "CLIPTextModel"
        made.append(Component(name=f"tokenizer{number}", library="transformers", class_name="CLIPTokenizer"))
        made.append(Component(name=f"text_encoder{number}", library="transformers", class_name=kind))
    return tuple(made)


VAE = Component(name="vae", library="diffusers", class_name="AutoencoderKL")
"""The autoencoder of every family so far."""
