"""Files are complete or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from controlkit.errors import UserError, nearest
from controlkit.files import (
    numbered_folder,
    one_spelling,
    output_folder,
    read_json,
    remove_leftovers,
    sha256_of,
    spelled,
    writable_folder,
    write_atomically,
    write_json,
)
from refusals import refused


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_path_has_one_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a/b", "./a/b", "a/../a/b", tmp_path / "a" / "b"):
        assert str(one_spelling(path)) == "a/b"
    assert one_spelling("../x") == tmp_path.parent / "x" == one_spelling(tmp_path.parent / "x")
    (tmp_path / "a").mkdir()
    assert spelled(str(tmp_path / "a")) == "a"
    assert spelled("nano/./base") == "nano/./base"  # a name


def test_a_file_is_written_with_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "x.txt"
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert names(path.parent) == ["x.txt"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("before", ["old", None])
def test_an_error_while_writing_leaves_what_was_there(tmp_path, error, before):
    path = tmp_path / "x.txt"
    if before:
        path.write_text(before)

    def write(temporary):
        temporary.write_text("ne")
        raise error

    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        write_atomically(path, write)
    assert names(tmp_path) == (["x.txt"] if before else [])
    assert not before or path.read_text() == before


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.txt", tmp_path / "file" / "deeper" / "x.txt"):
        with refused("write-failed", path):
            write_atomically(path, lambda temporary: temporary.write_text("new"))
    with refused("write-failed", tmp_path / "file" / "out"):
        writable_folder(tmp_path / "file" / "out")
    with refused("write-failed", tmp_path):
        write_atomically(tmp_path, lambda temporary: temporary.write_text("over a folder"))
    assert names(tmp_path) == ["file"]


def test_a_folder_is_made_and_left_empty(tmp_path):
    assert names(writable_folder(tmp_path / "new" / "er")) == []


def test_folders_are_numbered_after_the_largest(tmp_path):
    assert [numbered_folder(tmp_path / "new").name for _ in range(2)] == ["001", "002"]
    (tmp_path / "new" / "041").write_text("a file, too")
    (tmp_path / "new" / "notes").mkdir()
    (tmp_path / "new" / "001").rmdir()
    assert numbered_folder(tmp_path / "new").name == "042"


def test_a_numbered_folder_of_a_block_that_fails_is_removed(tmp_path):
    with pytest.raises(ZeroDivisionError), output_folder(None, numbered_in=tmp_path) as out:
        raise ZeroDivisionError(out.name)
    assert names(tmp_path) == []
    with output_folder(None, numbered_in=tmp_path) as out:
        assert out.name == "001"
    assert names(tmp_path) == ["001"]


KILLED = """
import sys, time
from pathlib import Path
from controlkit.files import write_atomically
def write(temporary):
    temporary.write_text("half of the n")
    print("written", flush=True)
    time.sleep(60)
write_atomically(Path(sys.argv[1]), write)
"""


def test_a_process_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "written"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    (tmp_path / "other.txt").write_text("stays")
    assert len(names(tmp_path)) == 3
    remove_leftovers(path)
    assert names(tmp_path) == ["other.txt", "x.txt"]


FULL = """
import resource, signal, sys, torch
from controlkit.files import write_atomically
from safetensors.torch import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
write_atomically(sys.argv[1], lambda temporary: save_file({"a": torch.zeros(100_000)}, temporary))
"""


def test_a_full_disk_is_said_in_words_for_weights_too(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    assert f"UserError: cannot write {path}" in done.stderr.strip().splitlines()[-1]
    assert names(tmp_path) == ["x.safetensors"]
    assert path.read_text() == "old"


def test_json_that_is_written_has_null_for_what_is_no_number(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"closed": float("nan"), "rows": [("a", float("inf"), 1.5)]})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {"closed": None, "rows": [["a", None, 1.5]]}


def test_json_goes_and_comes_back(tmp_path):
    value = {"prompt": "a “red” apfel – ä", "seeds": [1, 2], "none": None}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.json").read_bytes())
    assert read_json(tmp_path / "a.json") == value


def test_json_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"{'a': 1}", b"[" * 100_000])
def test_what_is_not_json_is_said_in_words(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with refused("damaged-file", path):
        read_json(path)


def test_missing_json_is_said_in_words(tmp_path):
    for path, code in ((tmp_path / "nothing.json", "missing-file"), (tmp_path, "unreadable-file")):
        with refused(code, path):
            read_json(path)


def test_a_link_stays_and_permissions_are_kept(tmp_path):
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "real.json").chmod(0o600)
    (tmp_path / "link.json").symlink_to("real.json")
    write_json(tmp_path / "link.json", 1)
    assert (tmp_path / "link.json").is_symlink() and read_json(tmp_path / "real.json") == 1
    assert (tmp_path / "real.json").stat().st_mode & 0o777 == 0o600


def test_a_hash_knows_where_its_parts_end():
    assert sha256_of("ab", "c") != sha256_of("a", "bc")
    assert sha256_of("ab", b"c") == sha256_of(b"ab", "c")


def test_nearest_names():
    assert nearest("cany", ["canny", "hed"]) == "; did you mean canny?"
    assert nearest("zzz", ["canny", "hed"]) == "; known: canny, hed"
    assert nearest("zzz", []) == ""


def test_what_is_no_ordinary_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "not a regular file"), (tmp_path, "a folder")):
        with refused("write-failed", path, kind):
            write_atomically(path, lambda temporary: temporary.write_text("x"))
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_s_name_that_is_not_text_goes_into_json(tmp_path):
    write_json(tmp_path / "a.json", {"image": "dr\udce9.png", "prompt": "\u732b"})
    assert read_json(tmp_path / "a.json") == {"image": "dr\udce9.png", "prompt": "\u732b"}
