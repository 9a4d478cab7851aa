"""X/Y sheets: the images of one or two axes as a table with titles, as a PNG and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from controlkit.sampling.axes import labels_of, points_of, stems_of
from controlkit.sampling.file_names import image_name

if TYPE_CHECKING:
    from controlkit.sampling.request import GenerateRequest

_CELL = 384
"""Longest side of an image on a sheet, in pixels."""
_SMALLEST = 128
"""Smaller images are enlarged to this, so that titles fit."""
_GAP = 6
_LINES = 3
"""Most lines of the title of a row or column."""


@dataclass(frozen=True)
class Sheet:
    """One table of images: all positions of `xy` at one combination of `vary` and one seed."""

    name: str
    """Stem of its files."""
    title: str
    """The seed and the values of `vary`."""
    columns: list[str]
    """Titles of the first axis."""
    rows: list[str]
    """Titles of the second axis; one empty title if there is none."""
    cells: list[list[str]]
    """Stems of the image files, by row and column."""

    def to_json(self) -> dict[str, Any]:
        """Titles, and the file of each cell."""
        files = [[f"{cell}.png" for cell in row] for row in self.cells]
        titles = {"title": self.title, "columns": self.columns, "rows": self.rows}
        return {"sheet": f"{self.name}.png", **titles, "images": files}

    def draw(self, images: Mapping[str, Image.Image]) -> Image.Image:
        """The table.

        Args:
            images: stem -> image.
        """
        table = [[_scaled(images[cell]) for cell in row] for row in self.cells]
        width = max(image.width for row in table for image in row)
        height = max(image.height for row in table for image in row)
        size_of_text = max(13, width // 20)
        font = ImageFont.load_default(size=size_of_text)
        line = int(size_of_text * 1.5)
        left = _GAP if not any(self.rows) else min(width, _widest(self.rows, font)) + 2 * _GAP
        rows = [_wrapped(text, left - 2 * _GAP, font) for text in self.rows]
        columns = [_wrapped(text, width, font) for text in self.columns]
        top = line * (1 + max(map(len, columns))) + _GAP
        size = (left + len(self.columns) * (width + _GAP), top + len(table) * (height + _GAP))
        sheet = Image.new("RGB", size, "white")
        pen = ImageDraw.Draw(sheet)

        def write(x: float, y: float, lines: Sequence[str], colour: str = "black") -> None:
            for number, text in enumerate(lines):
                pen.text((x, y + number * line), text, fill=colour, font=font)

        write(_GAP, line // 6, [_cut(self.title, size[0] - 2 * _GAP, font)], "grey")
        for column, lines in enumerate(columns):
            write(left + column * (width + _GAP), line, lines)
        for index, (lines, row) in enumerate(zip(rows, table, strict=True)):
            y = top + index * (height + _GAP)
            write(_GAP, y + (height - line * len(lines)) // 2, lines)
            for column, image in enumerate(row):
                sheet.paste(image, (left + column * (width + _GAP), y))
        return sheet


def sheets_of(request: GenerateRequest) -> list[Sheet]:
    """The sheets of a request; none without `xy`."""
    if not request.xy:
        return []
    points = points_of(request)
    columns, *rest = (labels_of(axis) for axis in request.xy)
    rows = rest[0] if rest else [""]
    several = len({seed for point in points for seed in point.request.seeds}) > 1
    by_place = {point.indices: point for point in points}
    sheets = []
    for place in dict.fromkeys(point.indices[: len(request.vary)] for point in points):
        at = [
            [by_place[(*place, column, row) if rest else (*place, column)] for column in range(len(columns))]
            for row in range(len(rows))
        ]
        labels = [labels_of(axis)[index] for axis, index in zip(request.vary, place, strict=True)]
        stems = [stems_of(axis)[index] for axis, index in zip(request.vary, place, strict=True)]
        for number, seed in enumerate(at[0][0].request.seeds):
            cells = [[image_name(point.name, point.request.seeds[number]) for point in row] for row in at]
            fixed = not any("seed" in axis for axis in request.xy)
            name = "-".join(filter(None, ["xy", *stems, f"seed{seed}" if several and fixed else ""]))
            named = any("seed" in axis for axis in request.vary)
            title = ", ".join([*labels, *([f"seed {seed}"] if fixed and not named else [])])
            sheets.append(Sheet(name, title, columns, rows, cells))
    return sheets


def _scaled(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    target = min(max(longest, _SMALLEST), _CELL)
    if longest == target:
        return image
    size = (max(1, image.width * target // longest), max(1, image.height * target // longest))
    return image.resize(size, Image.Resampling.NEAREST if target > longest else Image.Resampling.LANCZOS)


def _widest(texts: Sequence[str], font: Any) -> int:
    return max((int(font.getlength(text)) + 1 for text in texts), default=0)


def _wrapped(text: str, width: int, font: Any) -> list[str]:
    """`text` in lines of at most `width` pixels; what does not fit on the last one is cut off."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width or len(lines) == _LINES:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_cut(line, width, font) for line in lines]


def _cut(text: str, width: int, font: Any) -> str:
    """`text`, shortened to `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
