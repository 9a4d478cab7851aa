"""Rows come back bit for bit; damaged, truncated or missing ones are computed again; processes share a cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_rows import SPEC, Encoder, assert_right, cached, content, digests
from hypothesis import given, settings, strategies
from safetensors.torch import load_file

from controlkit.data.cache import Spec, Store, cache_folder, cache_limit, store_folders
from controlkit.data.cache_report import manage_cache
from controlkit.data.cached_rows import CachedRows
from controlkit.data.segments import Part, Segment, SegmentError, remove_unused, write_segment
from refusals import refused


def segments(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


def damage(path: Path, where: int = -40) -> None:
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(bytes(data))


def test_rows_are_made_once(capsys):
    rows, encoder = cached()
    assert encoder.made == list(range(10))
    assert_right(rows)
    again, encoder = cached()
    assert encoder.made == []
    assert_right(again)
    assert capsys.readouterr().err.count("encoding 10 rows once") == 1


def test_content_decides_and_not_place_or_data_set(cache):
    cached(10)
    rows, encoder = cached(10, first=6)  # four of them are there
    assert encoder.made == [10, 11, 12, 13, 14, 15]
    assert_right(rows, 6)
    assert len(store_folders(cache)) == 1
    _, encoder = cached(2, spec=Spec(kind="latents", model="other", transform="8 x 8"))
    assert encoder.made == [0, 1]


def test_equal_contents_share_a_row():
    encoder = Encoder()
    keys = digests(0, 5)[[3, 1, 3, 3, 1]]
    rows = CachedRows(Store(SPEC), keys, encoder, what="")
    assert encoder.made == [0, 1]
    assert np.array_equal(rows.gather(np.array([4]))["x"][0], content(1))


TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@settings(max_examples=40)
@given(
    kinds=strategies.lists(strategies.sampled_from(sorted(TYPES)), min_size=1, max_size=3),
    count=strategies.integers(1, 5),
    seed=strategies.integers(0, 999),
)
def test_every_type_comes_back_bit_for_bit_and_safetensors_reads_the_file(kinds, count, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("segment")
    rng = np.random.default_rng(seed)
    parts = {f"part{i}": Part(dtype=kind, shape=(i + 1, 3)) for i, kind in enumerate(kinds)}
    rows = {name: rng.integers(0, 256, (count, part.nbytes), np.uint8) for name, part in parts.items()}
    path = write_segment(folder, digests(0, count), parts, rows)
    segment = Segment(path)
    segment.map()
    assert segment.parts == parts
    for number in range(count):
        row = segment.row(number)
        assert row is not None
        assert all(np.array_equal(row[name], rows[name][number]) for name in parts)
    read = load_file(path)
    for name, part in parts.items():
        assert read[name].dtype == TYPES[part.dtype]
        assert read[name].shape == (count, *part.shape)
        assert np.array_equal(read[name].view(torch.uint8).numpy().reshape(count, -1), rows[name])


def test_a_flipped_bit_is_found_when_its_row_is_read_and_the_row_made_again(cache, capsys):
    cached()
    (path,) = segments(cache)
    row = content(7).tobytes()
    damage(path, path.read_bytes().index(row) + 5)
    rows, encoder = cached()
    assert encoder.made == []  # nobody has read it yet
    assert_right(rows)
    assert encoder.made == [7]
    assert f"damaged rows in {path.parent}: 1;" in capsys.readouterr().err
    again, encoder = cached()
    assert_right(again)
    assert encoder.made == []


@settings(max_examples=40)
@given(where=strategies.integers(0, 10**6))
def test_wherever_a_bit_flips_what_is_read_is_right(where, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("flipped")
        patch.setenv("CONTROLKIT_CACHE", str(cache))
        cached(5)
        (path,) = segments(cache)
        damage(path, where % path.stat().st_size)
        rows, _ = cached(5)
        assert_right(rows)


@pytest.mark.parametrize("left", [0, 3, 8, 100, 400, -1])
def test_a_truncated_segment_is_missing(cache, left, capsys):
    cached(4)
    cached(10)
    path = segments(cache)[-1]
    path.write_bytes(path.read_bytes()[:left])
    rows, encoder = cached()
    assert encoder.made == [4, 5, 6, 7, 8, 9]
    assert_right(rows)
    assert f"{path} is damaged" in capsys.readouterr().err
    assert not path.exists()
    path.write_bytes(b"{}")
    with pytest.raises(SegmentError):
        Segment(path)


PROGRAM = """
import os, sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
import cached_rows
from controlkit.data import cache, segments
from controlkit.data import cached_rows as wanted
how = sys.argv[2]
if how == "half":
    complete = segments.write_atomically
    def half(path, write):
        def part(temporary):
            write(temporary)
            temporary.write_bytes(temporary.read_bytes()[:300])
            print("half", flush=True)
            time.sleep(60)
        complete(path, part if path.suffix == ".safetensors" and len(done) else write)
        done.append(path)
    done = []
    segments.write_atomically = half
    wanted._SEGMENT_SECONDS = 0.0
