"""Learned models: what a condition needs, where its weights are looked for, and loading them once.

Weights are looked for, in this order:

1. in the folder that the condition's parameter `model` names (it may also name another model of the hub);
2. in `$CONTROLKIT_MODELS/OWNER/NAME`, if that variable is set;
3. in the Hugging Face hub's cache, without asking the network;
4. on the hub, which downloads them into that cache. `HF_HUB_OFFLINE=1` forbids this step.

Nothing is loaded before a condition is called, and then once for each folder and device. The device is the first GPU,
or the one that `CONTROLKIT_CONDITION_DEVICE` names (`cpu`, `cuda:1`).
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.errors import UserError
from controlkit.files import read_json

if TYPE_CHECKING:
    import torch

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SETTINGS_AND_WEIGHTS = ("*.json", "*.txt", "*.safetensors")
_LOADED: dict[tuple[str, str, str], Any] = {}
_LOCK = threading.RLock()


@dataclass(frozen=True, kw_only=True)
class LearnedModel:
    """A model with weights, and under which terms it may be used."""

    hub: str
    """Where its weights are on the Hugging Face hub: `owner/name`. Without a slash: the Python package with them."""
    licence: str
    """The licence of the weights."""
    commercial: bool
    """Whether that licence allows commercial use."""
    extra: str | None = None
    """What has to be installed beside the core: `annotators` means `pip install 'controlkit[annotators]'`."""
    files: tuple[str, ...] = ()
    """The files that are needed; none for a transformers folder (settings and safetensors)."""
    companions: tuple[LearnedModel, ...] = ()
    """Other models that are needed with it, such as a detector of people."""

    @property
    def download(self) -> str:
        """The shell command that brings the weights here."""
        return " ".join(("hf download", self.hub, *self.files)) if "/" in self.hub else str(self.install)

    @property
    def install(self) -> str | None:
        """The shell command that installs what it needs beside the core, or None."""
        packages = [f"controlkit[{self.extra}]"] if self.extra else []
        packages += [] if "/" in self.hub else [self.hub]
        return " ".join(("pip install", *(f"'{name}'" for name in packages))) if packages else None

    @property
    def terms(self) -> str:
        """The licence, with a warning where it forbids commercial use."""
        return self.licence if self.commercial else f"{self.licence}: no commercial use"

    def __str__(self) -> str:
        own = f"{self.hub} ({self.terms})" + (f", extra {self.extra}" if self.extra else "")
        return "; ".join((own, *map(str, self.companions)))

    def as_json(self) -> dict[str, Any]:
        """What a program wants to know before it uses the condition."""
        return {
            "model": self.hub,
            "licence": self.licence,
            "commercial_use": self.commercial,
            "extra": self.extra,
            "files": list(self.files),
            "download": self.download,
            "with": [other.as_json() for other in self.companions],
        }


def find_folder(condition: str, model: LearnedModel, given: str | None = None, parameter: str = "model") -> Path:
    """The folder that holds the weights of `model`; see the head of this file for where they are looked for.

    Args:
        condition: whose name an error gives.
        given: the value of the condition's `parameter`: a folder, another model of the hub, or None.

    Raises:
        UserError: they are in none of the places and cannot be downloaded.
    """
    hub = model.hub
    if given is not None:
        folder = Path(str(given)).expanduser()
        if folder.is_dir():
            if not _complete(folder, model):
                raise UserError(
                    f"{condition}: the folder {folder} holds no {_expected(model)}; give {parameter}=FOLDER"
                )
            return folder
        if not _HUB_NAME.fullmatch(str(given)):
            raise UserError(
                f"{condition}: there is no folder {given}; give {parameter}= a folder with the weights, or a model of"
                f" the hub such as {model.hub}"
            )
        hub = str(given)
    shelf = os.environ.get("CONTROLKIT_MODELS")
    if shelf and _complete(Path(shelf).expanduser() / hub, model):
        return Path(shelf).expanduser() / hub
    reason = "they are not in the hub's cache"
    for offline in (True, False):
        try:
            folder = _snapshot(hub, model, offline)
        except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
            reason = _reason(hub, error)
        else:
            if _complete(folder, model):
                return folder
            reason = f"it holds no {_expected(model)}"
    own = f"{hub} ({model.terms})" if hub == model.hub else f"{hub} (given as {parameter}=)"
    files = "".join(f" {name}" for name in model.files)
    raise UserError(
        f"{condition} needs the weights of {own}, which are not on this machine and cannot be fetched ({reason}): run"
        f" `hf download {hub}{files}`, or put them into $CONTROLKIT_MODELS/{hub}, or give {parameter}=FOLDER"
    )


def _snapshot(hub: str, model: LearnedModel, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    if model.files:
        return Path(snapshot_download(hub, allow_patterns=list(model.files), local_files_only=offline))
    folder = Path(snapshot_download(hub, allow_patterns=list(_SETTINGS_AND_WEIGHTS), local_files_only=offline))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(hub, allow_patterns=["*.json", "*.txt", "*.bin"], local_files_only=offline))
    return folder


def _complete(folder: Path, model: LearnedModel) -> bool:
    if model.files:
        return all((folder / name).is_file() for name in model.files)
    return (folder / "config.json").is_file() and any(any(folder.glob(kind)) for kind in ("*.safetensors", "*.bin"))


def _expected(model: LearnedModel) -> str:
    return " and ".join(model.files) if model.files else "config.json with weights (*.safetensors)"


def _reason(hub: str, error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids the network"
    if isinstance(error, GatedRepoError):
        return f"its owner wants you to accept the terms first, at https://huggingface.co/{hub}"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub knows no such model"
    return _first_line(error) or "the hub cannot be reached"


def device() -> torch.device:
    """Where learned conditions are computed.

    Raises:
        UserError: CONTROLKIT_CONDITION_DEVICE names no device of this machine.
    """
    import torch

    named = os.environ.get("CONTROLKIT_CONDITION_DEVICE")
    if not named:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=named)
        return torch.device(named)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"CONTROLKIT_CONDITION_DEVICE={named} is no device of this machine; use cpu or cuda") from error


def load_once(kind: str, folder: Path, load: Callable[[Path, torch.device], Any]) -> Any:
    """What `load(folder, device)` gives, made at the first call for this kind, folder and device and then kept."""
    where = device()
    key = (kind, str(folder.resolve()), str(where))
    with _LOCK:
        if key not in _LOADED:
            _LOADED[key] = load(folder, where)
        return _LOADED[key]


def unload_models() -> None:
    """Let go of every loaded model, and of its memory."""
    with _LOCK:
        _LOADED.clear()


def model_type(condition: str, folder: Path, kinds: Sequence[str]) -> str:
    """The `model_type` that a transformers folder gives itself.

    Raises:
        UserError: it is none of `kinds`, those that the condition can read.
    """
    found = read_json(folder / "config.json").get("model_type")
    if found not in kinds:
        raise UserError(f"{condition} reads models of the type {', '.join(kinds)}; {folder} holds {found}")
    return str(found)


def load_transformers(
    condition: str, folder: Path, architecture: str, kinds: Sequence[str], *, unread: Sequence[str] = ()
) -> Any:
    """The model in a transformers folder, in float32, ready to be asked; loaded once.

    Args:
        architecture: the class of transformers that reads it, such as `AutoModelForDepthEstimation`.
        kinds: the `model_type`s that the condition can read.
        unread: patterns of parameters that the network has but never uses, which files may leave out.

    Raises:
        UserError: the folder holds another kind of model, or its weights are torn or not complete.
    """
    model_type(condition, folder, kinds)

    def load(folder: Path, where: torch.device) -> Any:
        import torch
        import transformers

        try:
            network, report = getattr(transformers, architecture).from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
        except ImportError as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{condition}: transformers needs one more package for it ({reason});"
                " run: pip install 'controlkit[annotators]'"
            ) from error
        except Exception as error:  # whatever its many loaders raise for settings and weights that do not fit
            raise UserError(
                f"{condition}: the model in {folder} cannot be loaded ({_first_line(error)}); download it again"
            ) from error
        _refuse_missing(condition, folder, report["missing_keys"], unread)
        return network.eval().requires_grad_(False).to(where)

    return load_once(architecture, folder, load)


def load_state(condition: str, path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors in `path`, a safetensors or a `.pth` file that holds nothing but tensors.

    Raises:
        UserError: it cannot be read as such.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torn files make torch raise anything from EOFError to RuntimeError
        raise UserError(f"{condition}: {path} cannot be read ({_first_line(error)}); download it again") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{condition}: {path} holds no table of tensors; download it again")
    return state


def load_network(condition: str, path: Path, build: Callable[[], torch.nn.Module]) -> Any:
    """The network that `build` makes with the weights in `path`, ready to be asked; loaded once.

    Raises:
        UserError: the file cannot be read or its tensors are not those of the network.
    """

    def load(path: Path, where: torch.device) -> Any:
        state = load_state(condition, path)
        network = build()
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"{condition}: {path} does not hold the weights of {type(network).__name__}"
                f" ({_first_line(error)}); download it again"
            ) from error
        return network.eval().requires_grad_(False).to(where)

    return load_once(build.__qualname__, path, load)


def import_extra(condition: str, model: LearnedModel, module: str) -> Any:
    """The Python module that an optional extra installs.

    Raises:
        UserError: it is not installed, or does not load on this machine.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # torchvision of another build raises RuntimeError and AttributeError on import
        state = "is not installed" if isinstance(error, ModuleNotFoundError) else "cannot be loaded"
        raise UserError(
            f"{condition} uses the model {model.hub} ({model.terms}) through {module.partition('.')[0]}, which {state}"
            f" ({_first_line(error)}): run `{model.install}`"
        ) from error


def _refuse_missing(condition: str, folder: Path, missing: Sequence[str], unread: Sequence[str]) -> None:
    absent = sorted(name for name in missing if not any(re.search(pattern, name) for pattern in unread))
    if absent:
        raise UserError(
            f"{condition}: the weights in {folder} are not complete: {len(absent)} are missing, {absent[0]} first;"
            " download the model again"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".:") if lines else type(error).__name__
