"""Classes of COCO, and the colours of their boxes."""

from __future__ import annotations

_ABSENT = frozenset((12, 26, 29, 30, 45, 66, 68, 69, 71, 83))
COCO_CATEGORIES = tuple(number for number in range(1, 91) if number not in _ABSENT)
"""Category ids of COCO's 80 classes in order; detectors of 80 classes number them without gaps."""

_COLOURS = """
ff0000 00ff00 0000ff ffff00 ff00ff 00ffff 808000 800080 008080 808080 400000 004000 000040 404000
400040 004040 c0c0c0 202020 606060 a0a0a0 e0e0e0 200000 002000 000020 202000 200020 002020 600000
006000 000060 606000 600060 006060 a00000 00a000 0000a0 a0a000 a000a0 00a0a0 e00000 00e000 0000e0
e0e000 e000e0 00e0e0 404040 804040 408040 404080 808040 804080 408080 c04040 40c040 4040c0 c0c040
c040c0 40c0c0 602020 206020 202060 606020 602060 206060 a02020 20a020 2020a0 a0a020 a020a0 20a0a0
e02020 20e020 2020e0 e0e020 e020e0 20e0e0 406060 604060 606040 a06060
"""

BOX_COLOURS: dict[int, tuple[int, int, int]] = {
    category: (int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16))
    for category, code in zip(COCO_CATEGORIES, _COLOURS.split(), strict=True)
}
"""Category id -> RGB of its boxes, on which UniControl's `bbox` task and CtrLoRA's base control were trained
(Salesforce's app/gradio_bbox2image.py, `color_dict`; CtrLoRA, annotator/bbox)."""
