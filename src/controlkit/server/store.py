"""The queue: requests and their results in one SQLite file.

An accepted request is on the disk, so it survives a restart and a killed process. Its state goes from `pending` to
`running` to `done`, `failed` or `cancelled`.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from controlkit.errors import UserError
from controlkit.files import writable_folder

State = Literal["pending", "running", "done", "failed", "cancelled"]
FINISHED = ("done", "failed", "cancelled")
MOST_ATTEMPTS = 3
"""Attempts after which a request fails if each of them ended the worker or the server."""

_TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    spec TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    cancelling INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    started REAL,
    finished REAL,
    result TEXT,
    error TEXT,
    code TEXT
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, sequence);
CREATE TABLE IF NOT EXISTS files (
    job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    role TEXT NOT NULL,
    name TEXT NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (job, role, name)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS options (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class QueueFull(Exception):
    """The queue holds as many waiting requests as it may."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request in the queue."""

    id: str
    sequence: int
    """Grows with every request; the order of the queue."""
    kind: str
    """What the worker does: `generate` or `detect`."""
    state: State
    spec: dict[str, Any]
    """The request as values of JSON; images are names of its files."""
    attempts: int
    """How many times it was started."""
    cancelling: bool
    """Whether it was cancelled while it ran."""
    created: float
    started: float | None
    finished: float | None
    """Unix times in seconds."""
    result: dict[str, Any] | None
    """Seeds, settings and notes of its images, once it is done or cancelled."""
    error: str | None
    code: str | None
    """If it failed, a sentence and the code of a `UserError`; no code if the server is at fault."""


_COLUMNS = ", ".join(Job.__dataclass_fields__)


