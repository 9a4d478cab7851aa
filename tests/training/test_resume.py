"""A run that is interrupted, however rudely, ends with the weights of one that was not."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from several_processes import torchrun
from toy_training import Toy, toy_recipe

from controlkit.apps.cli import main
from controlkit.errors import Interrupted, UserError
from controlkit.training import state
from controlkit.training.guards import LossMonitor, StallMonitor
from controlkit.training.log import total_seconds
from controlkit.training.results import Trained
from controlkit.training.state import load_state
from controlkit.training.trainer import train
from refusals import refused

STEPS = 9
WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is available")


def run(out, steps=STEPS, at=None, **changes):
    recipe = toy_recipe(out, steps, **changes)
    toy = Toy(recipe, at)
    scores = train(toy, recipe).scores
    return toy, scores


def final_weights(out):
    return torch.load(Path(out) / "weights.pt", weights_only=True)


def assert_identical(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def raises(error):
    def act(_loss):
        raise error

    return act


@pytest.mark.parametrize("ema", [None, 0.9])
@pytest.mark.parametrize("died_in_step", [3, 4, 5, 8])
def test_a_run_that_died_goes_on_to_the_same_weights_bit_by_bit(tmp_path, ema, died_in_step):
    whole, _ = run(tmp_path / "whole", ema=ema)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "broken", ema=ema, at={died_in_step: raises(RuntimeError("power cut"))})
    continued, scores = run(tmp_path / "broken", ema=ema)
    assert continued.steps_seen == list(range(died_in_step // 3 * 3, STEPS))
    assert_identical(whole.weights(), continued.weights())
    assert_identical(final_weights(tmp_path / "whole"), final_weights(tmp_path / "broken"))
    assert scores == {"score": 9.0}


def test_the_log_has_every_step_once_after_a_resume(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, at={5: raises(RuntimeError("power cut"))})
    with (tmp_path / "log.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')  # torn by the cut
    run(tmp_path)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["loss"] > 0 for line in lines)
    assert [line["step"] for line in lines if "score" in line] == [3, 6, 9]


def test_every_preview_is_in_the_log_whatever_log_every_is(tmp_path):
    run(tmp_path, steps=8, log_every=4, preview_every=3)
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [3, 4, 6, 8]
    assert [line["step"] for line in lines if "score" in line] == [3, 6, 8]


def test_progress_says_of_which_earlier_step_its_scores_are(tmp_path, capsys):
    run(tmp_path, steps=5, preview_every=3)
    lines = {line.split("/")[0]: line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")}
    assert "score" not in lines["step 2"]
    assert "score 3" in lines["step 3"] and "preview of" not in lines["step 3"]
    assert "score 3 (preview of step 3)" in lines["step 4"]
    assert "score 5" in lines["step 5"] and "preview of" not in lines["step 5"]


def test_a_finished_run_goes_on_when_it_is_given_more_steps(tmp_path):
    run(tmp_path, steps=6)
    more, _ = run(tmp_path, steps=9)
    assert more.steps_seen == [6, 7, 8]
    again, scores = run(tmp_path, steps=9)
    assert again.steps_seen == []
    assert scores == {"score": 9.0}
    assert_identical(more.weights(), final_weights(tmp_path))


def test_another_recipe_does_not_go_on_with_this_run(tmp_path):
    run(tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()
    with refused("resume-mismatch", tmp_path, "seed: 0 there, 1 now", "out"):
        run(tmp_path, seed=1)
    with refused("resume-mismatch", tmp_path, "width"):
        run(tmp_path, width=16)
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "recipe.json").read_text())["seed"] == 0


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_damaged_state_is_refused_in_words(tmp_path, keep):
    run(tmp_path, steps=3)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with refused("damaged-file", path):
        run(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_from_a_damaged_state_a_run_goes_back_to_the_one_before(tmp_path, keep, capsys):
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "torn", at={7: raises(RuntimeError("power cut"))})
    path = tmp_path / "torn" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    continued, _ = run(tmp_path / "torn")
    assert "of step 3" in capsys.readouterr().err
    assert continued.steps_seen == list(range(3, STEPS))
    assert_identical(whole.weights(), continued.weights())


def test_a_full_disk_leaves_the_state_that_was_there(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"part of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "run", at={4: raises(RuntimeError("power cut"))})
    with monkeypatch.context() as patch:
        patch.setattr("controlkit.training.state.save_file", full)
        with pytest.raises(UserError, match="No space left"):
            run(tmp_path / "run")
    assert load_state(tmp_path / "run" / "state.safetensors").step == 3
    continued, _ = run(tmp_path / "run")
    whole, _ = run(tmp_path / "whole")
    assert continued.steps_seen == list(range(3, STEPS))
    assert_identical(whole.weights(), continued.weights())


def test_a_run_keeps_two_states_and_no_more(tmp_path):
    run(tmp_path)
    kept = {path.name: load_state(path).step for path in tmp_path.glob("*.safetensors")}
    assert kept == {"state.safetensors": 9, "state.previous.safetensors": 6}


def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_the_last_state(tmp_path):
    with refused("diverged", "nan", "step 6", "learning_rate"):
        run(tmp_path, at={5: lambda loss: loss * float("nan")})
    assert load_state(tmp_path / "state.safetensors").step == 3
    whole, _ = run(tmp_path / "whole")
    continued, _ = run(tmp_path)
    assert_identical(whole.weights(), continued.weights())


def test_a_gradient_that_is_not_a_number_does_not_reach_the_state(tmp_path):
    """The loss itself is finite; the weights would be NaN, and this is a step that saves."""
    with refused("diverged", "gradient", "step 6"):
        run(tmp_path, at={5: lambda loss: loss + (loss - loss.detach()).sqrt()})
    state = load_state(tmp_path / "state.safetensors")
    assert state.step == 3
    assert all(value.isfinite().all() for value in state.weights.values())


def test_the_batch_that_did_it_is_written_down(tmp_path):
    with refused("diverged", tmp_path / "diverged.json"):
        run(tmp_path, at={5: lambda loss: loss * float("nan")})
    details = json.loads((tmp_path / "diverged.json").read_text())
    assert details["step"] == 6
    assert details["batch"] == ["numbers of step 5"]


def test_an_exploding_loss_ends_the_run_with_a_state_from_before_it(tmp_path):
    """The loss of single steps may be anything; here it rises and stays, and two states are saved meanwhile."""
    rising = {step: lambda loss, by=1.06 ** (step - 149): loss + by for step in range(150, 400)}
    flat = {step: lambda loss: loss * 0 + 0.2 * (1 + 3 * (torch.rand(1) > 0.9)) for step in range(150)}
    with refused("diverged", "loss", "times the lowest") as caught:
        run(tmp_path, steps=400, at={**flat, **rising}, save_every=10, preview_every=500)
    step = load_state(tmp_path / "state.safetensors").step
    assert 130 <= step <= 155
    assert f"of step {step}" in str(caught.value)


def test_a_loss_that_only_varies_is_no_explosion():
    rng = np.random.default_rng(0)
    monitor = LossMonitor(0)
    assert not any(monitor.has_diverged(float(loss), step) for step, loss in enumerate(rng.exponential(0.1, 20_000)))


def test_a_step_that_hangs_is_told_with_its_place():
    """The second step waits until it is told of; the others may take as long as a busy machine lets them."""
    said = []
    patience = StallMonitor(least=3600, slower=1.0, warn=said.append)
    for number in (1, 2, 3):
        patience.least = 0.05 if number == 2 else 3600
        with patience.step(number):
            while number == 2 and not said:
                time.sleep(0.01)
    assert len(said) == 1
    assert "step 2 " in said[0]
    assert "test_resume.py" in said[0]


def test_nothing_is_promised_that_is_not_there(tmp_path):
    with refused("diverged", "step 2", "no state") as caught:
        run(tmp_path, at={1: lambda loss: loss * float("inf")})
    assert "kept" not in str(caught.value)
    assert not (tmp_path / "state.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_after_its_step_and_ends(tmp_path, number):
    before = signal.getsignal(number)

    def ctrl_c(loss):
        signal.raise_signal(number)
        return loss

    with pytest.raises(Interrupted, match=f"step 5 of {STEPS}") as caught:
        run(tmp_path, at={4: ctrl_c})
    assert caught.value.signal == number
    assert signal.getsignal(number) == before
    assert load_state(tmp_path / "state.safetensors").step == 5
    whole, _ = run(tmp_path / "whole")
    continued, _ = run(tmp_path)
    assert continued.steps_seen == [5, 6, 7, 8]
    assert_identical(whole.weights(), continued.weights())
    assert [line["step"] for line in log_of(tmp_path)] == list(range(1, STEPS + 1))


def test_the_caller_is_told_of_every_step_and_may_end_the_run_at_any(tmp_path):
    class Enough(Exception):
        pass

    told = []

    def on_step(step):
        told.append((step.step, step.steps))
        assert math.isfinite(step.loss) or step.step == 1
        if step.step == 5:
            raise Enough

    recipe = toy_recipe(tmp_path, STEPS)
    with pytest.raises(Enough):
        train(Toy(recipe), recipe, on_step)
    assert load_state(tmp_path / "state.safetensors").step == 5
    whole, _ = run(tmp_path / "whole")
    continued = Toy(recipe)
    train(continued, recipe, lambda step: told.append((step.step, step.steps)))
    assert told == [(number, STEPS) for number in range(1, STEPS + 1)]
    assert_identical(whole.weights(), continued.weights())


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def impatient(loss):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return loss

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, at={4: impatient})
    assert load_state(tmp_path / "state.safetensors").step == 3


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The folder of two runs that were killed with their process: in the middle of a step, and of writing a state."""
    folder = tmp_path_factory.mktemp("killed")
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "toy_training.py"), str(folder), str(STEPS), "alone"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert [process.stdout.readline().strip() for _ in range(2)] == ["slow", "half"]
    finally:
        process.kill()
        _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    return folder


