"""What frozen networks make of pairs, through the cache: latents, hints, embeddings of prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from controlkit.bases.base import Base, network_key
from controlkit.bases.text import Text
from controlkit.conditions import find
from controlkit.conditions.condition import Condition, left_right, no_mirror
from controlkit.controls.control import Control, encode_images
from controlkit.controls.hints import Hint, expand, named
from controlkit.data.cache import Spec, Store
from controlkit.data.cached_rows import CachedRows, Make
from controlkit.data.pair import SOURCE, TARGET, Pair
from controlkit.data.segments import Part, Rows, digests_of
from controlkit.data.sources import Source
from controlkit.errors import UserError
from controlkit.files import sha256_of
from controlkit.images import to_tensor

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class ImageRows:
    """What a network makes of one side of every pair, one tensor each: upright, and mirrored where that is wanted."""

    def __init__(self, upright: CachedRows, mirrored: CachedRows | None = None, *, alone: str | None = None) -> None:
        self.upright = upright
        self.mirrored = mirrored
        self.alone = alone
        """What a tensor is called that is one alone, not one of a mapping."""

    def __len__(self) -> int:
        return len(self.upright)

    def gather(self, chosen: Tensor, flipped: Tensor | None = None) -> Hint:
        """Rows of the pairs `chosen` `[B]`, of the mirrored ones where `flipped` `[B]`; `[B, ...]` on the CPU.

        Named, if that is what the network makes.
        """
        made = _gather(self.upright, chosen)
        if flipped is not None and flipped.any():
            assert self.mirrored is not None
            for name, turned in _gather(self.mirrored, chosen[flipped]).items():
                made[name][flipped] = turned
        if self.alone is None or self.alone not in made:
            return made
        return made[self.alone]


class TextRows:
    """Embeddings of prompts."""

    def __init__(self, rows: CachedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, chosen: Tensor) -> Text:
        """Embeddings of the prompts whose indices are `chosen` `[B]`, on the CPU."""
        return Text(**_gather(self.rows, chosen))


class PairCache:
    """What the frozen networks of a base make of pairs; latents and hints in fp16, embeddings as they are.

    A row is found by the bytes of its image, or by its prompt, so that pairs which several data sets share are
    encoded once, and one image that changed is one row that is made again.

    Args:
        flip: also keep latents and hints of the mirrored pairs.
        check: read every row now and make damaged ones again, for a run that will store the frozen weights in another
            type; otherwise each is checked when it is first read.

    Raises:
        UserError: `flip`, where images of the pairs' condition cannot be mirrored.
    """

    def __init__(self, base: Base, pairs: Sequence[Pair], *, flip: bool = False, check: bool = False) -> None:
        self.base = base
        self.pairs = pairs
        self.flip = flip
        self.check = check
        self._known_keys: dict[str, list[str]] = {}
        known = [find(name) for name in sorted({pair.condition for pair in pairs if pair.condition is not None})]
        for condition in known:
            if flip and condition.mirror_finished is None:
                raise no_mirror(condition.name)
        unusual = [one.name for one in known if _is_unusual(one)]
        self._acts = "".join(f", as {name}" for name in unusual)
        vae = base.vae
        settings = (str(next(vae.parameters()).dtype), str(base.dtype))
        self._vae_key = sha256_of(network_key(vae), repr(settings))

    def content(self) -> str:
        """Hash of the pairs, whatever their order: of every condition image with its image and captions."""
        sides = zip(self._keys(SOURCE), self._keys(TARGET), self.pairs, strict=True)
        return sha256_of(*sorted(sha256_of(source, target, *pair.captions) for source, target, pair in sides))

    @cached_property
    def positions(self) -> dict[str, int]:
        """Caption -> its row in `texts`: those of all pairs, and the empty prompt."""
        distinct = sorted({caption for pair in self.pairs for caption in pair.captions} | {""})
        return {caption: index for index, caption in enumerate(distinct)}

    def latents(self) -> ImageRows:
        """Scaled latents of the images `[N, C, h, w]`."""
        return self._images("latents", TARGET, self._vae_key, lambda x: self.base.encode_image(x * 2 - 1))

    def hints(self, control: Control) -> ImageRows:
        """Hints of a control of which `hint_is_frozen` holds."""
        model = sha256_of(self._vae_key, repr((control.kind, control.hint_settings())))
        return self._images("hints", SOURCE, model, lambda x: encode_images(control, x, self.base))

    def texts(self) -> tuple[TextRows, Tensor, int]:
        """All distinct captions, embedded; the index of each pair's first one `[N]`, and that of the empty prompt.

        `positions` has the index of every caption.
        """
        position, prompts = self.positions, list(self.positions)
        tokenizers = [_tokenizer_key(tokenizer) for tokenizer in self.base.tokenizers]
        settings = (str(self.base.dtype), self.base.size, getattr(self.base, "zero_empty", False))
        model = sha256_of(*(network_key(network) for network in self.base.text_encoders), *tokenizers, repr(settings))

        def embed(indices: Sequence[int]) -> tuple[dict[str, Part], Rows]:
            text = self.base.encode_text([prompts[index] for index in indices])
            return _as_rows(text.named)

        digests = digests_of([sha256_of(prompt) for prompt in prompts])
        rows = self._rows("texts", model, "prompts", digests, embed, "embedding {count} prompts")
        return TextRows(rows), torch.tensor([position[pair.prompt] for pair in self.pairs]), position[""]

    def _images(self, kind: str, side: str, model: str, encode: Callable[[Tensor], Hint]) -> ImageRows:
        size = self.base.size
        acts = self._acts if side == SOURCE else ""
        sources, keys = [getattr(pair, side) for pair in self.pairs], self._keys(side)
        digests = digests_of(keys)

        def rows(mirrored: bool) -> CachedRows:
            def make(indices: Sequence[int]) -> tuple[dict[str, Part], Rows]:
                images = [self.pairs[index].side(side, size, mirrored) for index in indices]
                for index in indices:
                    if _key_of(sources[index]) != keys[index]:
                        raise UserError(f"{sources[index]} has changed since training began; run the same again")
                made = encode(to_tensor(images).to(self.base.device))
                tensors = {kind: made} if isinstance(made, Tensor) else named(expand(made, len(images)))
                return _as_rows({name: _stored(tensor) for name, tensor in tensors.items()})

            transform = f"{size} x {size}, centre, sRGB{acts}" + (", mirrored" if mirrored else "")
            return self._rows(kind, model, transform, digests, make, f"encoding {{count}} pairs ({kind})")

        return ImageRows(rows(False), rows(True) if self.flip else None, alone=kind)

    def _keys(self, side: str) -> list[str]:
        """Hash of that side of every pair; files are read once."""
        if side not in self._known_keys:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                self._known_keys[side] = list(pool.map(_key_of, [getattr(pair, side) for pair in self.pairs]))
        return self._known_keys[side]

    def _rows(self, kind: str, model: str, transform: str, digests: np.ndarray, make: Make, what: str) -> CachedRows:
        store = Store(Spec(kind=kind, model=model, transform=transform), note=Path(self.base.name).name)
        device = self.base.device.type

        def frozen(indices: Sequence[int]) -> tuple[dict[str, Part], Rows]:
            # A damaged row is made again in the middle of a step, which may run under autocast.
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return make(indices)

        # Processes of torchrun and accelerate; they have not spoken to each other yet when objectives are made.
        start = int(os.environ.get("RANK", "0")) / int(os.environ.get("WORLD_SIZE", "1"))
        rows = CachedRows(store, digests, frozen, what=what, start=start)
        if self.check:
            rows.check()
        return rows


def _is_unusual(condition: Condition) -> bool:
    """Whether its finished images are scaled, mirrored or laid over a background as only its name tells."""
    plain = condition.resize == "smooth" and condition.background == Condition.background
    return not plain or condition.mirror_finished is not left_right


def _stored(tensor: Tensor) -> Tensor:
    """On the CPU, floating-point numbers in fp16."""
    return tensor.to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype)


def _key_of(source: Source) -> str:
    return sha256_of(source.read_bytes())


def _tokenizer_key(tokenizer: object) -> str:
    """Hash of what a tokenizer makes of a prompt: its vocabulary, padding and length."""
    vocabulary = sorted(tokenizer.get_vocab().items())  # type: ignore[attr-defined]
    settings = (getattr(tokenizer, "model_max_length", None), str(getattr(tokenizer, "pad_token", None)))
    return sha256_of(repr(vocabulary), repr(settings))


def _as_rows(tensors: dict[str, Tensor]) -> tuple[dict[str, Part], Rows]:
    """Tensors `[B, ...]` as parts of rows and their bytes, whatever their type."""
    parts, rows = {}, {}
    for name, tensor in tensors.items():
        parts[name] = Part(dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape[1:]))
        rows[name] = tensor.detach().cpu().contiguous().reshape(len(tensor), -1).view(torch.uint8).numpy()
    return parts, rows


def _gather(rows: CachedRows, chosen: Tensor) -> dict[str, Tensor]:
    gathered = rows.gather(chosen.numpy())
    return {
        name: torch.from_numpy(gathered[name]).view(_DTYPES[part.dtype]).reshape(len(chosen), *part.shape)
        for name, part in rows.parts.items()
    }