class Store:
    """The queue in the file `path`. All methods may be called from any thread.

    Args:
        queue: how many requests may wait.
        kept: how many finished ones of each kind are kept.

    Raises:
        UserError: the file cannot be written, or is not such a queue.
    """

    def __init__(self, path: str | Path, *, queue: int, kept: int) -> None:
        self.path, self._queue, self._kept = Path(path), queue, kept
        self._lock = threading.RLock()
        writable_folder(self.path.parent, "give --queue another file")
        try:
            # It holds prompts and images, which other users must not read.
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._db.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"--queue {path}: {error}; give another file", "unreadable-file") from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _jobs(self, query: str, *values: Any) -> list[Job]:
        with self._lock:
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM jobs {query}", values).fetchall()
        return [_job(row) for row in rows]

    def submit(self, kind: str, spec: Mapping[str, Any], files: Mapping[str, bytes]) -> Job:
        """Add a request to the end of the queue; when this returns, it is on the disk.

        Args:
            files: name -> bytes of its images.

        Raises:
            QueueFull: the queue is full.
        """
        name = uuid.uuid4().hex
        with self._transaction() as db:
            (waiting,) = db.execute("SELECT count(*) FROM jobs WHERE state = 'pending'").fetchone()
            if waiting >= self._queue:
                raise QueueFull
            db.execute(
                "INSERT INTO jobs (id, kind, state, spec, created) VALUES (?, ?, 'pending', ?, ?)",
                (name, kind, json.dumps(spec), time.time()),
            )
            self._write_files(name, "input", list(files.items()))
        job = self.get(name)
        assert job is not None
        return job

    def _write_files(self, job: str, role: str, files: Sequence[tuple[str, bytes]]) -> None:
        self._db.executemany("INSERT INTO files VALUES (?, ?, ?, ?)", [(job, role, *each) for each in files])

    def begin(self) -> Job | None:
        """Take the first request that waits, which is then `running`; None if none waits."""
        with self._transaction() as db:
            row = db.execute("SELECT id FROM jobs WHERE state = 'pending' ORDER BY sequence LIMIT 1").fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET state = 'running', attempts = attempts + 1, started = ? WHERE id = ?",
                (time.time(), row[0]),
            )
        return self.get(row[0])

    def put_back(self, name: str, *, counted: bool) -> State:
        """Return a running request to its place in the queue, or end it if it was cancelled or has no attempts left.

        Args:
            counted: whether the attempt counts; it does not if the server was stopped normally.

        Returns:
            Its state after that.
        """
        job = self.get(name)
        if job is None or job.state != "running":
            return "failed" if job is None else job.state
        if job.cancelling:
            self.finish(name, "cancelled")
            return "cancelled"
        attempts = job.attempts if counted else job.attempts - 1
        if attempts >= MOST_ATTEMPTS:
            self.finish(name, "failed", error=f"the worker ended {attempts} times while it worked on this request")
            return "failed"
        with self._transaction() as db:
            db.execute(
                "UPDATE jobs SET state = 'pending', started = NULL, attempts = ? WHERE id = ? AND state = 'running'",
                (attempts, name),
            )
        return "pending"

    def recover(self) -> None:
        """Return requests to the queue that were running when the server was killed. Those of `detect` are removed: no
        client waits for them any more."""
        with self._transaction() as db:
            db.execute("DELETE FROM jobs WHERE kind = 'detect'")
        for job in self._jobs("WHERE state = 'running'"):
            self.put_back(job.id, counted=True)

    def finish(
        self,
        name: str,
        state: State,
        *,
        result: Mapping[str, Any] | None = None,
        files: Mapping[str, Sequence[bytes]] | None = None,
        error: str | None = None,
        code: str | None = None,
    ) -> None:
        """End a request, and remove the oldest results beyond those that are kept.

        Args:
            result: values of JSON.
            files: role -> images, in order.
        """
        with self._transaction() as db:
            changed = db.execute(
                "UPDATE jobs SET state = ?, finished = ?, result = ?, error = ?, code = ?"
                " WHERE id = ? AND state IN ('pending', 'running')",
                (state, time.time(), None if result is None else json.dumps(result), error, code, name),
            )
            if changed.rowcount:
                db.execute("DELETE FROM files WHERE job = ?", (name,))
                for role, images in (files or {}).items():
                    self._write_files(name, role, [(f"{number:06}", data) for number, data in enumerate(images)])
            # Each kind by itself, so that condition images do not take the place of results.
            db.execute(
                "DELETE FROM jobs WHERE sequence IN (SELECT sequence FROM jobs WHERE state IN"
                " ('done', 'failed', 'cancelled') AND kind = (SELECT kind FROM jobs WHERE id = ?)"
                " ORDER BY finished DESC, sequence DESC LIMIT -1 OFFSET ?)",
                (name, self._kept),
            )
        self._shrink()

    def _shrink(self) -> None:
        """Return the pages of deleted rows to the disk."""
        with self._lock:
            # `execute` would free one page: the pragma frees one at each step, and returns no row.
            self._db.executescript("PRAGMA incremental_vacuum")

    def remove(self, name: str) -> None:
        """Remove a request that has ended, and its files."""
        with self._transaction() as db:
            db.execute("DELETE FROM jobs WHERE id = ? AND state IN ('done', 'failed', 'cancelled')", (name,))
        self._shrink()

    def cancel(self, name: str) -> Job | None:
        """Cancel a request, at once if it waits, within a step if it runs; and return it, or None if it is unknown."""
        with self._lock:  # else `begin` could take it before it is finished here, and it would run to its end
            with self._transaction() as db:
                db.execute("UPDATE jobs SET cancelling = 1 WHERE id = ? AND state = 'running'", (name,))
                waiting = db.execute("SELECT 1 FROM jobs WHERE id = ? AND state = 'pending'", (name,)).fetchone()
            if waiting:
                self.finish(name, "cancelled")
            return self.get(name)

    def get(self, name: str) -> Job | None:
        """The request of this id, or None."""
        found = self._jobs("WHERE id = ?", name)
        return found[0] if found else None

    def running(self) -> Job | None:
        """The running request, or None."""
        found = self._jobs("WHERE state = 'running' LIMIT 1")
        return found[0] if found else None

    def recent(self, count: int) -> list[Job]:
        """The last `count` requests, the newest first."""
        return self._jobs("ORDER BY sequence DESC LIMIT ?", count)

    def files(self, name: str, role: str) -> dict[str, bytes]:
        """Name -> bytes of the images of a request, in order; `role` is `input`, or a role of its result."""
        with self._lock:
            rows = self._db.execute(
                "SELECT name, data FROM files WHERE job = ? AND role = ? ORDER BY name", (name, role)
            ).fetchall()
        return dict(rows)

    def place(self, job: Job) -> int:
        """Number of requests before `job`, the running one included; 0 if it does not wait."""
        if job.state != "pending":
            return 0
        with self._lock:
            (before,) = self._db.execute(
                "SELECT count(*) FROM jobs WHERE state = 'running' OR (state = 'pending' AND sequence < ?)",
                (job.sequence,),
            ).fetchone()
        return int(before)

    def counts(self) -> dict[str, int]:
        """State -> number of requests in the file."""
        with self._lock:
            rows = self._db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall()
        return {"pending": 0, "running": 0, **dict(rows)}

    def options(self) -> dict[str, Any]:
        """Options that clients have set: name -> value."""
        with self._lock:
            rows = self._db.execute("SELECT name, value FROM options").fetchall()
        return {name: json.loads(value) for name, value in rows}

    def set_option(self, name: str, value: Any) -> None:
        """Store an option; it survives restarts."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO options VALUES (?, ?)", (name, json.dumps(value)))


def _job(row: Sequence[Any]) -> Job:
    values = dict(zip(Job.__dataclass_fields__, row, strict=True))
    values["spec"] = json.loads(values["spec"])
    values["result"] = None if values["result"] is None else json.loads(values["result"])
    return Job(**{**values, "cancelling": bool(values["cancelling"])})
