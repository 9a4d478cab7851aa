"""Icon packages -> emoji-style images with captions, on which nano is trained and evaluated.

The packages are Iconify's JSON sets on npm (an `icons.json` of names and SVG bodies each). `render_sets` renders them
into one file, `IconSets` reads it, and `draw` composes an icon at a random scale and position over a random background
of a named colour, with a caption.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import cv2
import numpy as np
from PIL import Image

from controlkit.errors import UserError
from controlkit.evaluation.sets import Example
from controlkit.files import write_atomically

_NAMED = 4
"""Maximum number of concepts that a note names."""
STYLES = {
    "noto": "iconify-json-noto",
    "fluent": "iconify-json-fluent-emoji-flat",
    "twemoji": "iconify-json-twemoji",
    "emojione": "iconify-json-emojione",
    "openmoji": "iconify-json-openmoji",
}
"""Style in captions -> start of the file name of its npm package."""

UNSEEN_STYLE = "openmoji"
"""Held out of training, as an unseen style for evaluation and because of its licence (CC BY-SA 4.0)."""

TRAINED_STYLES = tuple(style for style in STYLES if style != UNSEEN_STYLE)
"""The other four."""

COLOURS = {
    "red": (214, 48, 49),
    "orange": (245, 146, 27),
    "yellow": (250, 217, 60),
    "green": (60, 160, 75),
    "teal": (40, 170, 170),
    "blue": (52, 104, 214),
    "purple": (132, 66, 176),
    "pink": (247, 150, 190),
    "brown": (121, 78, 48),
    "gray": (140, 140, 140),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
"""Background colours of captions, in RGB."""

DRAWN_SIZE = 64
"""Side of a drawing in pixels."""
LEAST_SCALE = 0.75
"""Minimum side of an icon as a fraction of the drawing's."""

_DRAWABLE_GROUPS = (
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Objects",
    "Activities",
    "Smileys & Emotion",
)
_NOT_DRAWABLE = re.compile(r"oclock|thirty|clock-face|-moon$|family|-suit$|kanji|^\d|medal$")
_VARIANT = re.compile(r"skin-tone|light-skin|dark-skin|flag")


@dataclass(frozen=True, kw_only=True)
class Icon:
    """One icon of one set: concept, style and RGBA image."""

    concept: str
    """Name of what it shows, the same in every set: `red-apple`."""
    style: str
    """Its set, a key of `STYLES`."""
    rgba: np.ndarray
    """`uint8` `[S, S, 4]`, straight alpha."""

    @property
    def held_out(self) -> bool:
        """Whether the concept is held out of training."""
        return is_held_out(self.concept)


def is_held_out(concept: str) -> bool:
    """Whether a concept is held out: a tenth of them, by hash, so that it is the same in every set."""
    return int(hashlib.sha256(concept.encode()).hexdigest(), 16) % 10 == 0


def render_sets(packages: str | Path, out: str | Path, size: int = 96) -> dict[str, int]:
    """Render the icon packages in the folder `packages` (as `npm pack` leaves them) into the file `out`.

    Returns:
        Number of icons of each style, without skin-tone variants, flags and nearly empty icons.

    Raises:
        UserError: a package is missing or the `nano` extra is not installed.
    """
    images: dict[str, np.ndarray] = {}
    names: dict[str, list[str]] = {}
    groups: dict[str, str] = {}
    for style, stem in STYLES.items():
        found = sorted(Path(packages).glob(f"{stem}-[0-9]*.tgz"))
        if not found:
            package = stem.replace("iconify-json-", "@iconify-json/")
            raise UserError(f"no {stem}-*.tgz in {packages}; run there: npm pack {package}", "missing-file")
        icons = _read_member(found[-1], "package/icons.json")
        if style == "noto":
            for group, members in _read_member(found[-1], "package/metadata.json")["categories"].items():
                groups.update(dict.fromkeys(members, group))
        rendered = {name: _render(icons, name, size) for name in icons["icons"] if not _VARIANT.search(name)}
        kept = {name: rgba for name, rgba in rendered.items() if (rgba[..., 3] > 20).mean() > 0.03}
        names[style] = list(kept)
        images[style] = np.stack(list(kept.values()))
    index = json.dumps({"names": names, "groups": groups})
    arrays = {**images, "index": np.frombuffer(index.encode(), dtype=np.uint8)}

    def save(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)

    write_atomically(out, save)
    return {style: len(kept) for style, kept in names.items()}


