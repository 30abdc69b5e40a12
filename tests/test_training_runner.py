"""The runner of a training: whatever stops it, the same command goes on, and ends as if nothing had happened.

Run as a script, this file trains its tiny stages, so that tests can kill a real process.
"""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel
from rich.console import Console
from torch import nn

from compressor_service.training.ahead import DrawFailed, batches
from compressor_service.training.curves import draw_curves
from compressor_service.training.journal import Journal, Line, Smoothed, read_journal
from compressor_service.training.progress import Display, Progress
from compressor_service.training.run_folder import CannotTrain
from compressor_service.training.runner import StagePlan, Stopped, run
from deploy.cli import run_command

WAIT_S = 60


class Recipe(BaseModel):
    steps: dict[str, int] = {"first": 60, "second": 60}
    width: int = 4


@dataclass(frozen=True, slots=True)
class Points:
    """Seeded data: a picklable function of the number."""

    seed: int
    fails_at: int = -1

    def __call__(self, number):
        if number == self.fails_at:
            raise LookupError(f"no point {number} here")
        return np.random.default_rng((self.seed, number)).normal(size=(8, 4)).astype(np.float32)


class Linear:
    """A stage with what makes resuming hard: momentum, dropout, what an earlier stage wrote."""

    prefetch = True

    def __init__(self, name, recipe, folder, batch):
        self.name, self.steps, self.batch = name, recipe.steps[name], batch
        self.model = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, recipe.width))
        if name == "second":
            self.model.load_state_dict(torch.load(folder / "first.pt", weights_only=True))
        self._speeds = [torch.zeros_like(one) for one in self.model.parameters()]

    def step(self, number, batch):
        loss = (self.model(torch.from_numpy(batch)) - 1).square().mean()
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        with torch.no_grad():
            for one, speed, gradient in zip(self.model.parameters(), self._speeds, gradients, strict=True):
                one.sub_(speed.mul_(0.9).add_(gradient), alpha=0.01)
        return {"loss": loss.item(), "accuracy": number / self.steps if number % 3 else float("nan")}

    def state(self):
        return {"model": self.model.state_dict(), "speeds": self._speeds}

    def restore(self, state):
        self.model.load_state_dict(state["model"])
        self._speeds = state["speeds"]

    def finish(self, folder):
        torch.save(self.model.state_dict(), folder / f"{self.name}.pt")


class Curriculum(Linear):
    """Draws harder data the further it is: a batch depends on those before."""

    prefetch = False

    def __init__(self, name, recipe, folder):
        super().__init__(name, recipe, folder, self._draw)
        self._points, self._level = Points(3), 1.0

    def _draw(self, number):
        self._level *= 1.01
        return self._points(number) * np.float32(self._level)

    def state(self):
        return super().state() | {"level": self._level}

    def restore(self, state):
        super().restore(state)
        self._level = state["level"]


def plans(recipe):
    return [
        StagePlan("first", lambda folder: Linear("first", recipe, folder, Points(3))),
        StagePlan("second", lambda folder: Curriculum("second", recipe, folder)),
    ]


def train(folder, recipe=None, *, seed=3, **options):
    recipe = recipe or Recipe()
    run(plans(recipe), folder, recipe=recipe, seed=seed, **options)


def main(folder, step_s, workers, *, snapshot_s=0.02):
    torch.set_num_threads(1)
    try:
        train(
            Path(folder), workers=int(workers), snapshot_s=snapshot_s, on_progress=lambda now: time.sleep(float(step_s))
        )
    except Stopped as stop:
        print(stop, flush=True)
        sys.exit(130)


# Processes


def start(folder, *, step_s, workers=0, limit=None):
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), str(step_s), str(workers)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=limit,
    )


def wait_until(happens):
    deadline = time.monotonic() + WAIT_S
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def told(folder, stage):
    journal = folder / "journal.jsonl"
    return [line.step for line in read_journal(journal) if line.stage == stage] if journal.exists() else []


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def weights(folder):
    return torch.load(folder / "second.pt", weights_only=True)


