"""Counters in Prometheus' text format."""

from __future__ import annotations

import threading
from collections.abc import Mapping

_HELP = {
    "controlkit_http_requests_total": ("counter", "HTTP requests that were answered"),
    "controlkit_images_total": ("counter", "images that were generated"),
    "controlkit_info": ("gauge", "version of the server"),
    "controlkit_job_seconds": ("summary", "seconds that requests ran"),
    "controlkit_jobs": ("gauge", "requests in the queue's file"),
    "controlkit_jobs_total": ("counter", "requests that ended"),
    "controlkit_refused_total": ("counter", "requests that a full queue refused"),
    "controlkit_steps_total": ("counter", "denoising steps"),
    "controlkit_worker_losses_total": ("counter", "workers that crashed or were killed"),
    "controlkit_worker_starts_total": ("counter", "workers that were started"),
}

Key = tuple[str, tuple[tuple[str, str], ...]]


class Metrics:
    """Counters by name and labels."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[Key, float] = {}

    def add(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add `amount` to the counter `name` with these labels."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def text(self, gauges: Mapping[Key, float]) -> str:
        """All counters, and these gauges, in Prometheus' text format.

        Args:
            gauges: (name, labels) -> current value.
        """
        with self._lock:
            values = {**self._values, **gauges}
        lines, seen = [], set()
        for (name, labels), value in sorted(values.items()):
            family = name.removesuffix("_sum").removesuffix("_count")
            if family in _HELP and family not in seen:
                seen.add(family)
                kind, text = _HELP[family]
                lines += [f"# HELP {family} {text}", f"# TYPE {family} {kind}"]
            marked = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
            number = str(int(value)) if value == int(value) else repr(value)
            lines.append(f"{name}{{{marked}}} {number}" if marked else f"{name} {number}")
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
