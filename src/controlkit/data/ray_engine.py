"""The same jobs on Ray Data, for more images than one machine makes pairs of."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from controlkit.data.jobs import Outcome, ShardJob
from controlkit.errors import UserError

MakeShard = Callable[[ShardJob], list[Outcome]]


def run_with_ray(make: MakeShard, jobs: Sequence[ShardJob], workers: int) -> Iterator[list[Outcome]]:
    """`make(job)` of every shard, as they finish, each a task of Ray Data.

    Ray runs a task again whose worker died. A shard appears under its name only when it is whole, and a finished one
    is not made again, so nothing is lost and nothing doubled. On a cluster (`RAY_ADDRESS`) all machines have to share
    the folders.

    Args:
        workers: cores of a Ray that is started here; one that runs already keeps its own.

    Raises:
        UserError: Ray is not installed, or a shard failed for good.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UserError("--engine ray needs Ray Data: pip install 'controlkit[distributed]'") from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # from a wrong RAY_ADDRESS to a machine too busy to start it in time, all its own
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"Ray does not start ({reason}); see to RAY_ADDRESS, or leave out --engine ray") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False

    def make_row(row: dict[str, Any]) -> dict[str, Any]:
        import cv2

        cv2.setNumThreads(1)
        outcomes = make(ShardJob.from_json(row["job"]))
        return {"outcomes": json.dumps([vars(outcome) for outcome in outcomes])}

    try:
        rows = [{"job": job.to_json()} for job in jobs]
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(make_row, num_cpus=1)
        for row in made.iter_rows():
            yield [Outcome(**outcome) for outcome in json.loads(row["outcomes"])]
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"Ray gave up ({reason}); run again, finished shards are kept") from error
    finally:
        if started:
            ray.shutdown()