@pytest.mark.parametrize(("how", "left_at"), [("slow", 6), ("half", 3)])
def test_a_killed_process_goes_on_from_its_last_whole_state(tmp_path, killed, how, left_at):
    assert load_state(killed / how / "state.safetensors").step == left_at
    continued, _ = run(killed / how, ema=0.9)
    assert continued.steps_seen == list(range(left_at, STEPS))
    whole, _ = run(tmp_path / "whole", ema=0.9)
    assert_identical(whole.weights(), continued.weights())
    assert_identical(final_weights(tmp_path / "whole"), final_weights(killed / how))
    assert [line["step"] for line in log_of(killed / how)] == list(range(1, STEPS + 1))
    leftovers = {path.name for path in (killed / how).iterdir() if path.name.startswith(".")}
    assert leftovers == {".lock"}  # what keeps a second run out; temporary files are gone


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    def second(loss):
        with refused("in-use", tmp_path / "run", "out"):
            run(tmp_path / "run")
        return loss

    toy, _ = run(tmp_path / "run", at={2: second})
    assert toy.steps_seen == list(range(STEPS))
    # The folder is free again afterwards.
    run(tmp_path / "run", steps=STEPS + 1)


def test_out_of_memory_says_which_setting_to_change(tmp_path):
    full = raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    kept = tmp_path / "run" / "state.safetensors"
    with refused("out-of-memory", "step 5", kept, "another out", "batch_size 16", "precision bf16"):
        run(tmp_path / "run", at={4: full})
    assert load_state(tmp_path / "run" / "state.safetensors").step == 3
    with refused("out-of-memory", "step 1", "too small"):
        run(tmp_path / "other", at={0: full}, batch_size=1, precision="bf16")