class IconSets:
    """The rendered icons of one file, by style and concept."""

    def __init__(self, path: str | Path) -> None:
        """Read a file of `render_sets`.

        Raises:
            UserError: it is missing, or not such a file.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                index = json.loads(archive["index"].tobytes())
                self.icons = [
                    Icon(concept=name, style=style, rgba=rgba)
                    for style, names in index["names"].items()
                    for name, rgba in zip(names, archive[style], strict=True)
                ]
                self.groups: dict[str, str] = index["groups"]
        except FileNotFoundError as error:
            raise UserError(
                f"there is no file of rendered icons {path}; step 1 of recipes/nano/README.md makes it", "missing-file"
            ) from error
        except (OSError, KeyError, ValueError, TypeError, EOFError, BadZipFile, zlib.error) as error:
            raise UserError(
                f"{path} is not a file of rendered icons ({error}); step 1 of recipes/nano/README.md makes one",
                "damaged-file",
            ) from error

    def select(
        self,
        *,
        styles: Sequence[str],
        held_out: bool | None = None,
        drawable: bool = False,
        sets: int = 1,
        concepts: Collection[str] | None = None,
    ) -> list[Icon]:
        """Select icons.

        Args:
            styles: their styles.
            held_out: True or False for held-out or other concepts only; None for both.
            drawable: only things that are recognisable at 64 x 64 and can be described (animals, food, objects, places,
                faces), without signs, clock faces and families.
            sets: only concepts in at least so many of the styles.
            concepts: only these.
        """
        chosen = [
            icon
            for icon in self.icons
            if icon.style in styles
            and (concepts is None or icon.concept in concepts)
            and (held_out is None or icon.held_out == held_out)
            and (not drawable or self.is_drawable(icon.concept))
        ]
        appearances: dict[str, set[str]] = defaultdict(set)
        for icon in chosen:
            appearances[icon.concept].add(icon.style)
        return [icon for icon in chosen if len(appearances[icon.concept]) >= sets]

    def is_drawable(self, concept: str) -> bool:
        """Whether `concept` is a thing, by Noto's groups."""
        return self.groups.get(concept) in _DRAWABLE_GROUPS and not _NOT_DRAWABLE.search(concept)


@dataclass(frozen=True, kw_only=True)
class Drawing(Example):
    """An icon over a background; its caption is `red apple, noto style, on a blue background`."""

    concept: str
    style: str
    colour: str


