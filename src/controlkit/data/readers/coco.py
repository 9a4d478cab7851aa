"""COCO 2017: images, their first caption, and annotated objects for the conditions `bbox` and `segments`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlkit.data.readers.columns import captions_of
from controlkit.data.readers.listing import Listing, Record
from controlkit.data.sources import ComputedCondition, Source
from controlkit.errors import UserError, reason_of
from controlkit.files import read_json


@dataclass(frozen=True, kw_only=True)
class CocoImage:
    """One image of COCO with its annotations."""

    path: Path
    folder: Path
    """The folder of all images."""
    caption: str | None
    """Its first non-empty caption; None without captions."""
    objects: tuple[Mapping[str, Any], ...] | None
    """Its annotated objects; None if the files annotate no objects at all."""
    size: tuple[float, float]
    """Width and height that object coordinates refer to."""


def coco_images(annotations: Sequence[Path], images: Path | None = None) -> list[CocoImage]:
    """The images of one or more COCO annotation files (captions, instances), sorted by file name.

    Args:
        images: their folder; None: search near the annotations.

    Raises:
        UserError: a file is not a COCO annotation file, or the folder is not found.
    """
    listed: dict[str, dict[str, Any]] = {}
    captions: dict[str, str] = {}
    objects: dict[str, list[Mapping[str, Any]]] = {}
    with_objects = False
    for path in annotations:
        value = read_json(path)
        try:
            names = {entry["id"]: str(entry["file_name"]) for entry in value["images"]}
            listed |= {str(entry["file_name"]): entry for entry in value["images"]}
            for entry in sorted(value["annotations"], key=lambda entry: entry["id"]):
                name = names[entry["image_id"]]
                if "caption" in entry:
                    text = next(filter(str.strip, captions_of(entry["caption"])), "")
                    captions[name] = captions.get(name) or " ".join(text.split())
                else:
                    with_objects = True
                    keys = ("category_id", "bbox", "segmentation")
                    objects.setdefault(name, []).append({key: entry[key] for key in keys if key in entry})
        except UserError as error:
            raise UserError(f"{path}: cannot read the caption of an image: {error}", "bad-data") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a COCO annotation file ({reason_of(error)})", "bad-data") from error
    if not listed:
        raise UserError(f"{', '.join(map(str, annotations))} lists no images", "empty-data")
    try:
        sizes = {
            name: (float(entry.get("width") or 0), float(entry.get("height") or 0)) for name, entry in listed.items()
        }
    except (TypeError, ValueError) as error:
        raise UserError(f"{annotations[0]}: invalid width or height ({reason_of(error)})", "bad-data") from error
    folder = images or _images_of(annotations[0], next(iter(listed)))
    return [
        CocoImage(
            path=folder / name,
            folder=folder,
            caption=captions.get(name),
            objects=tuple(objects.get(name, ())) if with_objects else None,
            size=sizes[name],
        )
        for name in sorted(listed)
    ]


def read_coco(path: Path, condition: str | None = None) -> Listing:
    """Pairs of a COCO annotation file. Condition images are computed on read: `bbox` and `segments` from annotated
    objects, others from the image. Captions for an instances file come from the captions file beside it."""
    beside = path.with_name(path.name.replace("instances_", "captions_", 1))
    files = [path, beside] if beside != path and beside.is_file() else [path]
    records = []
    folder = None
    for image in coco_images(files):
        folder = image.folder
        conditions: dict[str, Source] = {}
        for name, parameters in object_parameters(image).items():
            conditions[name] = ComputedCondition(
                target=image.path, condition=name, parameters=tuple(parameters.items())
            )
        captions = (image.caption or "",)
        records.append(Record(where=image.path.name, image=image.path, conditions=conditions, captions=captions))
    return Listing(origin=path, records=records, computes=True, folder=folder)


def object_parameters(image: CocoImage) -> dict[str, dict[str, Any]]:
    """Parameters of the conditions `bbox` and `segments` for the objects of an image."""
    if image.objects is None:
        return {}
    size = image.size if min(image.size) > 0 else None
    boxes = [entry for entry in image.objects if "bbox" in entry]
    shapes = [entry for entry in image.objects if entry.get("segmentation")]
    return {"bbox": {"boxes": boxes, "size": size}, "segments": {"segments": shapes, "size": size}}


def _images_of(annotations: Path, first: str) -> Path:
    """The folder near the annotations that contains the image `first`."""
    split = annotations.stem.rpartition("_")[2]
    home = annotations.parent
    near = [home, home / "images", home.parent, home.parent / "images", home / split, home.parent / split]
    near += [home.parent / "images" / split]
    for folder in near:
        if (folder / first).is_file():
            return folder
    raise UserError(
        f"{first}, listed in {annotations}, is not in a folder near it; put the images into {home / 'images'}, or, to"
        " make pairs, pass their folder with --images-folder",
        "missing-file",
    )