def lines(folder):
    return [line.model_dump(exclude={"seconds"}) for line in read_journal(folder / "journal.jsonl")]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing interrupted."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def assert_same(folder, whole):
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(folder)[name]), name
    assert lines(folder) == lines(whole)


# Going on


def test_a_training_killed_in_every_stage_ends_bit_by_bit_as_one_that_was_not(tmp_path, whole):
    orphans = []
    for stage, workers in (("first", 1), ("second", 0)):
        process = start(tmp_path, step_s=0.02, workers=workers)
        wait_until(lambda stage=stage: len(told(tmp_path, stage)) > 20)
        orphans += children(process)
        process.kill()
        process.communicate()
        assert (tmp_path / "snapshot.pt").exists()
    reached = max(told(tmp_path, "second"))
    notes = []
    train(tmp_path, on_note=notes.append)
    assert re.fullmatch(r"second goes on after step \d+ of 60", notes[-1])
    assert 10 < int(notes[-1].split()[5]) <= reached + 1
    assert_same(tmp_path, whole)
    assert orphans
    wait_until(lambda: not any(map(is_alive, orphans)))


def test_a_training_whose_every_process_is_interrupted_takes_a_snapshot_and_says_so(tmp_path, whole):
    process = start(tmp_path, step_s=0.02, workers=1)
    wait_until(lambda: len(told(tmp_path, "first")) > 5)
    workers = children(process)
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130, errors
    stopped = re.search(r"stopped after step (\d+) of 60 of first, stage 1 of 2; the same command goes on", output)
    assert stopped, output
    assert told(tmp_path, "first")[-1] == int(stopped[1])
    assert not errors
    wait_until(lambda: not any(map(is_alive, workers)))
    train(tmp_path)
    assert_same(tmp_path, whole)


def test_a_finished_training_is_not_run_again(whole):
    before = {path: path.stat().st_mtime_ns for path in (*whole.glob("*.pt"), whole / "journal.jsonl")}
    train(whole, on_progress=lambda now: pytest.fail(str(now)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not (whole / "snapshot.pt").exists()


def test_a_stage_killed_before_it_was_marked_is_finished_again(tmp_path, whole, monkeypatch):
    def die(self, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Linear, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    train(tmp_path)
    assert_same(tmp_path, whole)


def test_time_is_counted_across_interruptions(tmp_path):
    def stop(now):
        if now.step in (20, 40):
            signal.raise_signal(signal.SIGTERM)

    for _ in range(4):
        with pytest.raises(Stopped):
            train(tmp_path, on_progress=stop)
    train(tmp_path)
    seconds = [line.seconds for line in read_journal(tmp_path / "journal.jsonl")]
    assert seconds == sorted(seconds)
    finished = json.loads((tmp_path / "finished.json").read_text())
    assert list(finished) == ["first", "second"]
    assert finished["second"] >= seconds[-1]


def test_a_second_signal_ends_a_training_at_once(tmp_path):
    def stop(now):
        if now.step == 20:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, on_progress=stop)
    train(tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"width": 5}, "recipe.width was 4 and is 5"),
        ({"steps": {"first": 60, "second": 61}}, "recipe.steps.second was 60 and is 61"),
    ],
)
def test_a_folder_of_another_recipe_is_refused_by_what_differs(whole, changed, named):
    with pytest.raises(CannotTrain, match=re.escape(named)):
        train(whole, Recipe(**changed))


@pytest.mark.parametrize("entry", ["torch", "numpy", "transformers", "platform"])
def test_a_folder_begun_elsewhere_is_refused_by_what_differs(tmp_path, whole, entry):
    recipe = json.loads((whole / "recipe.json").read_text())
    (tmp_path / "recipe.json").write_text(json.dumps(recipe | {entry: "other"}))
    with pytest.raises(CannotTrain, match=f'with another recipe: {entry} was "other" and is "'):
        train(tmp_path)


def test_a_folder_begun_with_another_seed_is_refused(whole):
    with pytest.raises(CannotTrain, match="seed was 3 and is 4"):
        train(whole, seed=4)


