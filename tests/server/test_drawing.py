"""How the images of a request are prepared, without a server and a worker."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from controlkit.conditions import find
from controlkit.server.catalogue import list_models
from controlkit.server.drawing import Studio
from controlkit.server.limits import Limits
from controlkit.server.spec import Execution, SentImage, Spec


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("fit", ["crop", "stretch", "fill"])
def test_condition_images_show_the_part_of_the_start_image_that_is_sampled(fit):
    lines = np.full((64, 96, 3), 255, np.uint8)
    lines[:, 8:10] = lines[:, 60:62] = 0
    mask = Image.new("L", (96, 64))
    mask.paste(255, (0, 0, 64, 64))
    spec = Spec(
        request={
            "prompt": "red apple",
            "image": "start",
            "mask": "mask",
            "only_masked": 0,
            "strength": 0.5,
            "steps": 2,
            "controls": [{"control": "canny", "image": "lines", "prepared": True}],
        },
        images={
            "start": SentImage(file="lines"),
            "mask": SentImage(file="mask"),
            "lines": SentImage(file="lines", fit=fit, condition="canny"),
        },
        maps=(0,),
    )
    studio = Studio(catalogue=list_models(), limits=Limits(), execution=Execution(device="cpu"))
    files = {"lines": png(Image.fromarray(lines)), "mask": png(mask)}
    result, _ = studio.draw(spec, files, lambda step: None)
    (data,) = result.files["maps"]
    found = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(found, find("canny")(lines)[:, :64])
    assert np.flatnonzero(found.max(axis=(0, 2))).tolist() == [7, 59]