if how == "map":
    rows, _ = cached_rows.cached(10)
    print("map", flush=True)
    sys.stdin.readline()
    cached_rows.assert_right(rows)
elif how == "together":
    progress, other = (Path(name) for name in sys.argv[4:])
    wanted._SEGMENT_SECONDS = 0.0
    encoder = cached_rows.Encoder()
    def in_turns(indices):
        # However busy the machine is, none is more than a batch ahead of the other.
        with progress.open("a") as stream:
            stream.write(".")
        while len(progress.read_text()) > (len(other.read_text()) if other.exists() else 0) and not ended(other):
            time.sleep(0.001)
        return encoder(indices)
    def ended(path):
        return path.with_suffix(".ended").exists()
    store = cache.Store(cached_rows.SPEC)
    keys = cached_rows.digests(0, 120)
    try:
        rows = wanted.CachedRows(store, keys, in_turns, what="{count}", batch=4, start=float(sys.argv[3]))
    finally:
        progress.with_suffix(".ended").touch()
    cached_rows.assert_right(rows)
    print(len(encoder.made))
else:
    cached_rows.cached(10)
"""


def program(*words: str) -> subprocess.Popen[str]:
    here = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, here, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_process_killed_in_the_middle_of_a_segment_leaves_what_it_had(cache):
    process = program("half")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "half"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (truncated,) = cache.glob("*/.*.safetensors")
    rows, encoder = cached()
    assert encoder.made == [4, 5, 6, 7, 8, 9]  # the first segment of four rows is complete
    assert_right(rows)
    # It is removed once it is too old to be still written.
    assert truncated.exists()
    os.utime(truncated, (0, 0))
    cached()
    assert not truncated.exists()


def test_two_processes_share_the_work_and_both_have_every_row(cache, tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    processes = [program("together", "0", first, second), program("together", "0.5", second, first)]
    counts = [int(process.communicate()[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert 120 <= sum(counts) < 200  # not everything twice
    assert max(counts) < 120
    rows, encoder = cached(120)
    assert encoder.made == []
    assert_right(rows)


def test_what_was_used_longest_ago_goes_first(cache, monkeypatch):
    cached(100, spec=Spec(kind="latents", model="a", transform=""))
    cached(100, spec=Spec(kind="latents", model="b", transform=""))
    old, new = segments(cache)
    facts = [json.loads((path.parent / "spec.json").read_text())["model"] for path in (old, new)]
    paths = dict(zip(facts, (old, new), strict=True))
    os.utime(paths["a"], (1000, 1000))
    os.utime(paths["b"], (2000, 2000))
    cached(100, spec=Spec(kind="latents", model="a", transform=""))  # used: now b is the oldest
    limit = sum(path.stat().st_size for path in segments(cache)) + 1000
    monkeypatch.setenv("CONTROLKIT_CACHE_MB", str(limit / 1e6))
    cached(100, spec=Spec(kind="latents", model="c", transform=""))
    assert paths["a"].exists() and not paths["b"].exists()
    assert sum(path.stat().st_size for path in segments(cache)) <= limit


def test_rows_that_cannot_fit_evict_no_others(cache, monkeypatch):
    cached(100, spec=Spec(kind="latents", model="a", transform=""))
    (kept,) = segments(cache)
    monkeypatch.setenv("CONTROLKIT_CACHE_MB", str(kept.stat().st_size / 1e6))
    with refused("out-of-range", cache, "CONTROLKIT_CACHE_MB"):
        Store(Spec(kind="latents", model="b", transform="")).make_room(kept.stat().st_size + 1)
    assert kept.exists()


def test_other_peoples_files_in_the_folder_are_left(cache, monkeypatch):
    (cache / "models").mkdir(parents=True)
    foreign = cache / "models" / "weights.safetensors"
    foreign.write_bytes(b"0" * 5000)
    (cache / "models" / "spec.json").write_text('{"format": "something else"}')
    monkeypatch.setenv("CONTROLKIT_CACHE_MB", "0.006")
    cached(40)
    manage_cache(clear=True)
    assert foreign.exists()


@pytest.mark.parametrize("damage", ["", '{"format": "controlkit cache 1"}'])
def test_a_store_whose_spec_is_damaged_is_still_counted_and_cleared(cache, damage):
    cached(4)
    (spec,) = cache.glob("*/spec.json")
    spec.write_text(damage)
    assert sum(store.segments for store in manage_cache().stores) == 1
    cached(8)
    assert json.loads(spec.read_text())["kind"] == SPEC.kind
    spec.write_text(damage)
    manage_cache(clear=True)
    assert not spec.parent.exists()


def test_what_a_running_process_uses_stays(cache, monkeypatch):
    process = program("map")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "map"
    (path,) = segments(cache)
    os.utime(path, (1000, 1000))
    assert not remove_unused(path)
    report = manage_cache(clear=True)
    assert (report.removed, report.in_use) == (0, 1)
    monkeypatch.setenv("CONTROLKIT_CACHE_MB", "0.0015")
    with refused("out-of-range", cache, "0.0 MB", "in use", "CONTROLKIT_CACHE_MB to 1 or more"):
        cached(40, first=100)
    process.communicate("\n")
    assert process.returncode == 0  # it could read every row to the end
    assert path.exists()
    rows, _ = cached(20, first=100)
    assert_right(rows, 100)
    assert not path.exists()


def test_a_process_that_was_killed_uses_nothing(cache):
    process = program("map")
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate()
    (path,) = segments(cache)
    assert remove_unused(path)


def test_a_mapped_row_can_be_read_although_its_file_is_gone(cache):
    rows, encoder = cached()
    for path in segments(cache):
        path.unlink()
    rows.store.refresh()
    assert_right(rows)
    assert encoder.made == list(range(10))
    rows, encoder = cached()
    assert encoder.made == list(range(10))


def test_more_than_the_limit_is_refused_before_it_is_made(cache, monkeypatch):
    monkeypatch.setenv("CONTROLKIT_CACHE_MB", "0.002")
    encoder = Encoder()
    with refused("out-of-range", cache, "CONTROLKIT_CACHE_MB"):
        CachedRows(Store(SPEC), digests(0, 1000), encoder, what="", batch=4)
    assert len(encoder.made) == 4


@pytest.mark.parametrize("text", ["-1", "0", "much", "inf", "nan"])
def test_a_limit_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("CONTROLKIT_CACHE_MB", text)
    with refused("out-of-range", "CONTROLKIT_CACHE_MB", repr(text)):
        cache_limit()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("CONTROLKIT_CACHE", "~/here")
    assert cache_folder() == Path.home() / "here"
    monkeypatch.delenv("CONTROLKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/controlkit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/controlkit"


def test_a_folder_that_cannot_be_written_names_the_variable_before_anything_is_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "file"))
    encoder = Encoder()
    with refused("write-failed", tmp_path / "file", "CONTROLKIT_CACHE"):
        CachedRows(Store(SPEC), digests(0, 10), encoder, what="")
    assert encoder.made == []


FULL = """
import resource, signal, sys
sys.path[:0] = [sys.argv[1]]
import cached_rows
from controlkit.data import cache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))
cached_rows.cached(1000)
"""


def test_a_full_disk_is_said_in_words(cache):
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", FULL, here], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError: cannot write to the cache" in last and "CONTROLKIT_CACHE" in last
    assert segments(cache) == []


def test_many_small_segments_are_merged_and_rows_stay_right(cache):
    for number in range(40):
        write_segment(SPEC.folder(cache), digests(number, 2), *Encoder(number)([0, 1]))
    damaged = segments(cache)[20]
    damage(damaged, damaged.read_bytes().index(content(20).tobytes()))
    rows, encoder = cached(41)
    assert len(segments(cache)) == 1
    assert len(rows.store) == 41
    assert_right(rows)
    assert encoder.made == []  # the damaged row was there twice


def test_segments_in_use_are_not_merged(cache):
    for number in range(40):
        write_segment(SPEC.folder(cache), digests(number, 1), *Encoder(number)([0]))
    before = segments(cache)
    mapped = [Segment(path) for path in before]
    for segment in mapped:
        segment.map()
    cached(40)
    assert segments(cache) == before


def test_an_index_of_100_000_rows_takes_no_more_calls_than_one_of_1_000(cache, tmp_path, monkeypatch):
    """Nothing is done row by row, so an index of any length is there at once; counted, as no clock is the same."""
    parts = {"x": Part(dtype="U8", shape=(4,))}

    def never(indices):
        raise AssertionError("nothing is missing")

    calls = {}
    for count in (1_000, 100_000):
        monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / str(count)))
        folder = SPEC.folder(tmp_path / str(count))
        keys = np.frombuffer(np.random.default_rng(0).bytes(16 * count), "S16")
        for first in range(0, count, count // 4):
            values = {"x": np.zeros((count // 4, 4), np.uint8)}
            write_segment(folder, keys[first : first + count // 4], parts, values)
        assert len(list(folder.iterdir())) == 4  # no file per sample
        counted, before = calls.setdefault(count, Counter()), sys.getprofile()
        sys.setprofile(lambda frame, event, argument, counted=counted: counted.update([event]))
        try:
            rows = CachedRows(Store(SPEC), keys, never, what="")
        finally:
            sys.setprofile(before)
        assert len(rows) == count
        missing = rows.store.find(np.frombuffer(np.random.default_rng(1).bytes(160), "S16"))[0]
        assert (missing == -1).all()
    few, many = (calls[count]["call"] + calls[count]["c_call"] for count in (1_000, 100_000))
    assert 0 < many < 1.5 * few


def test_a_digest_that_ends_in_zeros_is_a_digest(cache):
    keys = np.frombuffer(b"\1" + bytes(15) + bytes(16) + b"\1\2" + bytes(14), "S16")
    rows = CachedRows(Store(SPEC), keys, Encoder(), what="")
    assert_right(rows)
    again = CachedRows(Store(SPEC), keys, encoder := Encoder(), what="")
    assert encoder.made == []
    assert_right(again)
    assert manage_cache(verify=True).damaged == ()