def test_a_folder_begun_with_other_threads_is_refused(whole):
    torch.set_num_threads(2)
    with pytest.raises(CannotTrain, match="threads was 1 and is 2"):
        train(whole)


def test_a_folder_is_trained_in_by_one_process_at_a_time(tmp_path):
    def train_again(now):
        with pytest.raises(CannotTrain, match="another process is training in"):
            train(tmp_path)

    train(tmp_path, Recipe(steps={"first": 1, "second": 1}), on_progress=train_again)


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CannotTrain, match=r"cannot write to .*file/run: Not a directory"):
        train(tmp_path / "file" / "run")


def test_a_disk_that_is_nearly_full_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 10**6))
    with pytest.raises(CannotTrain, match="has 3 MB free, too few: 1000 are wanted"):
        train(tmp_path)


def test_a_snapshot_that_finds_no_room_is_told_and_the_one_before_it_kept(tmp_path, whole):
    with pytest.raises(Stopped):
        train(tmp_path, on_progress=lambda now: signal.raise_signal(signal.SIGTERM) if now.step == 20 else None)
    limit = (tmp_path / "snapshot.pt").stat().st_size - 1000
    process = start(tmp_path, step_s=0, limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    _, errors = process.communicate(timeout=WAIT_S)
    assert re.search(r"CannotTrain: cannot write .*snapshot.pt: File too large; what was there before is kept", errors)
    train(tmp_path)
    assert_same(tmp_path, whole)


def test_a_state_that_could_not_be_read_again_is_refused_after_the_first_step(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(Linear, "state", lambda self: {"points": Points(1)})
    with pytest.raises(CannotTrain, match=r"snapshot\.pt cannot be read"):
        train(tmp_path, on_progress=lambda now: steps.append(now.step))
    assert steps == [1]


def test_stages_have_different_names(tmp_path):
    with pytest.raises(ValueError, match="stages share a name: first, first"):
        run([plans(Recipe())[0]] * 2, tmp_path, recipe=Recipe(), seed=0)


# Batches drawn ahead


def test_batches_drawn_ahead_come_in_order():
    with closing(batches(Points(1), range(5, 12), workers=2)) as ahead:
        for number, batch in zip(range(5, 12), ahead, strict=True):
            assert (batch == Points(1)(number)).all()


def test_what_fails_in_a_worker_is_told_with_its_place():
    with closing(batches(Points(1, fails_at=2), range(10), workers=1)) as ahead:
        assert len([next(ahead), next(ahead)]) == 2
        with pytest.raises(DrawFailed, match="batch 2: LookupError: no point 2 here") as failed:
            next(ahead)
    assert "in __call__" in failed.value.__notes__[0]


def test_a_worker_that_was_killed_is_told():
    with closing(batches(Points(1), range(10**6), workers=1)) as ahead:
        next(ahead)
        [worker] = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(DrawFailed, match=r"batch \d+: the process that draws it was killed"):
            list(ahead)


# The command


@pytest.mark.parametrize(
    ("outcome", "code", "told"),
    [
        (None, 0, ""),
        (CannotTrain("another process is training in x"), 1, "error: another process is training in x\n"),
        (Stopped("stopped after step 3"), 130, "stopped after step 3\n"),
    ],
)
def test_the_command_trains_as_its_flags_say_and_tells_how_it_ended(monkeypatch, capsys, outcome, code, told):
    asked = []

    def recipe(folder, **options):
        asked.append(
            (folder, {name: options[name] for name in ("seed", "device", "scale", "workers", "threads", "start")})
        )
        options["on_note"]("a note")
        if outcome:
            raise outcome

    monkeypatch.setitem(sys.modules, "compressor_service.training.recipe", SimpleNamespace(train=recipe))
    assert run_command(["train", "out", "--seed", "2", "--scale", "0.5", "--workers", "0"]) == code
    assert asked == [
        (Path("out"), {"seed": 2, "device": "auto", "scale": 0.5, "workers": 0, "threads": None, "start": None})
    ]
    assert capsys.readouterr().err == "a note\n" + told


# The journal


def test_a_journal_is_cut_back_to_what_was_reached(tmp_path):
    path = tmp_path / "journal.jsonl"
    written = [
        Line(stage=stage, step=step, seconds=step, values={"loss": 1 / step})
        for stage in ("first", "second")
        for step in (1, 2, 3)
    ]
    with Journal(path, {}) as journal:
        for line in written:
            journal.write(line)
    with path.open("a") as file:
        file.write('{"stage":"second","st')
    assert read_journal(path) == written
    Journal(path, {"first": 3, "second": 2}).__exit__(None, None, None)
    assert read_journal(path) == written[:5]
    assert path.read_text().endswith("}\n")


def test_smoothed_values_are_means_of_the_last_steps_and_leave_out_what_was_not_measured():
    smoothed = Smoothed(span=4)
    for value in (1.0, 3.0):
        smoothed.add({"loss": value, "accuracy": float("nan")})
    assert smoothed.values == {"loss": 2.0}
    for _ in range(60):
        smoothed.add({"loss": 7.0})
    assert smoothed.values["loss"] == pytest.approx(7.0, abs=1e-3)


# What is shown


def test_curves_show_every_value_of_every_stage(whole):
    for stage in ("first", "second"):
        with Image.open(whole / "curves" / f"{stage}.png") as picture:
            assert picture.width > 600
            assert len(picture.convert("L").getcolors()) > 10


def test_training_without_the_library_for_curves_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    notes = []
    train(tmp_path, Recipe(steps={"first": 2, "second": 2}), on_note=notes.append)
    assert notes == ["no curves are drawn without matplotlib: pip install 'tokenline[train]'"]
    assert not (tmp_path / "curves").exists()


def test_a_stage_that_told_nothing_has_an_empty_picture(tmp_path):
    [path] = draw_curves([Line(stage="first", step=1, seconds=1, values={})], tmp_path)
    assert path.stat().st_size


def test_where_there_is_no_curve_the_picture_stays_empty(tmp_path):
    values = {name: 1.0 for name in ("a", "b", "c", "d", "e")}
    [path] = draw_curves([Line(stage="first", step=1, seconds=1, values=values)], tmp_path)
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L"))
    height, width = pixels.shape
    assert pixels[height // 2 :, : width // 4].min() < 255
    assert pixels[height // 2 + 20 :, width // 2 :].min() == 255


def test_progress_counts_stages_and_steps_and_estimates_the_time_left(tmp_path):
    seen = []
    train(tmp_path, on_progress=seen.append)
    assert [(one.number, one.stages, one.stage, one.step) for one in (seen[0], seen[-1])] == [
        (1, 2, "first", 1),
        (2, 2, "second", 60),
    ]
    assert seen[-1].left_s == seen[-1].stage_left_s == 0
    assert all(one.steps_per_s > 0 for one in seen)
    assert seen[59].stage_left_s == 0 < seen[59].left_s < 60


NOW = Progress(
    stage="tower",
    number=1,
    stages=4,
    step=120,
    steps=2000,
    values={"loss": 3.21456, "kind": 0.5},
    steps_per_s=1.9312,
    stage_left_s=973.5,
    left_s=3725,
)


def test_progress_is_shown_as_a_line_now_and_then_where_there_is_no_terminal(capsys):
    with Display() as display:
        for _ in range(3):
            display.progress(NOW)
        display.note("tower [1] is done")
    assert capsys.readouterr().err.splitlines() == [
        "stage 1/4 tower: step 120/2000, loss 3.21, kind 0.5, 1.93/s, 0:16:14 left, 1:02:05 in all",
        "tower [1] is done",
    ]


def test_progress_is_shown_as_bars_on_a_terminal(capsys):
    with Display(Console(stderr=True, force_terminal=True, width=80)) as display:
        display.progress(NOW)
    shown = capsys.readouterr().err
    assert "stage 1/4 tower" in shown
    assert "120/2000" in shown
    assert "0:16:14 left, 1:02:05 in all" in shown
    assert "loss 3.21" in shown


if __name__ == "__main__":
    main(*sys.argv[1:])
