"""The verb, and the example of its page."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from running import Command, drawing

from controlkit.apps.cli import build_parser, main
from controlkit.apps.serve import _origin
from controlkit.files import locked
from refusals import check

PAGE = Path(__file__).parents[2] / "docs" / "server.md"


def test_nothing_else_needs_the_packages_of_the_server(tmp_path):
    code = """
import sys
for name in ("fastapi", "uvicorn", "starlette", "python_multipart"):
    sys.modules[name] = None
import controlkit, controlkit.apps.cli
assert controlkit.generate
sys.exit(controlkit.apps.cli.main(["serve", "--port", "0"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    check(done.stderr, "missing-package", "controlkit[serve]")


def test_two_servers_do_not_share_a_queue(tmp_path, capsys):
    queue = tmp_path / "queue.sqlite"
    with locked(tmp_path / "queue.sqlite.lock", "taken"):
        assert main(["serve", "--port", "0", "--queue", str(queue)]) == 2
    check(capsys.readouterr().err, "in-use", queue)


def test_an_address_that_is_taken_is_reported(server, tmp_path, capsys):
    assert main(["serve", "--port", str(server.port), "--queue", str(tmp_path / "queue.sqlite")]) == 2
    check(capsys.readouterr().err, "in-use", server.port)


@pytest.mark.parametrize(
    ("words", "code", "fact"),
    [
        (["--port", "70000"], "out-of-range", "70000"),
        (["--port", "-1"], "out-of-range", "-1"),
        (["--base", "models/none.safetensors"], "missing-file", "models/none.safetensors"),
        (["--base", "/none"], "missing-file", "/none"),
        (["--device", "toaster"], "device-unavailable", "toaster"),
        (["--precision", "fp8"], "unknown-name", "fp8"),
        (["--cors", "localhost:3000"], "wrong-type", "localhost:3000"),
        (["--cors", "http://page.example/path"], "wrong-type", "/path"),
        (["--token", "p\u00e4ssword-12345"], "out-of-range", "ASCII"),
    ],
)
def test_what_no_request_could_use_is_refused_at_the_start(tmp_path, capsys, words, code, fact):
    assert main(["serve", "--port", "0", "--queue", str(tmp_path / "queue.sqlite"), *words]) == 2
    check(capsys.readouterr().err, code, fact)


def test_origins_are_compared_as_browsers_send_them():
    assert [_origin(text) for text in ("http://Page.example/", "*", "https://[::1]:3000")] == [
        *("http://page.example", "*", "https://[::1]:3000"),
    ]


def test_fractions_of_seconds():
    assert build_parser().parse_args(["serve", "--max-seconds", "0.5"]).max_seconds == 0.5


def test_the_example_of_the_page_draws(server, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    drawing().save(tmp_path / "drawing.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("http://127.0.0.1:7860", server.url), "server.md", "exec"), {})
    assert (tmp_path / "seed1.png").is_file() and (tmp_path / "seed2.png").is_file()
    assert "done" in capsys.readouterr().out


def test_low_memory_and_graphs_reach_sampling(tmp_path):
    with Command(tmp_path, "--low-memory", "--graphs", "on") as command:
        status = command.running.wait(command.running.submit(prompt="red apple", steps=2))
    # A CPU has no graphs, and `on` is refused where it cannot be.
    assert (status["state"], status["code"]) == ("failed", "unsupported"), status


def test_settings_of_the_server_are_those_of_each_request(monkeypatch):
    from controlkit.sampling.generation import Generation
    from controlkit.server import drawing as module
    from controlkit.server.catalogue import list_models
    from controlkit.server.limits import Limits
    from controlkit.server.spec import Execution, Spec

    asked = []
    monkeypatch.setattr(module, "generate_single", lambda request, **_: asked.append(request) or Generation(request))
    execution = Execution(device="cpu", precision="fp32", low_memory=True, graphs="off")
    studio = module.Studio(catalogue=list_models(), limits=Limits(), execution=execution)
    studio.draw(Spec(request={"prompt": "", "low_memory": False, "graphs": "on"}), {}, lambda step: None)
    (request,) = asked
    assert {name: getattr(request, name) for name in vars(execution)} == vars(execution)


def test_the_page_names_every_option_of_the_limits():
    (action,) = (each for each in build_parser()._actions if each.dest == "verb")
    page = PAGE.read_text(encoding="utf-8")
    options = [option for each in action.choices["serve"]._actions for option in each.option_strings]
    assert [option for option in options if option.startswith("--max-") and option not in page] == []
