"""Answers to unknown options: the nearest option, or ours for the spelling of another tool."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches

_OURS = {
    "batch-count": "seeds",
    "cfg": "guidance",
    "cfg-scale": "guidance",
    "checkpoint": "base",
    "ckpt": "base",
    "conditioning-scale": "control",
    "control-image": "control",
    "controlnet": "control",
    "controlnet-conditioning-scale": "control",
    "controlnet-model-name-or-path": "control",
    "denoising-strength": "strength",
    "guidance-scale": "guidance",
    "init": "image",
    "init-image": "image",
    "inpaint-full-res-padding": "only-masked",
    "lr": "learning-rate",
    "mask-image": "mask",
    "max-train-steps": "steps",
    "mixed-precision": "precision",
    "model": "base",
    "n-iter": "seeds",
    "negative": "negative-prompt",
    "network-dim": "rank",
    "num-images": "seeds",
    "num-images-per-prompt": "seeds",
    "num-inference-steps": "steps",
    "output": "out",
    "output-dir": "out",
    "padding-mask-crop": "only-masked",
    "pretrained-model-name-or-path": "base",
    "resolution": "size",
    "sampler-name": "sampler",
    "sampling-method": "sampler",
    "scheduler": "sampler",
    "train-batch-size": "batch-size",
    "train-data-dir": "pairs",
    "use-8bit-adam": "optimizer",
}
"""Options of diffusers' scripts, A1111, ComfyUI and kohya -> ours."""

_FORM = {
    "control": "--control NAME_OR_FILE=IMAGE[@weight[:start-end]][,KEY=VALUE...]",
    "optimizer": "--optimizer adamw8bit",
    "seeds": "--seeds N",
}
"""Options of ours that are not used like theirs."""

_SETTINGS = {
    "adam-beta2": "beta2",
    "adam-weight-decay": "weight_decay",
    "checkpointing-steps": "save_every",
    "dataloader-num-workers": "data_workers",
    "lr-warmup-steps": "warmup_steps",
    "proportion-empty-prompts": "prompt_drop",
    "validation-steps": "preview_every",
}
"""Options of diffusers' scripts -> our settings."""

_ANSWERS = {
    "dataset-name": "pairs are a folder or file here (docs/pairs.md): controlkit adapt PAIRS, or pairs in a recipe",
    "lr-scheduler": "the learning rate falls by a cosine; --set min_lr_rate=1 keeps it constant",
    "num-train-epochs": "training is measured in optimiser steps: use --steps N, or steps in a recipe",
    "resume-from-checkpoint": "run the same command again to resume",
    "resume": "run the same command again to resume",
}

_UNSUPPORTED = {
    "push-to-hub": "uploading while training (see controlkit push)",
}
"""Options of other tools -> what they do, which does not exist here yet."""


def explain(verbs: Mapping[str, argparse.ArgumentParser], words: Sequence[str]) -> str | None:
    """A sentence for each unknown option of a command line; None if there are none.

    Args:
        verbs: the parser of each verb.
        words: the command line after the name of the program.
    """
    place = next((place for place, word in enumerate(words) if word in verbs), None)
    if place is None:
        return None
    options, unknown = words[place + 1 :], list[str]()
    for word in options[: options.index("--")] if "--" in options else options:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in unknown and not _is_known(verbs[words[place]], option):
            unknown.append(option)
    return "; ".join(_answer(verbs, words[place], option) for option in unknown) or None


def _answer(verbs: Mapping[str, argparse.ArgumentParser], verb: str, option: str) -> str:
    name = option.removeprefix("--").replace("_", "-").lower()
    known = _options(verbs[verb])
    if name in _ANSWERS:
        return f"{option}: {_ANSWERS[name]}"
    if name in _UNSUPPORTED:
        return f"{option}: {_UNSUPPORTED[name]} does not exist here yet"
    ours = _OURS.get(name, name)
    if f"--{ours}" in known:
        return f"{option}: use {_FORM.get(ours, f'--{ours}')}"
    if ours in _positional(verbs[verb]):
        return f"{option}: {ours} takes no option: controlkit {verb} {ours.upper()}"
    begun = [each for each in known if each.startswith(f"--{name}")]
    if close := begun[:3] or get_close_matches(f"--{name}", known, n=3, cutoff=0.7):
        return f"there is no option {option}; did you mean {', '.join(close)}?"
    if (settings := _settings_of(verb)) is not None:
        setting = _SETTINGS.get(name, ours.replace("-", "_"))
        if setting in settings:
            return f"there is no option {option}; settings are passed as --set {setting}=VALUE"
        if close := get_close_matches(setting, settings, n=3, cutoff=0.7):
            return f"there is no option {option}; did you mean --set {'=VALUE, --set '.join(close)}=VALUE?"
    elif "--set" in known:
        return f"there is no option {option}; settings are passed as --set {ours.replace('-', '_')}=VALUE"
    if others := [other for other in verbs if f"--{ours}" in _options(verbs[other])]:
        return f"{verb} has no option {option}; {_FORM.get(ours, f'--{ours}')} is an option of {', '.join(others)}"
    return f"there is no option {option} (see controlkit {verb} --help)"


def _settings_of(verb: str) -> list[str] | None:
    """The settings that --set takes, if they are those of recipes."""
    if verb not in ("adapt", "train"):
        return None
    from controlkit.training.recipes import by_source, recipes

    kinds = {"adapt": ["ctrlora-adapter"], "train": list(recipes())}[verb]
    each = [source for kind in kinds for source in (by_source(recipes()[kind]).values() or [recipes()[kind]])]
    return sorted({field.name for kind in each for field in fields(kind)})


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def _positional(parser: argparse.ArgumentParser) -> list[str]:
    return [action.dest for action in parser._actions if not action.option_strings]


def _is_known(parser: argparse.ArgumentParser, option: str) -> bool:
    """Whether argparse takes it. Abbreviations are not taken: an unknown option could be one of another option."""
    return option in _options(parser)
