"""Who may ask, and how much."""

from __future__ import annotations

import socket
import time

import pytest
from running import in_thread

from controlkit.apps.cli import main
from controlkit.server.guards import has_token
from controlkit.server.limits import Limits
from refusals import check, refused

TOKEN = "correct horse".replace(" ", "-")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with in_thread(
        tmp_path_factory.mktemp("guarded"),
        token=TOKEN,
        hosts=("127.0.0.1",),
        origins=("http://page.example",),
        limits=Limits(body=1, queue=1),
    ) as running:
        yield running


def test_every_path_but_healthz_needs_the_token(guarded):
    paths = [(path, method) for path, methods in guarded.get("/openapi.json")["paths"].items() for method in methods]
    assert len(paths) > 40
    for path, method in [*paths, ("/openapi.json", "get"), ("/none", "get")]:
        for header in ("", "Bearer wrong", f"Digest {TOKEN}", "Basic !", "Basic d3Jvbmc="):
            answer = guarded.client.request(method, path, headers={"Authorization": header})
            assert answer.status_code == (200 if path == "/healthz" else 401), (path, header)


def test_the_token_is_a_bearer_or_a_password_of_any_user(guarded):
    assert guarded.client.get("/sdapi/v1/options").is_success
    for user in ("", "anyone"):
        assert guarded.client.get("/sdapi/v1/options", auth=(user, TOKEN)).is_success
    assert guarded.client.get("/sdapi/v1/options", auth=(TOKEN, "wrong")).status_code == 401
    assert not has_token("Bearer ", TOKEN) and not has_token(TOKEN, TOKEN)


def test_webuiapi_sends_it_as_a_password(guarded):
    webuiapi = pytest.importorskip("webuiapi")
    api = webuiapi.WebUIApi(port=guarded.port, username="anyone", password=TOKEN)
    assert api.has_controlnet and api.get_options()["sd_model_checkpoint"] == "nano"