@pytest.mark.slow  # two launches by torchrun, which has to notice a death: six imports of torch and diffusers
def test_when_one_of_two_processes_is_killed_the_run_ends_and_can_go_on(tmp_path):
    def together(how):
        return torchrun([Path(__file__).parent / "toy_training.py", tmp_path / "run", STEPS, how])

    broken = together("killed")
    assert broken.returncode != 0
    assert load_state(tmp_path / "run" / "state.safetensors").step == 6
    assert "another process of this run has ended" in broken.stderr, broken.stderr
    assert "the state of step 6 is kept" in broken.stderr
    continued = together("whole")
    assert continued.returncode == 0, continued.stderr
    run(tmp_path / "whole", ema=0.9)  # both processes draw the same, so one alone has the same mean gradient
    assert_identical(final_weights(tmp_path / "whole"), final_weights(tmp_path / "run"))
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_a_truncated_state_never_becomes_the_previous_one(tmp_path, monkeypatch, capsys):
    """The disk that truncated a state is often full at the next."""
    run(tmp_path, steps=6)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with monkeypatch.context() as patched, pytest.raises(UserError, match="no space"):
        patched.setattr(state, "write_atomically", lambda *_: raises(UserError("no space", "write-failed"))(0))
        run(tmp_path, steps=9)
    messages = capsys.readouterr().err
    assert "state.damaged.safetensors" in messages and "of step 3" in messages
    assert (tmp_path / "state.damaged.safetensors").stat().st_size == 200
    toy, _ = run(tmp_path, steps=9)
    assert toy.steps_seen == [3, 4, 5, 6, 7, 8]
    assert load_state(path).step == 9


