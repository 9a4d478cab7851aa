"""Seeds: their range, random ones, and lists of them on the command line.

This module imports neither torch nor diffusers.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from controlkit.errors import UserError

MAX_SEED = 2**64 - 1
"""The largest seed of a torch generator, and of ComfyUI."""
RANDOM = -1
"""Stands for a random seed, as in A1111."""
NOISE_BITS = 32
"""torch's generator on the CPU reads this many low bits of a seed, so seeds that differ by 2^32 give the same noise."""
_RANDOM_BELOW = 2**32
"""Random seeds are below this: all give different noise, and every tool accepts them."""
_LONGEST = 100_000
"""Seeds of one range."""

_ITEM = re.compile(r"\s*(?:(-1)|(\d+)(?:\s*-\s*(\d+))?)\s*")


def settled_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """`seeds` with random ones in place of -1.

    Raises:
        UserError: there are none, one repeats, or one is not from -1 to 2^64 - 1.
    """
    if not seeds:
        raise UserError("no seeds; give at least one, such as --seed 1", "missing-setting")
    if any(not RANDOM <= seed <= MAX_SEED for seed in seeds):
        raise UserError(
            f"seeds {list(seeds)}: expected integers from 0 to 2^64 - 1, or -1 for a random one", "out-of-range"
        )
    given = [seed for seed in seeds if seed != RANDOM]
    if len(set(given)) != len(given):
        raise UserError(f"seeds {list(seeds)} repeat; give each once", "contradiction")
    taken, settled = set(given), []
    for seed in seeds:
        if seed == RANDOM:
            while (seed := random_seed()) in taken:
                pass
            taken.add(seed)
        settled.append(seed)
    return tuple(settled)


def random_seed() -> int:
    """A random seed below 2^32."""
    return secrets.randbelow(_RANDOM_BELOW)


def parse_seeds(text: str, option: str) -> tuple[int, ...]:
    """Parse `3,5,9-12`: seeds and ranges, both ends included; -1 is a random one.

    Args:
        option: that of the command line, for errors.

    Raises:
        UserError: it does not have that form.
    """
    seeds: list[int] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise UserError(
                f"{option} {text}: {item!r} is no seed; expected seeds and ranges, such as 7 or 3,5,9-12, or -1 for a"
                " random one",
                "usage",
            )
        random, first, last = match.groups()
        if random is not None:
            seeds.append(RANDOM)
        elif last is None:
            seeds.append(int(first))
        elif not 0 <= int(last) - int(first) < _LONGEST:
            raise UserError(
                f"{option} {text}: the range {item} must ascend and have at most {_LONGEST} seeds", "out-of-range"
            )
        else:
            seeds.extend(range(int(first), int(last) + 1))
    return tuple(seeds)


def seeds_of_options(seed: str | None, seeds: str | None, before: Sequence[int] = (0,)) -> tuple[int, ...] | None:
    """Seeds from `--seed` and `--seeds`; None if neither is given.

    Args:
        seed: `--seed`: the first of consecutive seeds, or a list (`parse_seeds`).
        seeds: `--seeds`: how many, or a list.
        before: the seeds to start from, or to repeat in number, if only one of the options is given.

    Raises:
        UserError: an option has another form, or both list seeds.
    """
    if seed is None and seeds is None:
        return None
    count = int(seeds) if seeds is not None and seeds.strip().isdecimal() else None
    if count is not None and not 1 <= count <= _LONGEST:
        raise UserError(f"--seeds {count}: expected 1 to {_LONGEST} images, or a list such as 3,5,9-12", "out-of-range")
    listed = parse_seeds(seeds, "--seeds") if seeds is not None and count is None else None
    first = None if seed is None else parse_seeds(seed, "--seed")
    if listed is not None:
        if first is not None:
            raise UserError(f"--seed {seed} and --seeds {seeds} both list seeds; leave one out", "contradiction")
        return listed
    if first is not None and len(first) > 1:
        if count is not None:
            raise UserError(
                f"--seed {seed} lists the seeds, so --seeds {seeds} has no use; leave it out", "contradiction"
            )
        return first
    start = before[0] if first is None else first[0]
    number = len(before) if count is None else count
    start = random_seed() if start == RANDOM else start
    if start + number - 1 > MAX_SEED:
        raise UserError(f"{number} seeds from {start} exceed 2^64 - 1; start lower", "out-of-range")
    return tuple(range(start, start + number))


def same_noise(seeds: Sequence[int]) -> list[list[int]]:
    """Groups of seeds that give the same noise, as they differ above their lowest 32 bits only."""
    groups: dict[int, list[int]] = {}
    for seed in seeds:
        groups.setdefault(seed % 2**NOISE_BITS, []).append(seed)
    return [group for group in groups.values() if len(group) > 1]
