"""One process for each class: the models, losses and files of one after another, whoever dies.

The children are real processes on the CPU, two at a time.
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from accel_gpt2.classify import placed
from accel_gpt2.classify.fit import fit
from accel_gpt2.classify.lock import hold
from accel_gpt2.classify.placed_progress import PlacedProgress
from accel_gpt2.classify.status import ClassStatus, read_classes
from accel_gpt2.errors import ExitCode, StoppedEarly, UsageError, UserError
from accel_gpt2.recipe import ResolvedRecipe
from accel_gpt2.recipe.layers import to_yaml
from tests.conftest import write_texts

from .conftest import read_log, resolve_tiny
from .runs import assert_same_models, losses, train_and_stop

# Enough that whoever looks on can do something before the end; a child's start takes seconds.
LONG: dict[str, Any] = {"epochs": 6.0, "checkpoint_every_steps": 4}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="refused there")


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two classes."""
    folder = tmp_path_factory.mktemp("two-classes")
    return write_texts(folder / "texts.csv", documents_per_class=30, num_classes=2)


@pytest.fixture(scope="session")
def reference(
    two_classes: Path, tmp_path_factory: pytest.TempPathFactory, session_cache: Path
) -> Path:
    """Two classes one after another, which nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(session_cache))
        run = tmp_path_factory.mktemp("placed") / "reference"
        fit(resolve_tiny(two_classes, **LONG), run, quiet=True)
    return run


@contextlib.contextmanager
def looking_on(run: Path, act: Callable[[list[ClassStatus]], bool]) -> Iterator[None]:
    """While the block works, `act` sees where the classes are, until it has done what it wanted.

    That it has is what the block's end asks for.
    """
    over = threading.Event()
    failures: list[BaseException] = []
    done: list[bool] = []

    def look() -> None:
        try:
            while not over.is_set():
                classes = list(read_classes(run))
                if classes and act(classes):
                    done.append(True)
                    return
                time.sleep(0.02)
        except BaseException as error:
            failures.append(error)
            kill_children(run)  # one of them may have been stopped, and would be waited for

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert not failures, failures
    assert done, "it ended before anything was done to it"


def children_of(run: Path) -> list[int]:
    """The live processes that train a class of a run."""
    alive = [x.process for x in read_classes(run) if x.process is not None]
    return [
        x for x in alive
        if psutil.pid_exists(x) and psutil.Process(x).status() != psutil.STATUS_ZOMBIE
    ]  # fmt: skip


def kill_children(run: Path) -> None:
    """Whatever a failing test has left."""
    for child in children_of(run):
        os.kill(child, signal.SIGKILL)


def wait_until(happens: Callable[[], bool], seconds: float = 120.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def assert_same_run(run: Path, other: Path) -> None:
    """Models, losses and calibration are bit for bit the same, and no line of the log is broken."""
    assert_same_models(run, other)
    assert losses(run) == losses(other)
    for name in ("calibration.json", "plan.json"):
        assert json.loads((run / name).read_text()) == json.loads((other / name).read_text()), name
    validation = [
        [row for row in read_log(x) if row["event"] == "joint_validation"] for x in (run, other)
    ]
    assert validation[0] == validation[1] != []


def test_a_process_for_each_class_trains_what_one_after_another_does(
    two_classes: Path, reference: Path, tmp_path: Path
) -> None:
    """Two processes at the same time, one run directory, and the same result to the last bit."""
    run = tmp_path / "run"
    fit(resolve_tiny(two_classes, placement="per-gpu", **LONG), run, quiet=True)
    assert_same_run(run, reference)
    events = [(row["event"], row.get("class_index")) for row in read_log(run)]
    first_end = next(i for i, (event, _) in enumerate(events) if event == "finish")
    assert {i for event, i in events[:first_end] if event == "start"} == {0, 1}
    assert events.count(("finish", 0)) == events.count(("finish", 1)) == 1
    status = read_classes(run)
    assert [(x.name, x.state, x.step == x.total_steps) for x in status] == [
        ("kitchen", "finished", True),
        ("river", "finished", True),
    ]
    assert len({x.process for x in status} | {os.getpid()}) == 3
    for x in status:
        record = json.loads(next(run.glob(f"class-{x.index}-*/final/training.json")).read_text())
        assert x.best_loss_bits == record["best_loss_bits"]
    recipe = (run / "recipe.yaml").read_text()
    assert recipe == (reference / "recipe.yaml").read_text().replace(
        "placement: auto", "placement: per-gpu"
    )
    assert json.loads((run / "spent.json").read_text())


def test_a_run_goes_on_under_another_placement(
    two_classes: Path, reference: Path, tmp_path: Path
) -> None:
    """Begun one after another, gone on in processes that a signal stops, ended as it began."""
    run = tmp_path / "run"
    train_and_stop(resolve_tiny(two_classes, **LONG), run, 6)

    def stop(classes: list[ClassStatus]) -> bool:
        if not all(x.state == "training" and x.step > 6 for x in classes):
            return False
        os.kill(os.getpid(), signal.SIGTERM)
        return True

    with (
        looking_on(run, stop),
        pytest.raises(StoppedEarly, match=r"^Stopped by SIGTERM; the work is saved\.") as stopped,
    ):
        fit(resolve_tiny(two_classes, placement="per-gpu", **LONG), run, quiet=True)
    assert stopped.value.exit_code == ExitCode.STOPPED
    # The first class was six steps ahead, so it may have come to its end before the signal.
    assert sorted({x.state for x in read_classes(run)} | {"finished"}) == ["finished", "stopped"]
    assert children_of(run) == []
    resumed = [row for row in read_log(run) if row["event"] == "resume"]
    assert [row["class_index"] for row in resumed] == [0]
    assert resumed[0]["step"] > 0
    fit(resolve_tiny(two_classes, placement="sequential", **LONG), run, quiet=True)
    assert_same_run(run, reference)


def test_a_class_that_fails_or_is_killed_leaves_the_others_to_their_ends(
    texts_file: Path, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three classes on two devices: one cannot save, one is killed, the third waits for its turn
    and is trained; one sentence says so, and another start makes up for it."""
    run = tmp_path / "run"
    resolved = resolve_tiny(texts_file, placement="per-gpu")
    scores = run / "class-0-kitchen" / "validation_scores"
    scores.parent.mkdir(parents=True)
    scores.touch()  # where a folder should be

    def kill(classes: list[ClassStatus]) -> bool:
        orbit = classes[1]
        if orbit.state != "training" or orbit.process is None:
            return False
        os.kill(orbit.process, signal.SIGKILL)
        return True

    failed = (
        r"(?s)(kitchen failed: .*validation_scores.*orbit failed: its process was killed"
        r"|orbit failed: its process was killed.*kitchen failed: .*validation_scores)"
        r".* river is trained; start again to go on with (kitchen and orbit|orbit and kitchen)\.$"
    )
    monkeypatch.setattr(placed, "devices_of", lambda recipe, num_parts: ["", ""])
    with looking_on(run, kill), pytest.raises(UserError, match=failed) as raised:
        fit(resolved, run, quiet=True)
    monkeypatch.undo()
    assert raised.value.exit_code == ExitCode.FAILED
    assert [x.state for x in read_classes(run)] == ["failed", "failed", "finished"]
    assert not (run / "calibration.json").exists()
    scores.unlink()
    fit(resolve_tiny(texts_file, placement="sequential"), run, quiet=True)
    assert_same_run(run, trained_run)


