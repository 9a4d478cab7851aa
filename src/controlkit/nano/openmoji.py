"""Pairs of OpenMoji's line art and its coloured emoji, as an example of hand-drawn conditions.

The npm package `openmoji` (CC BY-SA 4.0) has each emoji as black line art and in colour under one file name.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from controlkit.errors import UserError
from controlkit.nano.icons import Icon, caption_of, draw, render_svg

_GROUPS = {
    "activities",
    "animals-nature",
    "extras-openmoji",
    "food-drink",
    "objects",
    "smileys-emotion",
    "travel-places",
}


def openmoji_pairs(
    package: str | Path, count: int, size: int = 64, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """`(line art, image, caption)` of `count` emoji in random order, both `uint8 [size, size, 3]`.

    The line art is black on white; the image has the same scale and position over a background of a named colour, which
    is in the caption but not in the line art.

    Raises:
        UserError: the file is not OpenMoji's npm package, or has fewer emoji.
    """
    try:
        with tarfile.open(package) as archive:
            members = {member.name: member for member in archive.getmembers()}

            def read(name: str) -> bytes:
                stream = archive.extractfile(members[f"package/{name}"])
                assert stream is not None
                return stream.read()

            listed = [
                entry
                for entry in json.loads(read("data/openmoji.json"))
                if entry["group"] in _GROUPS
                and not entry["skintone"]
                and all(f"package/{kind}/svg/{entry['hexcode']}.svg" in members for kind in ("black", "color"))
            ]
            if len(listed) < count:
                raise UserError(
                    f"{package} has {len(listed)} emoji of these groups; {count} were requested", "empty-data"
                )
            order = np.random.default_rng(seed).permutation(len(listed))[:count]
            for number in order:
                entry = listed[number]
                lines, image = (
                    Icon(
                        concept=entry["annotation"],
                        style="openmoji",
                        rgba=render_svg(read(f"{kind}/svg/{entry['hexcode']}.svg").decode("utf-8"), 2 * size),
                    )
                    for kind in ("black", "color")
                )
                purpose = (seed, int(number), 11)
                target = draw(image, np.random.default_rng(purpose), size)
                source = draw(lines, np.random.default_rng(purpose), size, colour="white", jitter=0)
                yield source.image, target.image, caption_of(entry["annotation"], None, target.colour)
    except (tarfile.TarError, KeyError, OSError, EOFError, json.JSONDecodeError) as error:
        message = f"{package} is not OpenMoji's npm package ({error}); run: npm pack openmoji"
        raise UserError(message, "damaged-file") from error
