"""`controlkit cache`: what is there, whether it is whole, and removing it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pytest

import controlkit
from controlkit.apps.cli import main
from controlkit.data.cache import Spec, Store
from controlkit.data.cache_report import ago
from controlkit.data.cached_rows import CachedRows
from controlkit.data.segments import Part, digests_of
from controlkit.files import sha256_of
from refusals import check


def run(*words: str) -> int:
    return main(["cache", *words])


def fill(kind: str, count: int = 5) -> CachedRows:
    digests = digests_of([sha256_of(str(number)) for number in range(count)])

    def make(indices):
        rows = np.stack([np.full(16, index, np.uint8) for index in indices])
        return {kind: Part(dtype="F16", shape=(2, 4))}, {kind: rows}

    return CachedRows(
        Store(Spec(kind=kind, model="abcdef123", transform="64 x 64"), note="tiny"), digests, make, what=""
    )


def report(capsys, *words: str):
    capsys.readouterr()
    assert run(*words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_an_empty_cache_is_one(cache, capsys):
    facts = report(capsys)
    assert facts["stores"] == [] and facts["bytes"] == 0 and facts["folder"] == str(cache)
    assert facts["limit"] == 50_000_000_000
    assert run("--clear", "--verify") == 0
    assert not cache.exists()


def test_stores_are_told_with_what_they_hold(cache, capsys, monkeypatch):
    fill("latents")
    fill("hints", 3)
    monkeypatch.setenv("CONTROLKIT_CACHE_MB", "2.5")
    facts = report(capsys)
    assert [(store["kind"], store["rows"], store["shape"]) for store in facts["stores"]] == [
        ("hints", 3, "F16 2 x 4"),
        ("latents", 5, "F16 2 x 4"),
    ]
    assert facts["limit"] == 2_500_000
    assert facts["bytes"] == sum(path.stat().st_size for path in cache.glob("*/*.safetensors"))
    monkeypatch.setenv("COLUMNS", "200")
    assert run() == 0
    told = capsys.readouterr().out
    for word in ("latents", "tiny abcdef12", "64 x 64", "F16 2 x 4", "just now", str(cache)):
        assert word in told
    assert list(controlkit.manage_cache().to_json()["stores"]) == facts["stores"]


def test_one_kind_or_everything_is_removed(cache, capsys):
    fill("latents")
    fill("hints")
    assert main(["cache", "--clear", "latent"]) == 2
    check(capsys.readouterr().err, "unknown-name", "'latent'", "did you mean latents")
    facts = report(capsys, "--clear", "latents")
    assert facts["removed"] == 1
    assert [store["kind"] for store in facts["stores"]] == ["hints"]
    assert report(capsys, "--clear")["stores"] == []
    assert list(cache.iterdir()) == []


def test_what_is_in_use_is_left_and_told(cache, capsys):
    rows = fill("latents")
    assert run("--clear") == 0
    assert "in use by a running process: 1 segments" in capsys.readouterr().out
    del rows
    assert report(capsys, "--clear")["removed"] == 1


def test_verify_finds_what_is_damaged_and_removes_no_more(cache, capsys):
    fill("latents")
    fill("hints")
    for kind, where in (("latents", -20), ("hints", 3)):
        (path,) = cache.glob(f"{kind}*/*.safetensors")
        data = bytearray(path.read_bytes())
        data[data.index(bytes([2] * 16)) if kind == "latents" else where] ^= 8
        path.write_bytes(bytes(data))
    assert run("--verify") == 0
    told = capsys.readouterr().out
    assert "verified: 5 rows; damaged: 2" in told and "1 of 5 rows" in told
    facts = report(capsys, "--verify")
    assert facts["damaged"] == [] and facts["verified"] == 4
    rows = fill("latents")
    assert np.array_equal(rows.gather(np.arange(5))["latents"][:, 0], np.arange(5))
    assert report(capsys, "--verify")["verified"] == 5


def test_a_limit_that_is_no_number_is_told(capsys, monkeypatch):
    monkeypatch.setenv("CONTROLKIT_CACHE_MB", "lots")
    assert run() == 2
    check(capsys.readouterr().err, "out-of-range", "CONTROLKIT_CACHE_MB", "'lots'")


def test_the_verb_loads_no_torch(cache):
    probe = "import sys; from controlkit.apps.cli import main; main(['cache']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        run("--help")
    assert "controlkit cache --verify" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "words"), [(1, "just now"), (130, "2 min ago"), (7300, "2 h ago"), (9e5, "10 d ago")]
)
def test_how_long_ago(seconds, words):
    assert ago(time.time() - seconds) == words
    assert ago(None) == "-"