def test_memory_that_does_not_suffice_for_a_preview_costs_no_step(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Toy, "preview", lambda *_: raises(torch.OutOfMemoryError("CUDA out of memory"))(0))
        with refused("out-of-memory", "preview", "step 2", "preview_every"):
            run(tmp_path, preview_every=2)
    assert load_state(tmp_path / "state.safetensors").step == 2
    toy, _ = run(tmp_path, preview_every=4)
    assert toy.steps_seen[0] == 2 and toy.previews[0] == 4


def test_training_leaves_the_random_state_of_its_caller(tmp_path):
    before = torch.get_rng_state()

    def reseeds(loss):
        torch.manual_seed(7)  # as dropout does
        return loss

    recipe = toy_recipe(tmp_path, 2)
    train(lambda: Toy(recipe, {1: reseeds}), recipe)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=WITHOUT_CUDA)])
def test_a_device_that_cannot_be_used_is_refused_before_anything_is_written(device, tmp_path):
    with refused("device-unavailable", f"device {device} cannot be used here", "try cpu"):
        train(lambda: pytest.fail("loaded"), toy_recipe(tmp_path / "run", device=device))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("last", [2, STEPS])
def test_a_preview_that_a_kill_prevented_is_made_when_the_run_is_resumed(last, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched, pytest.raises(KeyError):
        patched.setattr(Toy, "preview", lambda *_: raises(KeyError("killed"))(0))
        run(tmp_path, preview_every=last, save_every=last)
    toy, _ = run(tmp_path, preview_every=last, save_every=last)
    assert toy.steps_seen == list(range(last, STEPS)) and toy.previews[0] == last
    assert len(set(toy.previews)) == len(toy.previews)
    (line,) = [line for line in log_of(tmp_path) if line["step"] == last]
    assert line["score"] == last and "loss" not in line
    (shown,) = [told for told in capsys.readouterr().err.splitlines() if told.startswith(f"step {last}/")]
    assert "loss" not in shown and "left" not in shown  # no step has been done yet
    again, _ = run(tmp_path, preview_every=last, save_every=last)
    assert again.previews == [STEPS]  # of a finished run, for its scores


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
    ids=["numpy", "torch on the CPU"],
)
def test_memory_of_every_kind(tmp_path, error, monkeypatch):
    with refused("out-of-memory", "step 1", "set batch_size"):
        run(tmp_path / "a", at={0: raises(error)}, batch_size=4)
    with monkeypatch.context() as patched, refused("out-of-memory", "step 1"):
        patched.setattr(torch.optim.AdamW, "step", lambda *_, **__: raises(error)(0))
        run(tmp_path / "b")
    with pytest.raises(RuntimeError, match="something else"):
        run(tmp_path / "c", at={0: raises(RuntimeError("something else"))})


def test_a_loss_that_explodes_at_once_is_noticed():
    monitor = LossMonitor(0)
    assert not any(monitor.has_diverged(0.1, step) for step in range(10))
    assert monitor.has_diverged(1e6, 10)


def test_fewer_steps_than_were_done_are_refused(tmp_path):
    run(tmp_path, steps=6)
    before = (tmp_path / "recipe.json").read_bytes()
    with refused("resume-mismatch", "6 steps", "steps is 3"):
        run(tmp_path, steps=3)
    assert (tmp_path / "recipe.json").read_bytes() == before


def test_a_folder_that_is_refused_is_refused_before_anything_is_loaded(tmp_path):
    run(tmp_path)
    with refused("resume-mismatch", "seed: 0 there, 1 now"):
        train(lambda: pytest.fail("loaded"), toy_recipe(tmp_path, seed=1))


def test_a_log_that_is_damaged_stops_no_run_and_is_told_of(tmp_path, capsys):
    run(tmp_path, steps=3)
    with (tmp_path / "log.jsonl").open("ab") as stream:
        stream.write(b"null\n\xff\xfe\n")
    run(tmp_path, steps=6)
    note = capsys.readouterr().err
    assert "note: " in note and "2 unreadable lines" in note and "log.jsonl" in note
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_slow_explosion_ends_with_a_state_from_before_it_however_often_it_was_saved(tmp_path):
    rising = {step: lambda loss, by=1.012 ** (step - 99): loss * 0 + by for step in range(100, 400)}
    flat = {step: lambda loss: loss * 0 + 1.0 for step in range(100)}
    with refused("diverged", "last good state", tmp_path / "state.safetensors"):
        run(tmp_path, steps=400, at={**flat, **rising}, save_every=20, preview_every=500)
    assert load_state(tmp_path / "state.safetensors").step <= 180  # where the mean was below twice its lowest


