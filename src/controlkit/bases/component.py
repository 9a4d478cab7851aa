"""Components of a base: the networks, tokenizers and the scheduler of a diffusers folder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlkit.files import read_json

Configurations = Mapping[str, Mapping[str, Any]]
"""Component -> its configuration, under the names of a diffusers folder."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One component of a family of bases."""

    name: str
    """Name of its subfolder, such as `text_encoder`."""
    library: str
    """`diffusers` or `transformers`."""
    class_name: str
    """Class in that library."""
    optional: bool = False
    """Whether a base can do without it."""

    @property
    def is_tokenizer(self) -> bool:
        """Whether it has a vocabulary and no weights."""
        return self.name.startswith("tokenizer")

    @property
    def is_scheduler(self) -> bool:
        """Whether it is only a configuration."""
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
        """The class, imported."""
        return getattr(importlib.import_module(self.library), self.class_name)

    def build(self, config: Mapping[str, Any]) -> Any:
        """A network with this configuration and random weights, on torch's default device."""
        kind = self.load_class()
        plain = {key: value for key, value in config.items() if not key.startswith("_")}
        return kind(kind.config_class.from_dict(plain)) if self.library == "transformers" else kind(**plain)


def model_index(folder: Path) -> dict[str, Any]:
    """The content of a diffusers folder's `model_index.json`; empty if it has none.

    Raises:
        UserError: it is not JSON.
    """
    path = folder / "model_index.json"
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def clip_components(*suffixes: str, projected: tuple[str, ...] = ()) -> tuple[Component, ...]:
    """CLIP tokenizers and text encoders.

    Args:
        suffixes: of their names: `""`, `"_2"`.
        projected: the suffixes whose encoder has a projection.
    """
    components: list[Component] = []
    for suffix in suffixes:
        kind = "CLIPTextModelWithProjection" if suffix in projected else "CLIPTextModel"
        components.append(Component(name=f"tokenizer{suffix}", library="transformers", class_name="CLIPTokenizer"))
        components.append(Component(name=f"text_encoder{suffix}", library="transformers", class_name=kind))
    return tuple(components)


VAE = Component(name="vae", library="diffusers", class_name="AutoencoderKL")
"""The autoencoder of every family so far."""
