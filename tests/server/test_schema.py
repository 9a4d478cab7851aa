"""Any request that the OpenAPI schema describes, and many that it does not, gets an answer: never a server error.

The worker is the real one, on nano; valid requests draw one step.
"""

from __future__ import annotations

import base64
import string
import warnings

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from running import base64_of, drawing, in_thread

from controlkit.server.limits import Limits

schemathesis = pytest.importorskip("schemathesis")

IMAGE = base64_of(drawing())
DAMAGED = base64.b64encode(base64.b64decode(IMAGE)[:700]).decode()
images = st.sampled_from([IMAGE, IMAGE, IMAGE, f"data:image/png;base64,{IMAGE}", DAMAGED, "", "x", "/etc/passwd"])
modules = st.sampled_from(["none", "auto", "canny", "scribble", "palette", "inpaint", "invert", ""])
controls = st.sampled_from(["canny", "nano/palette", "nano/scribble", "None", "../canny"])
numbers = st.sampled_from([0, 1, 0.5, -1, 2, 1e300, 2**63, True, None, "1"])
units = st.dictionaries(
    st.sampled_from(["image", "input_image", "mask", "module", "model", "weight", "guidance_start", "guidance_end"]),
    st.none(),
    min_size=3,
)
PLAUSIBLE = {
    "alwayson_scripts": st.fixed_dictionaries(
        {"ControlNet": st.fixed_dictionaries({"args": st.lists(units, max_size=3)})}
    ),
    "base": st.sampled_from(["nano", None]),
    "batch_size": st.just(1),
    "cfg_scale": st.sampled_from([1, 7.0]),
    "condition": modules,
    "control": controls,
    "controlnet_images": st.lists(images, min_size=1, max_size=2),
    "controlnet_module": modules,
    "denoising_strength": st.sampled_from([0.0, 0.5, 1]),
    "embeddings": st.just([]),
    "end": numbers,
    "guidance": st.sampled_from([None, 1, 5]),
    "guidance_end": numbers,
    "guidance_start": numbers,
    "height": st.just(64),
    "hires": st.just(None),
    "hr_scale": st.sampled_from([1.5, 1, 100]),
    "image": images,
    "init_images": st.lists(images, min_size=1, max_size=1),
    "input_image": images,
    "layers": st.none(),
    "loras": st.just([]),
    "mask": images,
    "mode": st.sampled_from([None, "balanced", "guess", "loud"]),
    "model": controls,
    "module": modules,
    "n": st.just(1),
    "n_iter": st.just(1),
    "only_masked": st.sampled_from([None, 0, 8]),
    "prompt": st.text(max_size=20),
    "response_format": st.just("b64_json"),
    "sampler": st.sampled_from([None, "ddim", "lcm", "euler"]),
    "sampler_name": st.sampled_from(["DDIM", "Euler a", "LCM", "x", None]),
    "sampler_index": st.none(),
    "seed": st.sampled_from([1, -1, 2**64]),
    "seeds": st.lists(st.integers(-1, 5), min_size=1, max_size=2),
    "size": st.sampled_from(["64x64", "auto", "0x64", "1x1"]),
    "steps": st.sampled_from([1, None]),
    "strength": st.sampled_from([None, 0.5]),
    "vae": st.none(),
    "weight": numbers,
    "width": st.just(64),
}
"""Key -> values that are more often valid than what the schema alone suggests."""


def enriched(draw, value):
    """A body in which some values, at any depth, are such as clients send."""
    if isinstance(value, dict):
        made = {}
        for key, each in value.items():
            use = key in PLAUSIBLE and draw(st.integers(0, 3)) > 0
            made[key] = enriched(draw, draw(PLAUSIBLE[key]) if use else each)
        return made
    return [enriched(draw, each) for each in value] if isinstance(value, list) else value


def ask_one(operation, count: int, round_: int, statuses: dict[int, int]) -> None:
    """Ask one operation up to `count` times, and count the answers by status."""

    @seed(round_)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        deadline=None,
        database=None,
    )
    @given(data=st.data(), case=operation.as_strategy())
    def ask(data, case):
        if isinstance(case.body, dict) and case.media_type == "application/json":
            case.body = enriched(data.draw, case.body)
        answer = case.call(timeout=120)
        statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
        is_full = answer.status_code == 503 and "queue is full" in answer.text
        assert answer.status_code < 500 or is_full, (case.method, case.path, case.body, answer.text)

    ask()


def ask_anything(folder, cases: int) -> dict[int, int]:
    """Ask a server at least so many times; returns status -> number of answers."""
    limits = Limits(
        steps=1, pixels=64 * 64, input_pixels=128 * 128, images=2, controls=2, body=1, seconds=60, kept=cases
    )
    statuses: dict[int, int] = {}
    with in_thread(folder, limits=limits) as running, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        operations = [each.ok() for each in schema.get_all_operations()]
        # Those with a body have more to get wrong; the others soon repeat themselves.
        shares = {operation.label: 6 if operation.body else 1 for operation in operations}
        round_ = 0
        while sum(statuses.values()) < cases:
            asked = operations if round_ == 0 else [operation for operation in operations if operation.body]
            left = cases - sum(statuses.values())
            for operation in asked:
                count = -(-left * shares[operation.label] // sum(shares[each.label] for each in asked))
                ask_one(operation, count, round_, statuses)
            round_ += 1
        for name in string.ascii_letters[:3]:  # it is still alive, and draws
            assert running.wait(running.submit(prompt=name))["state"] == "done"
        failed = [job for job in running.service.store.recent(cases) if job.state == "failed"]
        assert [job for job in failed if job.code is None] == []
        assert "controlkit_worker_starts_total 1\n" in running.client.get("/metrics").text
    return statuses


def test_no_request_is_answered_by_a_server_error(tmp_path):
    statuses = ask_anything(tmp_path, 200)
    assert statuses.get(200, 0) > 50 and statuses.get(422, 0) > 10


@pytest.mark.slow
def test_ten_thousand_requests(tmp_path):
    statuses = ask_anything(tmp_path, 10_000)
    print(statuses)
    assert sum(statuses.values()) >= 10_000