def test_a_preview_that_fails_costs_no_step(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Toy, "preview", lambda *_: raises(UserError("no weights", "missing-weights"))(0))
        with pytest.raises(UserError, match="no weights"):
            run(tmp_path, save_every=100, preview_every=4)
    assert load_state(tmp_path / "state.safetensors").step == 4
    continued, _ = run(tmp_path, save_every=100, preview_every=4)
    assert continued.steps_seen == list(range(4, STEPS))


def test_the_log_counts_the_time_of_all_parts(tmp_path):
    def slow(loss):
        time.sleep(0.05)
        return loss

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path, at={0: slow, 1: slow, 2: slow, 3: raises(RuntimeError("power cut"))})
    before = total_seconds(tmp_path)
    run(tmp_path, at=dict.fromkeys(range(3, STEPS), slow))
    seconds = [line["seconds"] for line in log_of(tmp_path)]
    assert seconds == sorted(seconds)
    assert before >= 0.15
    assert total_seconds(tmp_path) == pytest.approx(seconds[-1])
    assert total_seconds(tmp_path) >= before + 0.3


def test_a_resumed_run_says_from_where(tmp_path, capsys):
    with pytest.raises(UserError):
        run(tmp_path, at={7: raises(UserError("stop", "bad-data"))})
    assert "resuming" not in capsys.readouterr().err
    run(tmp_path)
    assert f"resuming at step 6 of {STEPS}" in capsys.readouterr().err


@pytest.mark.parametrize("asked_again", [True, False])
def test_a_run_of_another_batch_size_resumes_from_the_state_before_the_change(asked_again, tmp_path):
    changes = {"batch_size": 8, "change_on_resume": ("batch_size",)}
    run(tmp_path, steps=4, batch_size=16)
    run(tmp_path, steps=6, **changes)
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    if not asked_again:
        with refused("resume-mismatch", "batch_size: 16 there, 8 now", "change_on_resume=[batch_size]"):
            run(tmp_path, steps=6, batch_size=8)
    for steps in (6, 7):
        toy, _ = run(tmp_path, steps=steps, **changes)
        assert toy.steps_seen[-1] == steps - 1
    assert load_state(path).step == 7


@pytest.mark.parametrize(("before", "after"), [(None, 1), (1, None)])
def test_one_batch_per_step_is_the_default(before, after, tmp_path):
    run(tmp_path, steps=4, gradient_accumulation_steps=before)
    toy, _ = run(tmp_path, steps=6, gradient_accumulation_steps=after)
    assert toy.steps_seen == [4, 5]


def test_a_run_of_fewer_batches_per_step_goes_on_with_the_next_batch(tmp_path):
    changes = {"change_on_resume": ("gradient_accumulation_steps",)}
    run(tmp_path, steps=3, gradient_accumulation_steps=4)
    toy, _ = run(tmp_path, steps=6, gradient_accumulation_steps=1, **changes)
    assert toy.steps_seen == [12, 13, 14]  # after 3 steps of 4
    toy, _ = run(tmp_path, steps=8, gradient_accumulation_steps=2, **changes)
    assert toy.steps_seen == [15, 16, 17, 18]


def test_another_batch_size_resumes_when_it_is_asked_for(tmp_path):
    run(tmp_path, steps=4, batch_size=16)
    with refused("resume-mismatch", "batch_size: 16 there, 8 now", "change_on_resume=[batch_size]"):
        run(tmp_path, steps=6, batch_size=8)
    with refused("resume-mismatch", "batch_size", "seed") as caught:
        run(tmp_path, steps=6, batch_size=8, seed=5)
    assert "change_on_resume" not in str(caught.value)
    with refused("resume-mismatch", "seed: 0 there, 5 now"):
        run(tmp_path, steps=6, batch_size=8, seed=5, change_on_resume=("batch_size",))
    with refused("unknown-name", "'seed'", "batch_size"):
        toy_recipe(tmp_path, change_on_resume=("seed",))
    toy, _ = run(tmp_path, steps=6, batch_size=8, change_on_resume=("batch_size",))
    assert toy.steps_seen == [4, 5]
    toy, _ = run(tmp_path, steps=7, batch_size=8)  # from now on it is a run of this batch size
    assert toy.steps_seen == [6]


