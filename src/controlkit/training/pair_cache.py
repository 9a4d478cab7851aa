"""Cached outputs of frozen networks for pairs: latents, hints, text embeddings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from controlkit.bases.base import Base
from controlkit.bases.identity import network_key, tokenizer_key
from controlkit.bases.text import Text
from controlkit.conditions import find
from controlkit.conditions.condition import Condition, left_right, no_mirror
from controlkit.controls.control import Control
from controlkit.controls.hints import Hint, expand, named
from controlkit.controls.inputs import encode_images
from controlkit.data.cache import Spec, Store
from controlkit.data.cached_rows import CachedRows, Make
from controlkit.data.pair import SOURCE, TARGET, Pair
from controlkit.data.segments import Part, Rows, digests_of
from controlkit.data.sources import Source
from controlkit.errors import UserError
from controlkit.files import sha256_of
from controlkit.images import to_tensor
from controlkit.training.ahead import NotAhead, in_data_worker

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
_CENTRE = 0.5
"""`Pair.place` of the centre crop, whose rows have the hash of the image alone."""


class ImageRows:
    """A network's outputs for one side of every pair, and for the flipped images if needed."""

    def __init__(self, unflipped: CachedRows, mirrored: CachedRows | None = None, *, single: str | None = None) -> None:
        self.unflipped = unflipped
        self.mirrored = mirrored
        self.single = single
        """Name of the tensor if the network returns one tensor, not a mapping."""

    def __len__(self) -> int:
        return len(self.unflipped)

    def gather(self, chosen: Tensor, flipped: Tensor | None = None) -> Hint:
        """Rows `[B, ...]` on the CPU of the pairs `chosen` `[B]`, mirrored where `flipped` `[B]`.

        A mapping of tensors, if the network returns one.
        """
        rows = gather_rows(self.unflipped, chosen)
        if flipped is not None and flipped.any():
            assert self.mirrored is not None
            for name, mirrored in gather_rows(self.mirrored, chosen[flipped]).items():
                rows[name][flipped] = mirrored
        if self.single is None or self.single not in rows:
            return rows
        return rows[self.single]


class TextRows:
    """Text embeddings of prompts."""

    def __init__(self, rows: CachedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, chosen: Tensor) -> Text:
        """Embeddings of the prompts whose indices are `chosen` `[B]`, on the CPU."""
        return Text(**gather_rows(self.rows, chosen))


class PairCache:
    """Cache of a base's frozen networks for pairs; latents and hints in fp16, embeddings in their own type.

    The key of a row is the content of its image, or its prompt: pairs in several data sets are encoded once, and a
    changed image is encoded again alone.

    Args:
        prompts: to embed besides the captions of the pairs.
        flip: also cache latents and hints of the mirrored pairs.
        check: verify every row now and recompute damaged ones, for runs that cast the frozen weights afterwards;
            otherwise a row is verified when it is first read.

    Raises:
        UserError: `flip`, if images of the pairs' condition cannot be flipped.
    """

    def __init__(
        self,
        base: Base,
        pairs: Sequence[Pair],
        *,
        prompts: Iterable[str] = (),
        flip: bool = False,
        check: bool = False,
    ) -> None:
        self.base = base
        self.pairs = pairs
        self._prompts = {"", *prompts}
        self.flip = flip
        self.check = check
        self._known_keys: dict[str, list[str]] = {}
        known = [find(name) for name in sorted({pair.condition for pair in pairs if pair.condition is not None})]
        for condition in known:
            if flip and condition.mirror_finished is None:
                raise no_mirror(condition.name)
        unusual = [condition.name for condition in known if _is_unusual(condition)]
        self._transforms = "".join(f", as {name}" for name in unusual)
        vae = base.vae
        settings = (str(next(vae.parameters()).dtype), str(base.dtype))
        self._vae_key = sha256_of(network_key(vae), repr(settings))

    def content(self) -> str:
        """Hash of the pairs (condition image, image and captions), independent of their order."""
        return _content(self.pairs, self._crop_keys(SOURCE), self._crop_keys(TARGET))

    @cached_property
    def positions(self) -> dict[str, int]:
        """Prompt -> its row in `texts`: captions of all pairs, further prompts, and the empty one."""
        distinct = sorted({caption for pair in self.pairs for caption in pair.captions} | self._prompts)
        return {caption: index for index, caption in enumerate(distinct)}

    def latents(self) -> ImageRows:
        """Scaled latents of the images `[N, C, h, w]`."""
        return self._images("latents", TARGET, self._vae_key, lambda x: self.base.encode_image(x * 2 - 1))

    def hints(self, control: Control) -> ImageRows:
        """Hints of a control with `hint_is_frozen`."""
        model = sha256_of(self._vae_key, repr((control.kind, control.hint_settings())))
        return self._images("hints", SOURCE, model, lambda x: encode_images(control, x, self.base))

    def texts(self) -> tuple[TextRows, Tensor, int]:
        """Embeddings of all distinct captions, rows of the pairs' first captions `[N]`, and of the empty prompt.

        `positions` has the row of every caption.
        """
        position, prompts = self.positions, list(self.positions)
        tokenizers = [tokenizer_key(tokenizer) for tokenizer in self.base.tokenizers]
        # Families that have the same text encoder read it in different ways (`text_settings`).
        own = (str(self.base.dtype), self.base.size, getattr(self.base, "zero_empty", False))
        settings = (*own, *self.base.text_settings)
        model = sha256_of(*(network_key(network) for network in self.base.text_encoders), *tokenizers, repr(settings))

        def embed(indices: Sequence[int]) -> tuple[dict[str, Part], Rows]:
            text = self.base.encode_text([prompts[index] for index in indices])
            return as_rows(text.named)

        digests = digests_of([sha256_of(prompt) for prompt in prompts])
        rows = self._rows("texts", model, "prompts", digests, embed, "embedding {count} prompts")
        return TextRows(rows), torch.tensor([position[pair.prompt] for pair in self.pairs]), position[""]

    def _images(self, kind: str, side: str, model: str, encode: Callable[[Tensor], Hint]) -> ImageRows:
        size = self.base.size
        special = self._transforms if side == SOURCE else ""
        sources, keys = [getattr(pair, side) for pair in self.pairs], self._keys(side)
        digests = digests_of(self._crop_keys(side))

        def rows(mirrored: bool) -> CachedRows:
            def make(indices: Sequence[int]) -> tuple[dict[str, Part], Rows]:
                images = [self.pairs[index].side(side, size, mirrored) for index in indices]
                for index in indices:
                    if _key_of(sources[index]) != keys[index]:
                        raise UserError(
                            f"{sources[index]} has changed since training began; run the same command again", "bad-data"
                        )
                encoded = encode(to_tensor(images).to(self.base.device))
                tensors = {kind: encoded} if isinstance(encoded, Tensor) else named(expand(encoded, len(images)))
                return as_rows({name: _stored(tensor) for name, tensor in tensors.items()})

            transform = f"{size} x {size}, centre, sRGB{special}" + (", mirrored" if mirrored else "")
            return self._rows(kind, model, transform, digests, make, f"encoding {{count}} pairs ({kind})")

        return ImageRows(rows(False), rows(True) if self.flip else None, single=kind)

    def image_keys(self) -> list[str]:
        """Hash of the image of every pair, in their order."""
        return self._keys(TARGET)

    def _keys(self, side: str) -> list[str]:
        """Hash of one side of every pair; each file is read once."""
        if side not in self._known_keys:
            self._known_keys[side] = _keys_of([getattr(pair, side) for pair in self.pairs])
        return self._known_keys[side]

    def _crop_keys(self, side: str) -> list[str]:
        """Hash of one side of every pair and of the place where it is cropped."""
        keys = zip(self._keys(side), self.pairs, strict=True)
        return [key if pair.place == _CENTRE else sha256_of(key, repr(pair.place)) for key, pair in keys]

    def _rows(self, kind: str, model: str, transform: str, digests: np.ndarray, make: Make, what: str) -> CachedRows:
        store = Store(Spec(kind=kind, model=model, transform=transform), note=Path(self.base.name).name)
        device = self.base.device.type

        def frozen(indices: Sequence[int]) -> tuple[dict[str, Part], Rows]:
            if in_data_worker():
                raise NotAhead
            # A damaged row is recomputed in the middle of a step, which may run under autocast.
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return make(indices)

        rows = CachedRows(store, digests, frozen, what=what, start=start_of_process())
        if self.check:
            rows.check()
        return rows


