"""The training loop."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from diffusers.training_utils import EMAModel

from controlkit.bases.devices import check_device, choose_device
from controlkit.errors import Interrupted, UserError, is_out_of_memory
from controlkit.files import writable_folder, write_json
from controlkit.sampling.settings import in_words
from controlkit.training.ahead import DataAhead, number_of_workers, worker_death
from controlkit.training.guards import LossMonitor, StallMonitor
from controlkit.training.log import NullLog, RunLog, is_timed, total_seconds
from controlkit.training.objective import Objective
from controlkit.training.optimizers import build_optimizer
from controlkit.training.patience import Patience
from controlkit.training.precision import attention_precision, uses_bf16
from controlkit.training.processes import Processes
from controlkit.training.readings import Reading, Readings
from controlkit.training.recipe import Recipe
from controlkit.training.results import Trained, TrainStep
from controlkit.training.run_folder import check_same_run, fingerprint, record_recipe, run_folder, schedule_changes
from controlkit.training.schedule import initial_schedule, resumed_schedule
from controlkit.training.sharding import copy_full, full_tensor, gathered
from controlkit.training.state import (
    RunState,
    keep_previous,
    load_latest,
    previous_state,
    restore,
    save_state,
    step_of,
)

_READ_SECONDS = 10.0
"""Longest time between readings of the loss, so that slow steps do not go on for long after a failure."""


def train(
    objective: Objective | Callable[[], Objective],
    recipe: Recipe,
    on_step: Callable[[TrainStep], object] | None = None,
) -> Trained:
    """Train `objective` by `recipe`, or resume the run in its folder.

    Data and noise of a step depend on (seed, step) only, so a resumed run ends with the same weights as one that was
    not interrupted. Ctrl-C and SIGTERM save the state and end. Under `accelerate launch` or `torchrun`, every process
    has its own batch, and gradients are averaged (`processes.py`).

    Args:
        objective: or a function that builds it, called once the folder is locked and checked.
        on_step: called after every step, in the first process. If it raises an exception, the state is saved (unless
            weights are sharded over processes), and the run ends with that exception.

    Raises:
        UserError: the device cannot be used, the folder has a run of another recipe, or the loss is not finite or
            diverged (the last good state stays).
        Interrupted: a signal ended the run.
    """
    device = choose_device(recipe.device)
    check_device(device)  # before its random state is forked
    seeded = [device] if device.type == "cuda" else []
    # Dropout and new networks seed torch's own generators, which are the caller's.
    with run_folder(recipe), torch.random.fork_rng(seeded):
        return _Loop(objective if isinstance(objective, Objective) else objective(), recipe, on_step).run()


class _Loop:
    def __init__(self, objective: Objective, recipe: Recipe, on_step: Callable[[TrainStep], object] | None) -> None:
        if recipe.patience is not None and not objective.has_merits:
            raise UserError(
                f"patience is {recipe.patience}, but the previews of this run have no held-out score to compare; set"
                " patience: null",
                "contradiction",
            )
        self.objective = objective
        self.recipe = recipe
        self.on_step = on_step
        self.folder = writable_folder(recipe.out)
        self.path = self.folder / "state.safetensors"
        self.processes = Processes(objective.parameters()[0].device)
        self.loss_of = self.processes.wrap(objective)
        self.parameters = objective.parameters()
        self.workers = number_of_workers(recipe.data_workers, self.parameters[0].device, objective.not_ahead)
        self.optimizer = build_optimizer(self.parameters, recipe)
        self.average: EMAModel | None = None
        if recipe.ema:
            together = self.parameters[0].device.type == "cuda" and not self.processes.sharded
            self.average = EMAModel(
                self.parameters, decay=recipe.ema, use_ema_warmup=True, power=0.75, foreach=together
            )
        self.processes.wait()  # for the first to prepare the folder
        state = _resume(self.path, recipe, objective, self.optimizer, self.average)
        self.first = 0 if state is None else state.step
        self._batches_per_step = recipe.gradient_accumulation_steps or 1
        done = None if state is None else state.batches
        self._batches_before = self.first * self._batches_per_step if done is None else done
        self.patience = None if recipe.patience is None else Patience(recipe.patience, self.folder / "best", self.first)
        self._enough_before = self.patience is not None and self.patience.exhausted
        self._stopped_before = self._enough_before and self.first < recipe.steps
        self._enough = False
        if state is None:
            self.schedule, note = initial_schedule(recipe)
        else:
            self.schedule, note = resumed_schedule(recipe, state.step, state.learning_rate, schedule_changes(recipe))
        if self._stopped_before:
            stopped = f"stopped by patience at step {self.first} of {recipe.steps}"
            note = f"{stopped}; raise or remove patience to go on (patience is {recipe.patience})"
        if self.processes.first and note:
            print(note, file=sys.stderr, flush=True)
        # A resumed run is checked against the recipe of its state: a changed one is recorded with the first new state.
        self._is_recorded = state is None or state.fingerprint == fingerprint(recipe)
        if self._is_recorded and not self._stopped_before:
            self._record()
        self.log = RunLog(self.folder, self.first, recipe.steps) if self.processes.first else NullLog()
        self.readings = Readings()
        self._read_at = time.monotonic()
        self._loss = math.nan
        self.monitor = LossMonitor(self.first)
        # Losses on other data are not comparable.
        if state is not None and state.loss_monitor is not None and state.data == objective.data:
            self.monitor.restore(state.loss_monitor, state.step)
        self.scores: dict[str, float] = {}
        self._scored_step = 0
        # A run that was killed in a preview has saved the state of its step, and logged nothing.
        due = self.first > 0 and self._is_previewed(self.first)
        self._misses_preview = self.processes.any(self.processes.first and due and self.log.last_step < self.first)
        if self.first and self.processes.first and not self._stopped_before:
            print(f"resuming at step {self.first} of {recipe.steps}", file=sys.stderr, flush=True)

    def run(self) -> Trained:
        try:
            with _interruptible() as signals, self._data_ahead():
                self._steps(signals)
        except RuntimeError as error:
            if (death := worker_death(error)) is not None:
                raise death from error
            raise
        finally:
            self.log.close()
        files: list[Path] = []
        finished_before = self.first >= self.recipe.steps or self._enough_before
        if finished_before and not self._misses_preview:
            self._preview(self.first)
        with averaged(self.average, self.parameters), gathered(self.objective.trained):
            if self.processes.first:
                files = self.objective.save(self.folder, self.recipe.steps)
        step, scores = self.recipe.steps, self.scores
        # A run that was finished before patience was set has judged no preview: its files are the result.
        if self.patience is not None and self.patience.judged and self.processes.first:
            files, step = self.patience.files(self.folder), self.patience.step
            scores = self.patience.scores or scores
        self.processes.wait()
        previews = sorted((self.folder / "previews").glob("*.png"))
        of_step = [path for path in previews if path.stem.isdecimal() and int(path.stem) == step]
        previews = of_step or previews
        return Trained(
            step=step,
            scores=scores,
            scored=self.objective.preview_settings,
            files=tuple(files),
            preview=previews[-1] if previews else None,
            seconds=total_seconds(self.folder),
            base_runs=self.objective.base_runs,
            finished_before=finished_before,
            stopped_before=self._stopped_before,
        )

    def _steps(self, signals: _Signals) -> None:
        if self._misses_preview:
            self._try_preview(self.first)
            self._log(self.first, previewed=True)
        if self._enough_before or self._enough:
            return
        stalls = StallMonitor()
        try:
            for step in range(self.first, self.recipe.steps):
                with stalls.step(step + 1):
                    self._step(step)
                    reads = self._is_read(step + 1)
                    stop = (reads or self.processes.any_is_cheap) and self.processes.any(signals.stop_requested)
                    if reads or stop:
                        self._read()
                if step == self.first:
                    self._say_how_the_base_runs()
                self._report(step + 1, stop)
                if stop:
                    message = f"stopped at step {step + 1} of {self.recipe.steps}; run the same command to resume"
                    raise Interrupted(message, signals.number)
                self._tell(step + 1)
                if self._enough:
                    return
        except RuntimeError as error:
            if not self.processes.is_peer_failure(error):
                raise
            signals.ending = True
            kept = "no state was saved yet"
            if self.path.exists():
                kept = f"the state of step {step_of(self.path)} is kept, and the same command resumes from it"
            raise UserError(
                f"another process of this run has ended, so this one ends too; {kept}. See the output of that process,"
                f" or the system's log if it was killed ({error})",
                "interrupted",
            ) from error

    @contextmanager
    def _data_ahead(self) -> Iterator[None]:
        """Prepare batches in worker processes within a block, if the recipe and its data allow it."""
        batches = range(self._batches_before, self._batches(self.recipe.steps).start)
        if not self.workers or not batches:
            yield
            return
        ahead = DataAhead(self.objective.prepare, batches, min(self.workers, len(batches)))
        self.objective.ahead = ahead
        try:
            yield
        finally:
            self.objective.ahead = None
            ahead.close()

    def _step(self, step: int) -> None:
        """One optimiser step. Reads nothing from the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.at(step)
        with self._memory(step):
            loss = self._gradients(step)
        by_time = self.objective.by_time
        limit = math.inf if self.recipe.max_grad_norm is None else self.recipe.max_grad_norm
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        summed = None if by_time is None else self.processes.sum(by_time)
        self.readings.add(step, self.processes.mean(loss), norm, summed)
        with self._memory(step):
            self.optimizer.step()
            if self.average is not None:
                self.average.step(self.parameters)

    def _is_read(self, done: int) -> bool:
        """Whether the numbers of the steps are read now: to log them, and before anything is saved or previewed."""
        recipe = self.recipe
        due = any(done % every == 0 for every in (recipe.log_every, recipe.save_every, recipe.preview_every))
        # Processes must agree, so only a single one goes by time, for slow steps.
        late = self.processes.count == 1 and time.monotonic() - self._read_at > _READ_SECONDS
        return due or late or done == recipe.steps or is_timed(done - self.first)

    def _read(self) -> None:
        """Read the numbers of the steps since the last reading, and check them in order.

        Weights may already have been changed by a step that fails here, but no state has been saved.
        """
        for reading in self.readings.read():
            self._check(reading)
            self._loss = reading.loss
        self._read_at = time.monotonic()

    def _check(self, reading: Reading) -> None:
        step, loss = reading.step, reading.loss
        if not math.isfinite(loss):
            self._restore_healthy_state()
            raise self._diverged(f"the loss is {loss}", step, loss)
        if self.monitor.has_diverged(loss, step, reading.by_time):
            self._restore_healthy_state()
            compared = "" if reading.by_time is None else ", compared at similar times t"
            ratio = f"recent losses are {self.monitor.excess:.3g} times the lowest{compared}"
            raise self._diverged(f"the loss diverged ({ratio})", step, loss)
        if not math.isfinite(reading.norm):
            raise self._diverged(f"the gradient norm is {reading.norm}", step, loss)

    def _say_how_the_base_runs(self) -> None:
        if self.processes.first and self.parameters[0].device.type == "cuda" and self.objective.base_runs:
            print(f"the base's denoiser runs as {self.objective.base_runs}", file=sys.stderr, flush=True)

    @contextmanager
    def _memory(self, step: int) -> Iterator[None]:
        """Turn out-of-memory errors into advice."""
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise _out_of_memory(self.recipe, step + 1, self.path) from error

    def _batches(self, step: int) -> range:
        """Numbers of the batches of a step. They go on where a resumed run has other numbers of batches per step."""
        first = self._batches_before + (step - self.first) * self._batches_per_step
        return range(first, first + self._batches_per_step)

    def _gradients(self, step: int) -> torch.Tensor:
        device = self.parameters[0].device
        batches = self._batches(step)
        total, by_time = torch.zeros((), device=device), None
        self.optimizer.zero_grad(set_to_none=True)
        # Each batch has its own random numbers, as the steps of a run with one batch per step have.
        bf16 = uses_bf16(self.recipe, device)
        recomputed = getattr(self.recipe, "gradient_checkpointing", False)
        with attention_precision(device, bf16=bf16, recomputed=recomputed):
            for batch in batches:
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = self.loss_of(batch) / len(batches)
                loss.backward()
                total += loss.detach().reshape(())
                if (sums := self.objective.by_time) is not None:
                    by_time = sums if by_time is None else by_time + sums
        self.objective.by_time = by_time
        return total

    def _report(self, done: int, stop: bool) -> None:
        """Save, preview and log if due. All processes call it; the first writes."""
        self.log.estimate(done)
        saved = self._is_saved(done) or stop
        if saved:
            self._save(done)
        previewed = self._is_previewed(done)
        if previewed:
            self._try_preview(done, saved=saved)
        if self._enough and not saved:
            self._save(done)
        if done % self.recipe.log_every == 0 or previewed or stop:
            self._log(done, previewed=previewed)

    def _log(self, done: int, *, previewed: bool) -> None:
        scored = self.objective.preview_settings if previewed and self.scores else {}
        loss = {} if math.isnan(self._loss) else {"loss": self._loss}  # a resumed run has none before its first step
        self.log.write(
            done,
            {
                **loss,
                **(self.scores if previewed else {}),
                "learning_rate": self.schedule.at(done - 1),
            },
            {"preview": scored} if scored else {},
        )
        beside = in_words(scored) if scored else ""
        if self.scores and not previewed:
            beside = f"preview of step {self._scored_step}"
        self.log.progress(done, {**loss, **self.scores}, beside)

    def _is_saved(self, done: int) -> bool:
        # With patience, a resumed run needs the state of every preview that has been judged.
        judged = self.patience is not None and self._is_previewed(done)
        return done % self.recipe.save_every == 0 or done == self.recipe.steps or judged

    def _is_previewed(self, done: int) -> bool:
        return done % self.recipe.preview_every == 0 or done == self.recipe.steps

    def _tell(self, done: int) -> None:
        """Call `on_step`."""
        if self.on_step is None or not self.processes.first:
            return
        steps = self.recipe.steps
        try:
            self.on_step(TrainStep(step=done, steps=steps, loss=self._loss, scores=dict(self.scores)))
        except BaseException:
            if not self.processes.sharded and not self._is_saved(done):
                self._read()  # losses are checked before anything is saved
                self._save(done)
            raise

    def _try_preview(self, done: int, saved: bool = True) -> None:
        try:
            self._preview(done)
        except Exception as error:
            # Otherwise, the same command would repeat steps before it fails at the same preview.
            if not saved and not self.processes.sharded:
                self._save(done)
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"out of memory in the preview after step {done}; the state of step {step_of(self.path)} is kept in"
                f" {self.path}. The same command makes this preview again; set preview_every above steps to preview"
                " only at the end",
                "out-of-memory",
            ) from error

    def _preview(self, step: int) -> None:
        with averaged(self.average, self.parameters), gathered(self.objective.trained):
            if self.processes.first:
                self.scores = self.objective.preview(step, writable_folder(self.folder / "previews"))
                self._scored_step = step
                is_new = step > self.first or self._misses_preview
                if self.patience is not None and is_new and step > self.patience.last_step:
                    merits = self.objective.merits(self.scores)
                    self._enough = self.patience.ends(step, self.scores, merits, self.objective.save)
        # All processes have to agree.
        self._enough = self.patience is not None and self.processes.any(self._enough)
        if self._enough and self.patience is not None and self.processes.first:
            print(
                f"stopped at step {step} of {self.recipe.steps}: no better score since step {self.patience.step}, whose"
                " weights are the result",
                file=sys.stderr,
                flush=True,
            )

    def _diverged(self, what: str, step: int, loss: float) -> UserError:
        """The error of a diverged run, after its last batch is written to diverged.json."""
        details = ""
        if self.processes.first:
            path = self.folder / "diverged.json"
            rate = self.schedule.at(step)
            samples = [name for batch in self._batches(step) for name in self.objective.samples(batch)]
            write_json(path, {"step": step + 1, "loss": repr(loss), "learning_rate": rate, "batch": samples})
            details = f" {path} lists the samples of this step." if samples else ""
        kept = "no state was saved yet"
        if self.path.exists():
            done = step_of(self.path)
            good = " good" if done <= self.monitor.healthy_step else ""
            kept = f"the last{good} state, of step {done}, is kept in {self.path}"
        advice = "Lower learning_rate, or check the data of this step"
        return UserError(f"{what} at step {step + 1}; {kept}.{details} {advice}", "diverged")

    def _restore_healthy_state(self) -> None:
        """Replace a state saved after the loss had risen by the previous one, if there is one."""
        previous = previous_state(self.path)
        if not self.processes.first or not (self.path.exists() and previous.exists()):
            return
        if step_of(self.path) > self.monitor.healthy_step:
            previous.replace(self.path)

    def _record(self) -> None:
        if self.processes.first:
            record_recipe(self.recipe)

    def _save(self, step: int) -> None:
        if self.processes.first and self.path.exists() and step_of(self.path) <= self.monitor.healthy_step:
            # A state saved after the loss had risen does not replace one from before.
            keep_previous(self.path)
        average = self.average
        save_state(
            self.path if self.processes.first else None,
            step=step,
            batches=self._batches(step).start,
            module=self.objective.trained,
            optimizer=self.optimizer,
            average=[] if average is None else [*average.shadow_params, torch.tensor(average.optimization_step)],
            fingerprint=fingerprint(self.recipe),
            data=self.objective.data,
            held_out=self.objective.held_out_data,
            frozen=self.objective.frozen,
            loss_monitor=self.monitor.state(),
        )
        if not self._is_recorded:
            self._record()
            self._is_recorded = True