def test_a_change_that_saved_no_state_can_be_changed_again(tmp_path):
    run(tmp_path, steps=4, batch_size=16)
    changed = {"steps": 6, "change_on_resume": ("batch_size",)}
    with refused("out-of-memory", "batch_size"):
        run(tmp_path, at={4: raises(torch.OutOfMemoryError("CUDA out of memory"))}, batch_size=8, **changed)
    toy, _ = run(tmp_path, batch_size=4, **changed)
    assert toy.steps_seen == [4, 5]


class Scored(Toy):
    """A toy whose previews have given scores, by their step."""

    by_step: dict = {}  # noqa: RUF012

    def preview(self, step, folder):
        super().preview(step, folder)
        found = self.by_step[step]
        return dict(zip(("score", "other"), found, strict=True)) if isinstance(found, tuple) else {"score": found}

    def merits(self, scores):
        return list(scores.values())


def scored(out, merits, steps=STEPS, at=None, **changes):
    recipe = toy_recipe(out, steps, preview_every=1, **{"patience": 2, **changes})
    toy = Scored(recipe, at)
    toy.by_step = dict(enumerate(merits, 1))
    return toy, train(toy, recipe)


def test_patience_ends_a_run_with_the_weights_of_its_best_preview(tmp_path, capsys):
    merits = [1.0, 3.0, 2.0, 3.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    toy, trained = scored(tmp_path / "a", merits)
    assert toy.steps_seen == [0, 1, 2, 3] and trained.files == (tmp_path / "a" / "weights.pt",)
    assert "stopped at step 4 of 9" in capsys.readouterr().err
    assert trained.step == 2 and trained.scores == {"score": 3.0}
    whole = Scored(toy_recipe(tmp_path / "c", STEPS, preview_every=1))
    whole.by_step = toy.by_step
    seen = {}
    whole.at = {step: lambda loss: seen.setdefault(len(seen), whole.weights()) and loss for step in range(STEPS)}
    train(whole, whole.recipe)
    assert_identical(final_weights(tmp_path / "a"), seen[2])  # weights after two steps, before the third
    again, _ = scored(tmp_path / "a", merits)
    assert again.steps_seen == []
    assert_identical(final_weights(tmp_path / "a"), seen[2])


def test_a_run_that_patience_ended_says_how_to_go_on(tmp_path, capsys):
    merits = [1.0, 3.0, 2.0, 2.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    scored(tmp_path, merits)
    before = {name: (tmp_path / name).read_bytes() for name in ("recipe.json", "log.jsonl", "weights.pt")}
    capsys.readouterr()
    toy, trained = scored(tmp_path, merits, steps=12)
    said = capsys.readouterr().err
    assert said.startswith("stopped by patience at step 4 of 12; raise or remove patience") and said.count("\n") == 1
    assert toy.steps_seen == [] and trained.finished_before and trained.stopped_before and trained.step == 2
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    toy, trained = scored(tmp_path, merits, steps=12, patience=3)
    assert "resuming at step 4 of 12" in capsys.readouterr().err
    assert toy.steps_seen[0] == 4 and not trained.stopped_before
    assert json.loads((tmp_path / "recipe.json").read_text())["steps"] == 12


@pytest.mark.parametrize(("stopped", "word"), [(True, "stopped"), (False, "finished")])
def test_the_command_says_how_a_run_ended(stopped, word, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"system: autoencoder\nout: {tmp_path}/run\nsteps: 3\nicons: i.npz\n")
    ended = Trained(step=2, scores={}, scored={}, files=(), preview=None, seconds=1.0, stopped_before=stopped)
    monkeypatch.setattr("controlkit.training.run.run_recipe", lambda recipe: ended)
    assert main(["train", str(path)]) == 0
    assert capsys.readouterr().out == f"{word}: {tmp_path}/run\n"


def test_patience_weighs_scores_of_different_units_alike(tmp_path):
    # Raw means would rise: a decibel more of one condition against a fifth of the other's F1.
    toy, trained = scored(tmp_path / "a", [(0.5, 20.0), (0.4, 21.0), (0.4, 21.5)])
    assert toy.steps_seen == [0, 1, 2] and trained.step == 1
    _, trained = scored(tmp_path / "b", [(math.nan, 20.0), (0.5, 20.0), (0.51, 19.9), (math.nan, 99.0)], steps=4)
    assert trained.step == 3
    _, trained = scored(tmp_path / "c", [(5.0, 1.0), (math.inf, 1.0), (6.0, 1.0)], steps=3)
    assert trained.step == 2


def test_a_run_with_patience_by_an_earlier_version_goes_on_with_its_best_preview(tmp_path):
    previews = [(0.5, 26.5), (0.1, 9.0), (0.1, 9.0), (0.1, 9.0)]
    with pytest.raises(UserError):
        scored(tmp_path, previews, at={2: raises(UserError("stop", "bad-data"))}, save_every=1)
    record = json.loads((tmp_path / "best/best.json").read_text())
    del record["scale"]
    (tmp_path / "best/best.json").write_text(json.dumps({**record, "best": 13.5}))
    _, trained = scored(tmp_path, previews, save_every=1)
    assert trained.step == 1


def test_a_caller_who_ends_a_run_does_not_save_weights_that_are_not_finite(tmp_path):
    def enough(step):
        if step.step == 5:
            raise KeyError

    recipe = toy_recipe(tmp_path, STEPS, save_every=3, log_every=50)
    with refused("diverged", "step 4"):
        train(Toy(recipe, at={3: lambda loss: loss * math.nan}), recipe, enough)
    assert load_state(tmp_path / "state.safetensors").step == 3


def test_patience_counts_on_when_a_run_is_resumed(tmp_path):
    merits = [5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    with pytest.raises(UserError):
        scored(tmp_path, merits, at={2: raises(UserError("stop", "bad-data"))}, save_every=1)
    toy, _ = scored(tmp_path, merits, save_every=1)
    assert toy.steps_seen == [2]


@pytest.mark.parametrize("killed", ["in a step", "in a preview"])
def test_patience_decides_the_same_after_a_kill_between_states(killed, tmp_path, monkeypatch):
    merits = [1.0, 9.0, 5.0, 5.0, 6.0, 2.0, 2.0, 2.0, 2.0]
    settings = {"save_every": 5, "patience": 4}
    scored(tmp_path / "whole", merits, **settings)
    preview = Scored.preview

    def failing(self, step, folder):
        return raises(KeyError("killed"))(0) if step == 5 else preview(self, step, folder)

    with monkeypatch.context() as patched, pytest.raises(KeyError):
        if killed == "in a preview":
            patched.setattr(Scored, "preview", failing)
        scored(tmp_path / "run", merits, at={5: raises(KeyError("killed"))}, **settings)
    _, trained = scored(tmp_path / "run", merits, **settings)
    assert trained.step == 2
    assert json.loads((tmp_path / "run/best/best.json").read_text()) == json.loads(
        (tmp_path / "whole/best/best.json").read_text()
    )
    assert_identical(final_weights(tmp_path / "run"), final_weights(tmp_path / "whole"))


@pytest.mark.parametrize("best_at", [3, 9, 12])
def test_patience_judges_the_same_from_the_state_before_a_truncated_one(best_at, tmp_path):
    merits = [float(step) / 100 + 9.0 * (step == best_at) for step in range(1, 13)]
    settings = {"steps": 12, "patience": 10, "preview_every": 3}

    def go(name):
        recipe = toy_recipe(tmp_path / name, **settings)
        toy = Scored(recipe)
        toy.by_step = dict(enumerate(merits, 1))
        return toy, train(toy, recipe)

    go("whole")
    go("torn")
    path = tmp_path / "torn/state.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    toy, trained = go("torn")
    assert toy.steps_seen == [9, 10, 11] and trained.step == best_at
    records = [json.loads((tmp_path / name / "best/best.json").read_text()) for name in ("whole", "torn")]
    assert records[0] == records[1]
    assert_identical(final_weights(tmp_path / "torn"), final_weights(tmp_path / "whole"))


def test_patience_of_an_earlier_version_keeps_its_best_preview_when_the_state_is_truncated(tmp_path):
    merits = [1.0, 9.0, 5.0, 5.0]
    scored(tmp_path, merits, steps=4, patience=3)
    record = json.loads((tmp_path / "best/best.json").read_text())
    del record["history"]
    (tmp_path / "best/best.json").write_text(json.dumps(record))
    path = tmp_path / "state.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    toy, trained = scored(tmp_path, merits, steps=4, patience=3)
    assert toy.steps_seen == [3] and trained.step == 2


def test_patience_without_a_score_is_refused_before_the_first_step(tmp_path):
    toy = Toy(toy_recipe(tmp_path / "run", patience=2))
    with refused("contradiction", "patience", "score"):
        train(toy, toy.recipe)
    assert toy.steps_seen == [] and not (tmp_path / "run").exists()


def test_patience_of_a_run_that_had_finished_keeps_its_files(tmp_path):
    merits = [1.0, 3.0, 2.0]
    before = Scored(toy_recipe(tmp_path, 3, preview_every=1))
    before.by_step = dict(enumerate(merits, 1))
    train(before, before.recipe)
    toy, trained = scored(tmp_path, merits, steps=3)
    assert toy.steps_seen == [] and trained.finished_before
    assert trained.step == 3 and trained.files == (tmp_path / "weights.pt",)
    assert_identical(final_weights(tmp_path), before.weights())


@pytest.mark.parametrize("name", ["log.jsonl", "recipe.json"])
def test_a_new_run_does_not_overwrite_files_of_others(tmp_path, name):
    (tmp_path / name).write_text("[1]")
    with refused("would-overwrite", tmp_path / name, "another out"):
        run(tmp_path)
    assert (tmp_path / name).read_text() == "[1]"


def test_a_run_that_saved_no_state_can_begin_again(tmp_path):
    with pytest.raises(UserError):
        run(tmp_path, at={1: raises(UserError("stop", "bad-data"))})
    assert (tmp_path / "log.jsonl").exists() and not (tmp_path / "state.safetensors").exists()
    toy, _ = run(tmp_path)
    assert len(toy.steps_seen) == STEPS


def test_a_new_run_does_not_overwrite_the_log_of_another(tmp_path):
    run(tmp_path)
    for path in tmp_path.glob("state*"):
        path.unlink()
    before = {name: (tmp_path / name).read_bytes() for name in ("log.jsonl", "recipe.json", "weights.pt")}
    with refused("would-overwrite", tmp_path / "recipe.json", "seed: 0 there, 1 now", "another out"):
        run(tmp_path, seed=1)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    for again in ({}, {"learning_rate": 0.01, "batch_size": 8}):  # as errors advise before the first state
        assert len(run(tmp_path, **again)[0].steps_seen) == STEPS
        for path in tmp_path.glob("state*"):
            path.unlink()


def test_a_run_that_logged_nothing_leaves_its_folder_to_another(tmp_path):
    with pytest.raises(UserError):
        run(tmp_path, at={0: raises(UserError("stop", "bad-data"))})
    toy, _ = run(tmp_path, seed=1)
    assert len(toy.steps_seen) == STEPS


def test_patience_returns_its_own_files_alone(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "another.safetensors").write_bytes(b"of an earlier run")
    for _ in range(2):  # also when the finished run is restarted
        _, trained = scored(tmp_path, [1.0, 3.0, 2.0, 2.0])
        assert trained.files == (tmp_path / "weights.pt",)
    assert not (tmp_path / "another.safetensors").exists()


def test_changed_held_out_data_is_told_of_but_not_of_states_that_do_not_record_it(tmp_path, capsys):
    def train_to(steps, held_out, **changes):
        toy = Scored(toy_recipe(tmp_path, steps, **changes))
        toy.by_step = dict.fromkeys(range(steps + 1), 1.0)
        toy.data, toy.held_out_data = "pairs", held_out
        train(toy, toy.recipe)
        return capsys.readouterr().err

    for steps, held_out in ((2, ""), (4, "some"), (6, "some")):
        assert "held-out data" not in train_to(steps, held_out)
    said = train_to(8, "others")
    assert f"the held-out data has changed since the run in {tmp_path} stopped" in said and "patience" not in said
    assert "held-out data" not in train_to(10, "others")
    assert "patience compares them" in train_to(12, "some", patience=9)


def test_a_state_resumes_with_the_frozen_weights_that_it_records_also_in_the_form_of_earlier_versions(tmp_path):
    def train_to(steps, frozen, frozen_before=""):
        recipe = toy_recipe(tmp_path, steps)
        toy = Toy(recipe)
        toy.frozen, toy.frozen_before = frozen, frozen_before
        train(toy, recipe)
        return toy.steps_seen

    assert train_to(3, "weights") == [0, 1, 2]
    assert train_to(6, "weights and tokenizer", frozen_before="weights") == [3, 4, 5]
    with refused("resume-mismatch", tmp_path):
        train_to(9, "others", frozen_before="weights")