def test_names_that_others_point_at_this_machine_are_refused(guarded):
    for host in ("evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "["):
        assert guarded.client.get("/healthz", headers={"Host": host}).status_code == 403
    assert guarded.client.get("/healthz", headers={"Host": "127.0.0.1:1"}).is_success


def test_pages_of_other_origins_are_refused_but_those_that_are_named(guarded):
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://page.example.evil"):
        answer = guarded.client.get("/healthz", headers={"Origin": origin})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    own = guarded.client.get("/healthz", headers={"Origin": guarded.url})
    named = guarded.client.get("/healthz", headers={"Origin": "http://page.example"})
    assert own.is_success and named.headers["access-control-allow-origin"] == "http://page.example"
    ask = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST", "Authorization": ""}
    assert guarded.client.options("/sdapi/v1/txt2img", headers=ask).is_success


def test_pages_can_read_why_they_are_refused(guarded, monkeypatch):
    page = {"Origin": "http://page.example"}
    wrong = guarded.client.get("/healthz/none", headers={**page, "Authorization": "Bearer wrong"})
    large = guarded.client.post("/sdapi/v1/txt2img", content=b" " * (10**6 + 1), headers=page)
    monkeypatch.setattr(guarded.service, "counts", None)
    broken = guarded.client.get("/metrics", headers=page)
    assert [answer.status_code for answer in (wrong, large, broken)] == [401, 413, 500]
    for answer, code in ((wrong, "wrong-token"), (large, "too-large"), (broken, "server-failed")):
        assert answer.headers["access-control-allow-origin"] == "http://page.example"
        assert answer.json()["code"] == code and answer.json()["message"]


def test_errors_have_the_shape_that_the_schema_names(guarded):
    guard, ours, openai = {"Authorization": "Bearer wrong"}, "/controlkit/v1/jobs", "/v1/images/generations"
    answers = [
        guarded.client.get(ours, headers=guard),
        guarded.client.get(f"{ours}/none"),
        guarded.client.put(ours),
        guarded.client.get("/none"),
        guarded.post(ours, {"prompt": 1}),
        guarded.post(ours, {"base": "none"}),
    ]
    assert [answer.status_code for answer in answers] == [401, 404, 405, 404, 422, 422]
    for answer in answers:
        assert set(answer.json()) == {"detail", "message", "code"} and answer.json()["message"]
    answers = [
        guarded.client.get("/v1/models", headers=guard),
        guarded.client.put(openai),
        guarded.post(openai, {"prompt": 1}),
        guarded.post(openai, {"prompt": "x", "model": "none"}),
    ]
    assert [answer.status_code for answer in answers] == [401, 405, 422, 422]
    for answer in answers:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "code", "param"} and error["message"] and error["code"]
    paths = guarded.get("/openapi.json")["paths"]
    for path, model in ((ours, "Problem"), (openai, "OpenAIProblem")):
        for status in ("401", "413", "422", "503"):
            schema = paths[path]["post"]["responses"][status]["content"]["application/json"]["schema"]
            assert schema["$ref"].rpartition("/")[2] == model


def test_fields_are_described_in_the_schema(guarded):
    schemas = guarded.get("/openapi.json")["components"]["schemas"]
    assert "random" in schemas["GenerateBody"]["properties"]["seeds"]["description"]
    assert "PNG" in schemas["Answer"]["properties"]["images"]["description"]


def test_no_origin_is_allowed_by_default(server):
    ask = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    assert server.client.options("/sdapi/v1/txt2img", headers=ask).status_code == 403
    assert server.client.get("/healthz", headers={"Origin": "http://page.example"}).status_code == 403


def test_forms_that_pages_can_post_anywhere_are_no_json(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = server.client.post("/sdapi/v1/txt2img", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
        assert answer.status_code == 422


def test_a_large_body_is_refused_whether_or_not_it_tells_its_length(guarded):
    large = b" " * (10**6 + 1)
    headers = {"Content-Type": "application/json"}
    for content in (large, iter([large[:700_000], large[700_000:]])):
        assert guarded.client.post("/sdapi/v1/txt2img", content=content, headers=headers).status_code == 413


def unfinished(guarded) -> socket.socket:
    """A connection that has sent a part of its body."""
    sock = socket.create_connection(("127.0.0.1", guarded.port), timeout=60)
    lines = ["POST /v1/images/generations HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {TOKEN}"]
    sock.sendall("\r\n".join([*lines, "Content-Length: 100", "", "{"]).encode())
    return sock


def test_a_body_that_does_not_arrive_is_refused(guarded, monkeypatch):
    monkeypatch.setattr("controlkit.server.guards._PATIENCE", 0.2)
    with unfinished(guarded) as sock, sock.makefile("rb") as file:
        answer = file.read().decode()  # the server closes the connection
    assert answer.startswith("HTTP/1.1 408 ") and '"code": "timeout"' in answer


def test_clients_that_leave_are_counted_by_themselves(guarded):
    unfinished(guarded).close()
    end = time.monotonic() + 60
    while 'status="499"} 1\n' not in (text := guarded.client.get("/metrics").text):
        assert time.monotonic() < end, text
    assert 'method="POST",status="500"' not in text


def test_a_full_queue_answers_503_and_when_to_come_again(guarded):
    long = {"prompt": "red apple", "steps": 150, "seeds": list(range(8)), "batch_size": 1}
    names = [guarded.submit(**long)]
    guarded.wait(names[0], "running")
    names.append(guarded.submit(**long))
    for path, body in (
        ("/controlkit/v1/jobs", long),
        ("/sdapi/v1/txt2img", {"prompt": "x"}),
        ("/v1/images/generations", {"prompt": "x"}),
    ):
        answer = guarded.post(path, body)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    for name in reversed(names):
        guarded.post(f"/controlkit/v1/jobs/{name}/cancel")
        guarded.wait(name)
    text = guarded.client.get("/metrics").text
    assert "controlkit_refused_total 3\n" in text and 'controlkit_jobs_total{state="cancelled"} 2\n' in text
    assert 'controlkit_jobs{state="cancelled"} 2\n' in text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.com"])
def test_other_machines_are_let_in_with_a_token_only(host, monkeypatch, capsys):
    monkeypatch.delenv("CONTROLKIT_TOKEN", raising=False)
    assert main(["serve", "--host", host]) == 2
    check(capsys.readouterr().err, "missing-setting", host, "CONTROLKIT_TOKEN")
    assert main(["serve", "--host", host, "--token", "short"]) == 2
    check(capsys.readouterr().err, "out-of-range")


def test_limits_are_positive():
    with refused("out-of-range", "steps"):
        Limits(steps=0)