@contextmanager
def averaged(average: EMAModel | None, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Use the averaged weights within a block."""
    if average is None:
        yield
        return
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)


def _resume(
    path: Path,
    recipe: Recipe,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    average: EMAModel | None,
) -> RunState | None:
    state = load_latest(path)
    if state is None:
        return None
    check_same_run(recipe, path, state.fingerprint, state.step)
    if state.frozen and state.frozen not in (objective.frozen, objective.frozen_before):
        raise UserError(
            "the weights or settings of the base, of the base control or of an image encoder have changed since the run"
            f" in {path.parent} began; set another out",
            "resume-mismatch",
        )
    if state.data and state.data != objective.data and Processes.is_first():
        print(
            f"note: the data has changed since the run in {path.parent} stopped. It resumes with the current data;"
            " images held out now may have been trained on before, which makes its scores too good",
            file=sys.stderr,
            flush=True,
        )
    elif state.held_out and state.held_out != objective.held_out_data and Processes.is_first():
        compared = "" if recipe.patience is None else ", with which patience compares them"
        print(
            f"note: the held-out data has changed since the run in {path.parent} stopped. Scores from now on are of"
            f" other samples than those before{compared}",
            file=sys.stderr,
            flush=True,
        )
    restore(state, path, objective.trained, optimizer)
    if average is not None and state.average:
        *shadow, count = state.average
        for parameter, saved in zip(average.shadow_params, shadow, strict=True):
            copy_full(parameter, saved)
        average.optimization_step = int(count)
    return state


def _out_of_memory(recipe: Recipe, step: int, path: Path) -> UserError:
    hints = [] if getattr(recipe, "gradient_checkpointing", True) else ["gradient_checkpointing true"]
    others = [f"batch_size {recipe.batch_size // 2}"] if recipe.batch_size > 1 else []
    others += ["precision bf16"] if recipe.precision == "fp32" else []
    if not path.exists():
        advice = f"set {' or '.join(hints + others)}" if hints or others else "this device is too small for it"
        return UserError(f"out of memory at step {step}; {advice}", "out-of-memory")
    resume = f"resume with {hints[0]}" if hints else ""
    restart = f"start again in another out with {' or '.join(others)}" if others else ""
    if recipe.batch_size > 1:
        restart += "; to resume with it, add change_on_resume=[batch_size]"
    advice = ", or ".join(filter(None, (resume, restart))) or "this device is too small for it"
    return UserError(f"out of memory at step {step}; the last state is kept in {path}; {advice}", "out-of-memory")


@dataclasses.dataclass
class _Signals:
    """Signals received during a run."""

    stop_requested: bool = False
    """Whether to save the state and end after this step."""
    number: int = signal.SIGTERM
    """The signal of the request; SIGTERM, which launchers send, if another process received it."""
    ending: bool = False
    """Whether the run ends by itself. It then ignores the SIGTERM that launchers send to all processes when one ends,
    so that it can print why."""


@contextmanager
def _interruptible() -> Iterator[_Signals]:
    """Within a block, the first Ctrl-C or SIGTERM requests a stop after the step; a second Ctrl-C ends at once."""
    signals = _Signals()

    def request_stop(number: int, _frame: FrameType | None) -> None:
        if signals.stop_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.stop_requested, signals.number = True, number

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, request_stop)
    except ValueError:  # not the main thread, which handles signals
        yield _Signals()
        return
    try:
        yield signals
    finally:
        for changed, handler in before.items():
            ignored = signals.ending and changed == signal.SIGTERM
            signal.signal(changed, signal.SIG_IGN if ignored else handler)
