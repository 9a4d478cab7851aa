"""Nothing that was accepted is lost: by many clients, a killed worker, a killed server."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import threading
import time
from multiprocessing.context import SpawnProcess

import httpx
import pytest
from running import Command, base64_of, drawing, in_thread

from controlkit.server.limits import Limits
from controlkit.server.store import Store

SMALL = {"prompt": "red apple", "steps": 1}
LONG = {"prompt": "red apple", "steps": 60}
CLIENTS = 50


def memory_of(process: int) -> int:
    """Resident memory in bytes."""
    with open(f"/proc/{process}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_fifty_clients_at_once_get_their_images_and_memory_stays(tmp_path):
    with in_thread(tmp_path, limits=Limits(queue=CLIENTS, kept=CLIENTS)) as running:

        def all_at_once() -> list[int]:
            seeds = []

            def ask(seed: int) -> None:
                body = {**SMALL, "width": 64, "height": 64, "seed": seed}
                answer = httpx.post(f"{running.url}/sdapi/v1/txt2img", json=body, timeout=300, trust_env=False)
                seeds.append(seed if f'\\"seed\\": {seed},' in answer.text and answer.status_code == 200 else -1)

            threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(CLIENTS)]
            for thread in threads:
                thread.start()
            answered = running.get("/sdapi/v1/progress")  # the server answers meanwhile
            assert answered["state"]["job_count"] <= CLIENTS + 1
            for thread in threads:
                thread.join()
            return sorted(seeds)

        worker = running.service.supervisor
        used = []
        for _ in range(2):
            assert all_at_once() == list(range(CLIENTS))
            used.append((memory_of(os.getpid()), memory_of(worker.worker_pid)))
        for first, last in zip(used[0], used[-1], strict=True):
            assert last < first + 30 * 2**20
        text = running.client.get("/metrics").text
        assert f'controlkit_jobs_total{{state="done"}} {2 * CLIENTS}\n' in text
        assert "controlkit_worker_starts_total 1\n" in text
        assert running.service._waiting == {}


def test_a_killed_worker_costs_a_request_nothing_but_time(tmp_path):
    with in_thread(tmp_path) as running:
        first, second = running.submit(**LONG), running.submit(**SMALL)
        while running.status(first)["step"] < 5:
            time.sleep(0.01)
        os.kill(running.service.supervisor.worker_pid, signal.SIGKILL)
        assert running.wait(first)["state"] == running.wait(second)["state"] == "done"
        assert len(running.get(f"/controlkit/v1/jobs/{first}/result")["images"]) == 1
        assert "controlkit_worker_losses_total 1\n" in running.client.get("/metrics").text


def test_a_worker_that_cannot_be_started_is_started_later(tmp_path, monkeypatch):
    """As with too many open files, while clients hold connections."""
    with in_thread(tmp_path) as running:
        assert running.wait(running.submit(**SMALL))["state"] == "done"
        supervisor, failures = running.service.supervisor, []
        start = SpawnProcess.start

        def fail_twice(process):
            if len(failures) < 2:
                failures.append(process)
                raise OSError(errno.EMFILE, "Too many open files")
            start(process)

        monkeypatch.setattr(SpawnProcess, "start", fail_twice)
        os.kill(supervisor.worker_pid, signal.SIGKILL)
        assert running.wait(running.submit(**SMALL))["state"] == "done"
        assert len(failures) == 2 and running.client.get("/healthz").is_success


def test_the_queue_survives_an_exception(tmp_path, monkeypatch):
    with in_thread(tmp_path) as running:
        files, failures = running.service.store.files, []

        def fail_once(*values):
            if not failures:
                failures.append(values)
                raise MemoryError
            return files(*values)

        monkeypatch.setattr(running.service.store, "files", fail_once)
        assert running.wait(running.submit(**SMALL))["state"] == "done"
        assert len(failures) == 1


def test_a_stopped_queue_accepts_nothing(tmp_path):
    with in_thread(tmp_path) as running:
        running.service.supervisor.stop()
        for path in ("/controlkit/v1/jobs", "/sdapi/v1/txt2img", "/v1/images/generations"):
            answer = running.post(path, {"prompt": "x"})
            assert answer.status_code == 503 and "queue-stopped" in answer.text
        assert running.get("/controlkit/v1/jobs") == []


def test_a_request_whose_client_has_gone_is_cancelled(tmp_path):
    with in_thread(tmp_path) as running:
        body = {"prompt": "red apple", "steps": 150, "n_iter": 16, "batch_size": 1, "width": 64, "height": 64}
        with pytest.raises(httpx.ReadTimeout):
            running.post("/sdapi/v1/txt2img", body, timeout=3)
        (job,) = running.get("/controlkit/v1/jobs")
        assert running.wait(job["id"])["state"] == "cancelled"


def test_a_detection_whose_client_has_gone_is_cancelled_and_removed(tmp_path):
    with in_thread(tmp_path) as running:
        long = running.submit(**{**LONG, "steps": 150, "seeds": list(range(16)), "batch_size": 1})
        running.wait(long, "running")
        body = {"controlnet_module": "canny", "controlnet_images": [base64_of(drawing())]}
        with pytest.raises(httpx.ReadTimeout):
            running.post("/controlnet/detect", body, timeout=3)
        end = time.monotonic() + 60
        while len(running.get("/controlkit/v1/jobs")) > 1:
            assert time.monotonic() < end
        answers = []
        thread = threading.Thread(target=lambda: answers.append(running.post("/controlnet/detect", body)))
        thread.start()
        while (job := running.get("/controlkit/v1/jobs")[0])["kind"] != "detect":
            assert time.monotonic() < end
        running.post(f"/controlkit/v1/jobs/{job['id']}/cancel")
        thread.join(60)
        assert (answers[0].status_code, answers[0].json()["code"]) == (409, "not-finished")
        assert len(running.get("/controlkit/v1/jobs")) == 1


def test_clients_that_wait_learn_that_the_server_stops_and_where_their_result_will_be(tmp_path):
    answers = {}

    def ask(url, path, body):
        answers[path] = httpx.post(f"{url}{path}", json=body, timeout=300, trust_env=False)

    bodies = {
        "/sdapi/v1/txt2img": {"prompt": "red apple", "steps": 150, "n_iter": 16},
        "/v1/images/generations": {"prompt": "red apple"},
        "/controlnet/detect": {"controlnet_module": "canny", "controlnet_images": [base64_of(drawing())]},
    }
    with Command(tmp_path) as command:
        threads = []
        for count, (path, body) in enumerate(bodies.items(), 1):
            threads.append(threading.Thread(target=ask, args=(command.running.url, path, body)))
            threads[-1].start()
            while len(jobs := command.running.get("/controlkit/v1/jobs")) < count:
                assert threads[-1].is_alive()
    for thread in threads:
        thread.join(60)
    assert [answer.status_code for answer in answers.values()] == [503] * 3
    first = answers["/sdapi/v1/txt2img"].json()
    assert first["code"] == "unavailable" and f"/controlkit/v1/jobs/{jobs[2]['id']}/result" in first["message"]
    assert jobs[1]["id"] in answers["/v1/images/generations"].json()["error"]["message"]
    assert "again" in answers["/controlnet/detect"].json()["message"]
    assert "Traceback" not in command.log.read_text()


def test_a_full_disk_delays_a_result_and_loses_none(tmp_path, monkeypatch):
    with in_thread(tmp_path) as running:
        write, failures = running.service.store.finish, []

        def fail_twice(*values, **named):
            if len(failures) < 2:
                failures.append(values)
                raise sqlite3.OperationalError("database or disk is full")
            write(*values, **named)

        monkeypatch.setattr(running.service.store, "finish", fail_twice)
        assert running.wait(running.submit(**SMALL))["state"] == "done"
        assert len(failures) == 2


def test_a_request_that_takes_too_long_is_ended(tmp_path):
    with in_thread(tmp_path, limits=Limits(seconds=0.5)) as running:
        running.wait(running.submit(**SMALL))  # models are loaded, in time or not
        status = running.wait(running.submit(**{**LONG, "seeds": list(range(16))}))
        assert (status["state"], status["code"]) == ("failed", "out-of-range")


def test_a_server_that_is_killed_while_it_draws_goes_on_with_its_queue(tmp_path):
    with Command(tmp_path) as command:
        running = command.running
        names = [running.submit(**LONG), *(running.submit(**{**SMALL, "seeds": [seed]}) for seed in range(3))]
        while running.status(names[0])["step"] < 5:
            time.sleep(0.01)
        command.kill()
    with Command(tmp_path) as command:
        running = command.running
        assert [running.wait(name)["state"] for name in names] == ["done"] * 4
        order = [running.status(name)["finished"] for name in names]
        assert order == sorted(order)
        # SIGTERM: what runs goes back, and nothing is lost either.
        last = running.submit(**{**LONG, "seeds": list(range(16))})
        running.wait(last, "running")
    assert command.process.returncode == 128 + signal.SIGTERM
    lines = command.lines()
    assert {"began", "ended", "answered"} <= {line["event"] for line in lines}
    assert "red apple" not in command.log.read_text()
    db = Store(tmp_path / "queue.sqlite", queue=1, kept=9)
    assert (db.get(last).state, db.get(last).attempts) == ("pending", 0)
