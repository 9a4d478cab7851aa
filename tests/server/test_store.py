"""The queue's file: order, limits, what is kept, and what a killed server leaves."""

from __future__ import annotations

import stat
import threading

import pytest

from controlkit.server.store import MOST_ATTEMPTS, QueueFull, Store
from refusals import refused


def store(tmp_path, queue=100, kept=100):
    return Store(tmp_path / "queue.sqlite", queue=queue, kept=kept)


def submit(db, count=1):
    return [db.submit("generate", {"number": number}, {"image": b"bytes"}).id for number in range(count)]


def test_requests_are_taken_in_their_order(tmp_path):
    db = store(tmp_path)
    names = submit(db, 3)
    assert [db.place(db.get(name)) for name in names] == [0, 1, 2]
    assert [db.begin().id for _ in names] == names
    assert db.begin() is None


def test_a_full_queue_refuses_and_a_running_request_does_not_count(tmp_path):
    db = store(tmp_path, queue=2)
    submit(db, 2)
    with pytest.raises(QueueFull):
        submit(db)
    db.begin()
    submit(db)
    assert db.counts() == {"pending": 2, "running": 1}


def test_results_replace_what_was_sent_and_the_oldest_go(tmp_path):
    db = store(tmp_path, kept=2)
    names = submit(db, 3)
    for name in names:
        db.begin()
        db.finish(name, "done", result={"seeds": [1]}, files={"images": [b"first", b"second"]})
    assert db.get(names[0]) is None and db.files(names[0], "images") == {}
    assert list(db.files(names[2], "images").values()) == [b"first", b"second"]
    assert db.files(names[2], "input") == {} and db.get(names[2]).result == {"seeds": [1]}


def test_each_kind_of_request_is_kept_by_itself(tmp_path):
    db = store(tmp_path, kept=2)
    (drawn,) = submit(db)
    detected = [db.submit("detect", {}, {}).id for _ in range(4)]
    for name in (drawn, *detected):
        db.begin()
        db.finish(name, "done")
    assert db.get(drawn) is not None
    assert [db.get(name) is None for name in detected] == [True, True, False, False]
    db.remove(drawn)
    assert db.get(drawn) is None
    (waiting,) = submit(db)
    db.remove(waiting)
    assert db.get(waiting) is not None  # only what has ended


def test_the_file_does_not_grow_with_the_number_of_requests(tmp_path):
    db = store(tmp_path, kept=2)
    sizes = []
    for _ in range(30):
        (name,) = submit(db)
        db.begin()
        db.finish(name, "done", files={"images": [b"x" * 200_000]})
        sizes.append((tmp_path / "queue.sqlite").stat().st_size)
    assert sizes[-1] <= max(sizes[:10])


def test_the_file_returns_the_space_of_what_is_removed(tmp_path):
    def blank():
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return db.execute("PRAGMA freelist_count").fetchone()[0], (tmp_path / "queue.sqlite").stat().st_size

    queue = store(tmp_path)
    db = queue._db
    names = [queue.submit("detect", {}, {"image": b"x" * 2_000_000}).id for _ in range(2)]
    assert blank()[1] > 4_000_000
    for name in names:
        queue.begin()
        queue.finish(name, "done", files={"images": [b"x" * 500_000]})
    free, size = blank()
    assert free == 0 and 1_000_000 < size < 1_500_000
    for name in names:
        queue.remove(name)
    free, size = blank()
    assert free == 0 and size < 200_000


def test_a_killed_server_begins_again_what_it_ran_and_keeps_the_order(tmp_path):
    names = submit(store(tmp_path), 3)
    db = store(tmp_path)
    assert db.begin().id == names[0]
    db = store(tmp_path)  # without closing the other
    db.recover()
    assert [db.begin().id for _ in names] == names
    assert db.get(names[0]).attempts == 2 and db.files(names[0], "input") == {"image": b"bytes"}


def test_detections_end_with_the_server_since_their_clients_have_gone(tmp_path):
    db = store(tmp_path)
    names = [db.submit("detect", {}, {"image": b"bytes"}).id for _ in range(3)]
    db.finish(db.begin().id, "done", files={"images": [b"edges"]})
    db.begin()
    (drawn,) = submit(db)
    db.recover()
    assert [db.get(name) for name in names] == [None] * 3
    assert db.begin().id == drawn and db.files(names[0], "images") == {}


def test_a_request_that_ends_the_worker_each_time_is_given_up(tmp_path):
    db = store(tmp_path)
    (name,) = submit(db)
    for _ in range(MOST_ATTEMPTS):
        assert db.begin().id == name
        db.recover()
    assert db.get(name).state == "failed" and db.get(name).code is None


def test_stopping_in_order_does_not_count(tmp_path):
    db = store(tmp_path)
    (name,) = submit(db)
    for _ in range(2 * MOST_ATTEMPTS):
        assert db.begin().id == name
        assert db.put_back(name, counted=False) == "pending"


def test_cancelling(tmp_path):
    db = store(tmp_path)
    running, waiting = submit(db, 2)
    db.begin()
    assert db.cancel(waiting).state == "cancelled"
    assert db.cancel(running).state == "running" and db.get(running).cancelling
    db.recover()  # cancelled, then killed
    assert db.get(running).state == "cancelled" and db.begin() is None
    db.finish(running, "done")
    assert db.get(running).state == "cancelled"  # ended once
    assert db.cancel("unknown") is None


def test_a_request_that_is_being_cancelled_is_not_begun(tmp_path, monkeypatch):
    db = store(tmp_path)
    (name,) = submit(db)
    finish, begun = db.finish, []
    thread = threading.Thread(target=lambda: begun.append(db.begin()))

    def finish_late(*values):
        thread.start()
        thread.join(0.2)  # `begin` has the time to take it, if nothing keeps it from that
        finish(*values)

    monkeypatch.setattr(db, "finish", finish_late)
    assert db.cancel(name).state == "cancelled"
    thread.join()
    assert begun == [None]


def test_options_stay(tmp_path):
    store(tmp_path).set_option("sd_vae", "own")
    assert store(tmp_path).options() == {"sd_vae": "own"}


def test_only_its_owner_reads_the_file(tmp_path):
    store(tmp_path)
    assert stat.S_IMODE((tmp_path / "queue.sqlite").stat().st_mode) == 0o600


def test_another_file_is_not_taken_for_a_queue(tmp_path):
    (tmp_path / "queue.sqlite").write_bytes(b"no database, but more than sixteen bytes" * 100)
    with refused("unreadable-file", "queue.sqlite"):
        store(tmp_path)
