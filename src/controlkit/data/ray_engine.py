"""Run jobs on Ray Data, for more images than one machine can handle."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from controlkit.data.jobs import Outcome, ShardJob
from controlkit.errors import UserError

MakeShard = Callable[[ShardJob], list[Outcome]]


def run_with_ray(make: MakeShard, jobs: Sequence[ShardJob], workers: int) -> Iterator[list[Outcome]]:
    """Yield `make(job)` of every shard as it finishes, each as a task of Ray Data.

    Ray reruns tasks whose worker died. Shards are written atomically and finished ones are not made again, so nothing
    is lost or duplicated. On a cluster (`RAY_ADDRESS`) all machines must share the folders.

    Args:
        workers: cores for a Ray that is started here; a running one keeps its own.

    Raises:
        UserError: Ray is not installed or does not start, or a shard failed repeatedly.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError(
            "--engine ray needs Ray Data: pip install 'controlkit[distributed]'", "missing-package"
        ) from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray has its own errors, from a wrong RAY_ADDRESS to a slow start
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot start Ray ({reason}); check RAY_ADDRESS, or leave out --engine ray", "device-unavailable"
            ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False

    def make_row(row: dict[str, Any]) -> dict[str, Any]:
        import cv2

        cv2.setNumThreads(1)
        outcomes = make(ShardJob.from_json(row["job"]))
        return {"outcomes": json.dumps([vars(outcome) for outcome in outcomes])}

    try:
        rows = [{"job": job.to_json()} for job in jobs]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(make_row, num_cpus=1)
        for row in results.iter_rows():
            yield [Outcome(**outcome) for outcome in json.loads(row["outcomes"])]
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"Ray failed ({reason}); run again, finished shards are kept", "device-unavailable") from error
    finally:
        if started:
            ray.shutdown()