# What `launch/train.py` comes to, in a process that can be killed.
PARENT = """
import sys
from pathlib import Path
from accel_gpt2.classify.fit import fit
from accel_gpt2.recipe.layers import read_layer
from accel_gpt2.recipe.resolving import resolve
fit(resolve([read_layer(Path(sys.argv[1]))]), Path(sys.argv[2]), quiet=True)
"""


def start_parent(resolved: ResolvedRecipe, run: Path) -> "subprocess.Popen[bytes]":
    """`fit` in a process of its own."""
    recipe = run.with_name("recipe.yaml")
    recipe.write_text(to_yaml(resolved.recipe), "utf-8")
    return subprocess.Popen([sys.executable, "-c", PARENT, str(recipe), str(run)])


def stop_outside_of_log(process: int, run: Path) -> None:
    """SIGSTOP, but never while it has log.jsonl locked, where all others would wait for it."""
    import fcntl

    with (run / "log.jsonl").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        os.kill(process, signal.SIGSTOP)
        wait_until(lambda: psutil.Process(process).status() == psutil.STATUS_STOPPED)


def test_when_the_parent_is_killed_its_children_save_and_nobody_else_begins_before(
    two_classes: Path, reference: Path, tmp_path: Path
) -> None:
    """No process is left, no other start comes between, and nothing that was trained is lost."""
    run = tmp_path / "run"
    parent = start_parent(resolve_tiny(two_classes, placement="per-gpu", **LONG), run)
    try:
        wait_until(
            lambda: (
                (
                    [x.state for x in read_classes(run)] == ["training"] * 2
                    and all(x.step > 4 for x in read_classes(run))
                )
                or parent.poll() is not None
            )
        )
        children = children_of(run)
        assert len(children) == 2
        stop_outside_of_log(children[0], run)  # slow to save
        parent.kill()
        parent.wait()
        wait_until(lambda: children_of(run) == children[:1])
        with (
            pytest.raises(UserError, match=r"Another process holds .*run\.lock .*wait for it"),
            hold(run),
        ):
            pass
        os.kill(children[0], signal.SIGCONT)
        wait_until(lambda: children_of(run) == [])
    finally:
        parent.kill()
        parent.wait()
        kill_children(run)
    newest = {
        path.parent.name: max(int(x.name.split("-")[1]) for x in path.parent.glob("checkpoint-*"))
        for path in run.glob("class-*/checkpoint-*")
    }
    assert len(newest) == 2
    rows = read_log(run)
    for name, step in newest.items():  # the last step that was done
        index = int(name.split("-")[1])
        done = [row["step"] for row in rows
                if row["event"] == "step" and row["class_index"] == index]  # fmt: skip
        assert step == max(done), name
    fit(resolve_tiny(two_classes, placement="sequential", **LONG), run, quiet=True)
    assert_same_run(run, reference)