def start_of_process() -> float:
    """`CachedRows.start` of this process of a run."""
    # Of torchrun and accelerate; process groups are initialised only after the objective is built.
    return int(os.environ.get("RANK", "0")) / int(os.environ.get("WORLD_SIZE", "1"))


def _is_unusual(condition: Condition) -> bool:
    """Whether its images are scaled, flipped or composited in a way that only its name determines."""
    plain = condition.resize == "smooth" and condition.background == Condition.background
    return not plain or condition.mirror_finished is not left_right


def _stored(tensor: Tensor) -> Tensor:
    """On the CPU, floating-point tensors in fp16."""
    return tensor.to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype)


def _key_of(source: Source) -> str:
    return sha256_of(source.read_bytes())


def _keys_of(sources: Sequence[Source]) -> list[str]:
    """Hash of every file; each is read once."""
    distinct = {id(source): source for source in sources}  # the crops of a pair share theirs
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        keys = dict(zip(distinct, pool.map(_key_of, distinct.values()), strict=True))
    return [keys[id(source)] for source in sources]


def _content(pairs: Sequence[Pair], sources: Sequence[str], targets: Sequence[str]) -> str:
    sides = zip(sources, targets, pairs, strict=True)
    return sha256_of(*sorted(sha256_of(source, target, *pair.captions) for source, target, pair in sides))


def content_of(pairs: Sequence[Pair]) -> str:
    """`PairCache.content` of pairs that have no cache and are not cropped."""
    return _content(pairs, _keys_of([pair.source for pair in pairs]), _keys_of([pair.target for pair in pairs]))


def as_rows(tensors: dict[str, Tensor]) -> tuple[dict[str, Part], Rows]:
    """Tensors `[B, ...]` of any type as the parts of a row and their bytes."""
    parts, rows = {}, {}
    for name, tensor in tensors.items():
        parts[name] = Part(dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape[1:]))
        rows[name] = tensor.detach().cpu().contiguous().reshape(len(tensor), -1).view(torch.uint8).numpy()
    return parts, rows


def gather_rows(rows: CachedRows, chosen: Tensor) -> dict[str, Tensor]:
    """The tensors of the rows `chosen` `[B]`, as `as_rows` took them, on the CPU."""
    gathered = rows.gather(chosen.numpy())
    return {
        name: torch.from_numpy(gathered[name]).view(_DTYPES[part.dtype]).reshape(len(chosen), *part.shape)
        for name, part in rows.parts.items()
    }
