"""ICC profiles made by hand."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms


def matrix_profile(curve: float, primaries: dict[bytes, tuple[float, float, float]], space: bytes = b"RGB ") -> bytes:
    """An ICC profile (version 2) of a display or a grey scale whose tone curve is the power `curve`.

    Args:
        primaries: of `r`, `g` and `b`, the colours in XYZ, adapted to D50; none for grey.
    """

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(round(value * 65536).to_bytes(4, "big", signed=True) for value in values)

    tone = b"curv\0\0\0\0\0\0\0\1" + round(curve * 256).to_bytes(2, "big") + b"\0\0"
    tags = {b"wtpt": xyz((0.9642, 1, 0.8249))}
    tags |= {key + b"XYZ": xyz(values) for key, values in primaries.items()}
    tags |= {key + b"TRC": tone for key in (primaries or (b"k",))}
    return assembled(space, b"mntr", b"XYZ ", tags)


def table_profile() -> bytes:
    """An ICC profile of a press, a table of Lab: white paper and sRGB's cyan, magenta, yellow and black as inks."""
    lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(1, 16, 4)
    colours = ImageCms.applyTransform(
        Image.fromarray((255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])).astype(np.uint8)), lab
    )
    # Pillow keeps a and b signed, an ICC table keeps them with 128 for zero.
    nodes = np.frombuffer(colours.tobytes(), np.uint8).reshape(16, 3) ^ np.array([0, 128, 128], np.uint8)
    one = (65536).to_bytes(4, "big")
    matrix = one + bytes(12) + one + bytes(12) + one
    straight = bytes(range(256))
    table = b"mft1\0\0\0\0\4\3\2\0" + matrix + 4 * straight + nodes.tobytes() + 3 * straight
    return assembled(b"CMYK", b"prtr", b"Lab ", {b"A2B0": table})


def assembled(space: bytes, device: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile's header, table of tags and tags."""
    name = b"desc\0\0\0\0\0\0\0\5test\0" + bytes(78) + b"\0"
    tags = {b"desc": name, b"cprt": b"text\0\0\0\0none\0\0\0\0", **tags}
    body, table = b"", len(tags).to_bytes(4, "big")
    for key, data in tags.items():
        data += bytes(-len(data) % 4)
        table += key + (128 + 4 + 12 * len(tags) + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data
    head = (132 + 12 * len(tags) + len(body)).to_bytes(4, "big") + b"\0\0\0\0\x02\x10\0\0" + device + space + connection
    head += bytes(12) + b"acsp" + bytes(28) + b"\0\0\xf6\xd6\0\1\0\0\0\0\xd3\x2d"
    return head + bytes(128 - len(head)) + table + body


ADOBE_RGB = matrix_profile(
    2.19921875,
    {b"r": (0.60974, 0.31111, 0.01947), b"g": (0.20528, 0.62567, 0.06087), b"b": (0.14919, 0.06322, 0.74457)},
)
GREY_LINEAR = matrix_profile(1.0, {}, b"GRAY")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
CMYK_TABLE = table_profile()
