"""Residuals: tensors that controls add at injection sites of a base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor


class Residuals(Mapping[str, Tensor]):
    """Additions to a base, by injection site (`Base.sites`).

    Each has the shape of what it is added to, such as `[B, C, H, W]`; `B` may be 1, which broadcasts over the batch.
    Sites that are absent get nothing. Sites of one family are numbered from the outermost in: `skip.0`, `skip.1`, ...

    Args:
        tensors: site -> residual.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._tensors = dict(tensors or {})

    @classmethod
    def numbered(cls, family: str, tensors: Sequence[Tensor], **others: Tensor) -> Residuals:
        """`FAMILY.0`, `FAMILY.1`, ... and `others` by name."""
        return cls({**{f"{family}.{place}": tensor for place, tensor in enumerate(tensors)}, **others})

    def __getitem__(self, site: str) -> Tensor:
        return self._tensors[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        """Number of sites."""
        return len(self._tensors)

    @property
    def batch(self) -> int:
        """The largest batch size of the residuals; 0 without residuals."""
        return max((len(tensor) for tensor in self._tensors.values()), default=0)

    def family(self, name: str) -> tuple[Tensor, ...]:
        """The residuals of a numbered family, in order, up to the first gap."""
        found: list[Tensor] = []
        while (site := f"{name}.{len(found)}") in self._tensors:
            found.append(self._tensors[site])
        return tuple(found)

    def scaled(self, weight: float | Sequence[float]) -> Residuals:
        """All residuals times one weight, or each times its own, in order.

        Raises:
            ValueError: the numbers of weights and residuals differ.
        """
        if isinstance(weight, (int, float)):
            return self.map(lambda tensor: tensor * weight)
        weights = list(weight)
        if len(weights) != len(self):
            raise ValueError(f"got {len(weights)} weights for {len(self)} residuals: {', '.join(self)}")
        return Residuals({site: self[site] * factor for site, factor in zip(self, weights, strict=True)})

    def __add__(self, other: Residuals) -> Residuals:
        total = dict(self._tensors)
        for site, tensor in other.items():
            total[site] = total[site] + tensor if site in total else tensor
        return Residuals(total)

    def tensors(self) -> tuple[Tensor, ...]:
        """All residuals, in order."""
        return tuple(self._tensors.values())

    def rows(self, first: int, last: int) -> Residuals:
        """Batch rows `first` to `last` (exclusive)."""
        return self.map(lambda tensor: tensor[first:last])

    def map(self, change: Callable[[Tensor], Tensor]) -> Residuals:
        """`change` applied to each tensor."""
        return Residuals({site: change(tensor) for site, tensor in self._tensors.items()})