@pytest.mark.parametrize("worthwhile", [1e9, 0.1])
def test_side_by_side_is_kept_where_it_is_worthwhile(
    worthwhile: float,
    two_classes: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One alone, then both on the same device; where that is not faster, the second saves, waits,
    and loses nothing."""
    monkeypatch.setattr(placed, "WORTHWHILE", worthwhile)
    run = tmp_path / "run"
    held: list[int] = []

    def hold_the_first(classes: list[ClassStatus]) -> bool:
        """Once its speed alone is known, it waits until the second is there."""
        first, second = classes
        if not held and first.step >= 2 and first.process is not None:
            assert second.state == "waiting"  # one is measured alone
            stop_outside_of_log(first.process, run)
            held.append(first.process)
        if held and second.state == "training":
            os.kill(held[0], signal.SIGCONT)
            return True
        return False

    with looking_on(run, hold_the_first):
        fit(resolve_tiny(two_classes, placement="concurrent", **LONG), run, quiet=True)
    said = capfd.readouterr().err
    kept = worthwhile < 1
    ending = "one after another: it goes on so." if kept else "one after another, less than 1e+09: "
    assert re.search(rf"training is \d+\.\d\d times as fast as {re.escape(ending)}", said)
    assert_same_run(run, reference)
    rows = [(row["event"], row.get("class_index"), row.get("step")) for row in read_log(run)]
    events = [x[:2] for x in rows if x[0] in {"start", "resume", "finish"}]
    assert events[:2] == [("start", 0), ("start", 1)]
    if kept:
        assert sorted(events[2:]) == [("finish", 0), ("finish", 1)]
    else:
        assert events[2:] == [("finish", 0), ("resume", 1), ("finish", 1)]


def test_a_time_limit_counts_from_the_start_of_the_run(
    two_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds are over before a child has loaded torch, and the next one is not started."""
    monkeypatch.setattr(placed, "devices_of", lambda recipe, num_parts: [""])
    run = tmp_path / "run"
    resolved = resolve_tiny(two_classes, placement="per-gpu", max_time_seconds=2.0, **LONG)
    with pytest.raises(StoppedEarly, match=r"^The time limit of 2\.0 s is reached") as stopped:
        fit(resolved, run, quiet=True)
    assert stopped.value.exit_code == ExitCode.LIMIT_REACHED
    assert read_classes(run)[1].state == "waiting"
    assert not list(run.glob("class-*/final"))


def test_a_launch_of_several_processes_places_nothing(
    two_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them would start children; the sentence says what to type."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    resolved = resolve_tiny(two_classes, placement="per-gpu")
    with pytest.raises(UsageError, match=r"launcher started 2 .* --num_processes 1`, or --placem"):
        placed.is_placed(resolved.recipe)


def test_gpus_are_called_as_the_launcher_calls_them(
    two_classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the GPUs that this process may use, as many as the profile has; a CPU is two at least."""
    recipe = resolve_tiny(two_classes, placement="per-gpu", profile="2x-rtx4070ti").recipe
    assert len(placed.devices_of(recipe, 5)) >= 2
    assert placed.devices_of(recipe, 1) == [""]
    monkeypatch.setattr(placed, "on_cpu", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a,7")
    assert placed.devices_of(recipe, 5) == ["3", "GPU-5a"]


def test_every_training_has_a_bar_in_one_display(capsys: pytest.CaptureFixture[str]) -> None:
    """On a terminal each has its bar and its facts; elsewhere the lines come in turn, as they do
    for one."""
    progress = PlacedProgress(shown=True, quiet=True)
    progress._live = True
    for index, name in ((0, "kitchen (1/2)"), (1, "river (2/2)"), (0, "kitchen (1/2)")):
        progress.show(index)
        progress.start(name, 10)
        progress.update(name, index + 3, 10, "loss 4.2")
    progress.show(1)
    progress.update("river (2/2)", 5, 10, "")
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, color_system=None)
    console.print(progress._progress.get_renderable())
    shown = [line.split()[:3] for line in screen.getvalue().splitlines()]
    assert sorted(shown) == [
        ["kitchen", "(1/2)", "3/10"], ["kitchen", "(1/2):", "loss"], ["river", "(2/2)", "5/10"]
    ]  # fmt: skip
    progress.end(0)
    assert [task.description for task in progress._progress.tasks] == ["river (2/2)"]
    plain = PlacedProgress(shown=True, quiet=True)
    for index, name in ((0, "kitchen"), (1, "river")):
        plain.show(index)
        plain.start(name, 2)
        plain.update(name, 1, 2, "loss 4.2")  # sooner than its next line is due
        plain.update(name, 2, 2, "loss 4.2")
    assert capsys.readouterr().err == "kitchen 2/2 loss 4.2\nriver 2/2 loss 4.2\n"