def read_concepts(path: str | Path) -> frozenset[str]:
    """Concepts in a text file, one per line, with spaces or hyphens: `alarm clock` is `alarm-clock`.

    Raises:
        UserError: it is unreadable or empty.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"there is no file of concepts {path}", "missing-file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the concepts in {path} ({error})", "unreadable-file") from error
    names = frozenset("-".join(line.split()) for line in lines if line.strip())
    if not names:
        raise UserError(f"{path} is empty; it must list concepts, one per line", "empty-data")
    return names


def unused_concepts(path: str, names: Collection[str], used: Collection[str], reasons: str) -> list[str]:
    """A note on the names in a file of concepts that are not `used`, if there are any.

    Args:
        reasons: why names may not be.
    """
    unused = sorted(set(names) - set(used))
    if not unused:
        return []
    more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
    named = ", ".join(unused[:_NAMED])
    return [f"{len(unused)} concepts in {path} are not trained on, because they are {reasons}: {named}{more}"]


def caption_of(concept: str, style: str | None = None, colour: str | None = None) -> str:
    """A caption: `red apple, noto style, on a blue background`, without parts that are None."""
    words = concept.replace("-", " ")
    if style:
        words += f", {style} style"
    if colour:
        words += f", on a {colour} background"
    return words


def draw(
    icon: Icon,
    rng: np.random.Generator,
    size: int = DRAWN_SIZE,
    colour: str | None = None,
    jitter: int = 12,
    least_scale: float = LEAST_SCALE,
) -> Drawing:
    """Compose `icon` at a random scale (`least_scale` to 1 of `size`) and position over a background of a named colour.

    Args:
        colour: a key of `COLOURS`; None for a random one.
        jitter: maximum deviation of the background from the named colour per channel, of 255.
    """
    scale = round(size * rng.uniform(least_scale, 1.0))
    left, top = rng.integers(0, size - scale + 1, 2)
    chosen = colour or list(COLOURS)[rng.integers(len(COLOURS))]
    image = background(chosen, rng, size, jitter)
    paste(image, icon.rgba, left, top, scale, scale)
    return Drawing(
        image=to_uint8(image),
        caption=caption_of(icon.concept, icon.style, chosen),
        concept=icon.concept,
        style=icon.style,
        colour=chosen,
    )


def background(colour: str, rng: np.random.Generator, size: int = DRAWN_SIZE, jitter: int = 12) -> np.ndarray:
    """A square of a named colour, `float32 [size, size, 3]` in 0-255, off by at most `jitter` per channel."""
    image = np.empty((size, size, 3), np.float32)
    image[:] = np.clip(np.array(COLOURS[colour]) + rng.integers(-jitter, jitter + 1, 3), 0, 255)
    return image


def paste(image: np.ndarray, rgba: np.ndarray, left: int, top: int, width: int, height: int) -> None:
    """Draw an icon `uint8 [S, T, 4]`, straight alpha, into `image` `float32 [H, W, 3]`, in place."""
    # Premultiplied alpha keeps the colour of transparent pixels out of the edges when resizing.
    premultiplied = rgba.astype(np.float32)
    premultiplied[..., :3] *= premultiplied[..., 3:] / 255
    small = cv2.resize(premultiplied, (width, height), interpolation=cv2.INTER_AREA)
    window = image[top : top + height, left : left + width]
    window *= 1 - small[..., 3:] / 255
    window += small[..., :3]


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Rounded to `uint8`."""
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def background_colour(image: np.ndarray) -> str:
    """The named colour nearest in L*a*b* to the median of the image's outer two pixels."""
    frame = np.concatenate(
        [
            image[:2].reshape(-1, 3),
            image[-2:].reshape(-1, 3),
            image[:, :2].reshape(-1, 3),
            image[:, -2:].reshape(-1, 3),
        ]
    )
    names = list(COLOURS)
    known = _lab(np.array([COLOURS[name] for name in names], np.uint8))
    median = _lab(np.median(frame, axis=0, keepdims=True).astype(np.uint8))
    return names[int(np.linalg.norm(known - median, axis=1).argmin())]


def _read_member(package: Path, member: str) -> dict:
    try:
        with tarfile.open(package) as archive:
            stream = archive.extractfile(member)
            if stream is None:
                raise KeyError(member)
            return json.load(stream)
    except (tarfile.TarError, KeyError, OSError, EOFError, json.JSONDecodeError) as error:
        message = f"{package} is not an Iconify package: cannot read {member} ({error})"
        raise UserError(message, "damaged-file") from error


def render_svg(svg: str, size: int) -> np.ndarray:
    """An SVG document as `uint8` RGBA `[size, size, 4]`.

    Raises:
        UserError: the `nano` extra is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        message = "rendering icons needs resvg_py; run: pip install 'controlkit[nano]'"
        raise UserError(message, "missing-package") from error
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return np.asarray(image if image.size == (size, size) else image.resize((size, size)))


def _render(icons: dict, name: str, size: int) -> np.ndarray:
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        f' viewBox="0 0 {width} {height}" width="{size}" height="{size}">{icon["body"]}</svg>'
    )
    return render_svg(svg, size)


def _lab(colours: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(colours[None].astype(np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
