"""One process of several dies: the others learn why, say it once, and leave within a minute.

`dying_processes.py` has what happens where; here is what must come of it.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from accel_gpt2.cli.launcher import Launch, run_launch
from accel_gpt2.errors import ExitCode, StoppedEarly, UserError
from accel_gpt2.recipe import Layer
from accel_gpt2.recipe.layers import to_yaml
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.train import peers
from accel_gpt2.train.peers import (
    Failure,
    PeerFailedError,
    consequence,
    watching_peers,
)

SCRIPT = Path(__file__).with_name("dying_processes.py")
GRACE_SECONDS = 1.0  # the script's; what a person has is looked at below
TRACEBACK = (
    r"Process {0} of the run failed:\nTraceback \(most recent call last\):\n(?:.*\n)+?"
    r"ZeroDivisionError: injected\n"
)
# Where the classes stand, said by whoever has noticed in time.
WHERE = r"(?:[^\n]+ failed at step [^\n]+\n)?"
LAST_LINE = (
    r"Process 1 of the run failed \(ZeroDivisionError: injected\); its traceback is above\. Start "
    r"again to go on from the newest whole checkpoint\.\n\Z"
)
WITHOUT_A_WORD = (
    r"Process {0} of the run ended without a word, as when memory runs out \(`dmesg` tells\) or "
    r"someone kills it\. Start again .*micro_batch_tokens=\.\.\. if it was memory\.\n\Z"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of the two processes of a death."""

    codes: list[int]
    seconds: list[float]  # after the death, each
    said: str  # joined, as on a terminal
    pids: list[int]
    run: Path

    def status(self) -> dict[str, object]:
        """What `accel-gpt2 train` would go by."""
        status: dict[str, object] = json.loads((self.run / "status.json").read_text("utf-8"))
        return status


@pytest.fixture(scope="module")
def folder(
    texts_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, str]]]:
    """A recipe of a few steps, its text prepared, and the environment of a launched process."""
    folder = tmp_path_factory.mktemp("deaths")
    values: dict[str, object] = {
        "model": "gpt2-tiny",
        "dataset": str(texts_file),
        "tokenizer_vocab_size": 300,
        "max_length": 32,
        "global_batch_size": 4,
        "max_steps": 5,
        "trackers": [],
        "profile": "cpu",
    }
    resolved = resolve([Layer(origin="test", values=values)])
    (folder / "recipe.yaml").write_text(to_yaml(resolved.recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_GPT2_CACHE", str(folder / "cache"))
        yield folder, {**os.environ, "WORLD_SIZE": "2"}


@pytest.fixture(scope="module")
def deaths(folder: tuple[Path, dict[str, str]]) -> dict[str, Ended]:
    """Every death of the script, each of two processes of its own."""
    path, environment = folder
    script = subprocess.run(
        [sys.executable, str(SCRIPT), str(path)],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert script.returncode == 0, script.stderr[-4000:]
    runs = {"the first killed in a step": "taken over", "nobody": "taken over"}
    runs |= {"killed in an evaluation": "taken over", "refused": "held by another"}
    content = json.loads((path / "deaths.json").read_text("utf-8"))
    assert len(content) == 19
    return {
        name: Ended(**values, run=path / runs.get(name, name)) for name, values in content.items()
    }


def test_every_process_ends_within_a_minute(deaths: dict[str, Ended]) -> None:
    """By itself within moments, or after the grace where it would wait for ever."""
    waits = {name: max(ended.seconds) for name, ended in deaths.items() if name != "nobody"}
    assert max(waits.values()) < GRACE_SECONDS + 10, waits
    longest = peers.GRACE_SECONDS + peers.POLL_SECONDS + peers._EVIDENCE_SECONDS
    assert longest < 40
    assert peers.GRACE_SECONDS < 30  # then torchrun kills


def test_the_cause_comes_first_and_only_once(deaths: dict[str, Ended]) -> None:
    """The traceback of the process that failed, and then one line of the survivor's; what the dead
    connection looked like from there is not shown."""
    ended = deaths["unexpected in a step"]
    assert ended.codes == [1, 1]
    assert re.search(TRACEBACK.format(1) + WHERE + LAST_LINE, ended.said)
    assert ended.said.count("Traceback") == 1
    assert "gloo" not in ended.said
    assert ended.status()["exit_code"] == 1
    assert re.match(LAST_LINE.removesuffix(r"\n\Z"), str(ended.status()["message"]))


@pytest.mark.parametrize("name", ["unexpected in a step of the first", "unexpected while saving"])
def test_the_first_process_fails_by_itself(deaths: dict[str, Ended], name: str) -> None:
    """Its traceback is the last word: who only listens to it adds nothing."""
    ended = deaths[name]
    assert ended.codes == [1, 1]
    assert re.search(TRACEBACK.format(0) + r"\Z", ended.said)
    assert ended.said.count("Traceback") == 1
    status = ended.status()
    assert (status["exit_code"], status["message"]) == (1, "ZeroDivisionError: injected")


def test_a_survivor_that_waits_for_ever_is_ended(deaths: dict[str, Ended]) -> None:
    """Where no error wakes it, as with NCCL, a thread ends it, with the same words and status."""
    ended = deaths["unexpected, and the other is stuck"]
    assert ended.codes == [1, 1]
    assert ended.seconds[0] > GRACE_SECONDS
    assert re.search(TRACEBACK.format(1) + WHERE + LAST_LINE, ended.said)
    assert str(ended.status()["message"]).startswith("Process 1 of the run failed (ZeroDivision")
    assert not (ended.run / "owner.json").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("expected in an evaluation", "The injected folder does not exist; make it."),
        ("expected while loading", "The injected folder does not exist; make it."),
        (
            "a full disk",
            "No space left on device: runs/a/log.jsonl. What was saved before is intact; make "
            "room and start again to go on.",
        ),
    ],
)
def test_a_sentence_of_one_process_is_said_by_the_first(
    deaths: dict[str, Ended], name: str, sentence: str
) -> None:
    """What the person can act on comes without a traceback, once, with the process it is from."""
    ended = deaths[name]
    assert ended.codes == [1, 1]
    assert ended.said.endswith(f"Process 1: {sentence}\n")
    assert ended.said.count(sentence) == 1
    assert "Traceback" not in ended.said
    assert ended.status()["message"] == f"Process 1: {sentence}"


def test_what_both_meet_is_one_failure(deaths: dict[str, Ended]) -> None:
    """Neither is the consequence of the other, and the first process's words are its own."""
    ended = deaths["expected by both"]
    assert ended.codes == [1, 1]
    assert "The injected folder does not exist; make it." in ended.said.splitlines()
    assert ended.status()["message"] == "The injected folder does not exist; make it."


def test_an_exit_in_the_middle_is_no_end(deaths: dict[str, Ended]) -> None:
    """sys.exit by a library: whatever its code means, the run has failed; the traceback says who
    called it."""
    ended = deaths["an exit"]
    assert ended.codes == [1, 3]
    assert re.search(r"Process 1 of the run failed:\nTraceback(.|\n)*\nSystemExit: 3\n", ended.said)
    assert ended.said.splitlines()[-1].startswith("Process 1 of the run failed (SystemExit: 3);")
    assert ended.status()["exit_code"] == 1


@pytest.mark.parametrize("name", ["killed in a step", "killed while loading"])
def test_a_killed_process_is_said_to_be(deaths: dict[str, Ended], name: str) -> None:
    """There is no traceback, so the survivor says what may have happened and what to type."""
    ended = deaths[name]
    assert ended.codes == [1, -signal.SIGKILL]
    assert re.search(WITHOUT_A_WORD.format(1), ended.said)
    assert "Traceback" not in ended.said
    assert re.match(WITHOUT_A_WORD.format(1)[: -len(r"\n\Z")], str(ended.status()["message"]))


@pytest.mark.parametrize("name", ["killed in a program of one's own", "killed in an evaluation"])
def test_fit_and_evaluate_watch_by_themselves(deaths: dict[str, Ended], name: str) -> None:
    """Whoever calls them under a launcher is looked after, not only the command line."""
    ended = deaths[name]
    assert ended.codes == [1, -signal.SIGKILL]
    assert ended.said.splitlines()[-1].startswith("PeerFailedError: Process 1 of the run ended")


@pytest.mark.parametrize("name", ["the first killed in a step", "killed, and the other is stuck"])
def test_the_first_process_is_killed(deaths: dict[str, Ended], name: str) -> None:
    """It kept the others' store and talked for them; the next one says it in its place."""
    ended = deaths[name]
    assert ended.codes == [-signal.SIGKILL, 1]
    assert re.search(WITHOUT_A_WORD.format(0), ended.said)
    assert "Traceback" not in ended.said


def test_two_processes_are_one_owner_and_go_on(deaths: dict[str, Ended]) -> None:
    """Of a run whose lock was held by a first process that was killed, the next start goes on."""
    ended = deaths["nobody"]
    assert ended.codes == [0, 0]
    assert "(1/3) is trained already" in ended.said
    assert len(list(ended.run.glob("class-*/final/manifest.json"))) == 3
    assert ended.status()["exit_code"] == 0
    assert not (ended.run / "owner.json").exists()


def test_both_processes_of_a_refused_start_leave(deaths: dict[str, Ended]) -> None:
    """The first one finds another process at work; the second learns it, and nothing is written."""
    ended = deaths["refused"]
    assert ended.codes == [1, 1]
    assert re.search(r"^Process \d+ on .* is at work in .*held by another; wait for", ended.said)
    assert len(ended.said.splitlines()) == 1
    assert sorted(path.name for path in ended.run.iterdir()) == ["run.lock"]


def test_a_signal_to_one_process_that_loads_stops_both(deaths: dict[str, Ended]) -> None:
    """Before the processes can agree on stopping, the one that is hit tells the other."""
    ended = deaths["a signal to one while loading"]
    assert ended.codes == [ExitCode.INTERRUPTED, ExitCode.INTERRUPTED]
    assert ended.said == "Process 1: Stopped by SIGTERM; nothing was worth saving yet.\n"


def test_a_stop_that_all_have_agreed_on_is_no_failure(deaths: dict[str, Ended]) -> None:
    """Who leaves first does not hurry the others: they may have a tracker to finish."""
    ended = deaths["a signal to one in a step"]
    assert ended.codes == [ExitCode.STOPPED, ExitCode.STOPPED]
    assert ended.seconds[0] > ended.seconds[1] + GRACE_SECONDS
    assert ended.said.splitlines()[-1].startswith("Stopped by a signal to another rank; the work")
    assert "Process 1" not in ended.said


@pytest.mark.parametrize(
    ("death", "said"),
    [
        ("unexpected in a step", LAST_LINE.removesuffix(r"\n\Z")),
        ("killed in a step", WITHOUT_A_WORD.format(1).removesuffix(r"\n\Z")),
    ],
)
def test_under_torchrun_our_sentence_is_the_last(
    folder: tuple[Path, dict[str, str]],
    death: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    """Through `accel-gpt2 train`'s launcher: torchrun adds a page of its own to every failure and
    signals the survivor; code and sentence are still those of the process that failed."""
    if death.startswith("killed") and not request.config.getoption("torture", default=False):
        pytest.skip("half a minute; --torture runs it")
    path, _ = folder
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    run = path / "torchrun"
    run.mkdir(exist_ok=True)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    argv = (sys.executable, *torchrun, str(SCRIPT), str(path), death)
    assert run_launch(Launch(argv=argv, run_directory=run)) == ExitCode.FAILED

    talk = capfd.readouterr().err
    assert re.search(said + r"\n\Z", talk)
    assert len(re.findall(said, talk)) == 1
    assert "Connection closed" not in talk
    if death.startswith("unexpected"):
        # First the traceback, then torchrun's summary, which quotes it.
        summary = talk.index("ChildFailedError")
        assert re.search(TRACEBACK.format(1), talk[:summary])
        assert re.search(r"Root Cause(.|\n)*ZeroDivisionError: injected", talk[summary:])


def test_alone_nothing_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process needs no peers, no store and no thread; its errors are its own."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ZeroDivisionError, match="mine"), watching_peers():  # noqa: PT012
        assert peers._watch is None
        raise ZeroDivisionError("mine")


@pytest.mark.parametrize(
    ("kind", "exit_code", "error", "code"),
    [
        ("stopped", 75, StoppedEarly, 75),
        ("expected", 3, PeerFailedError, 3),
        ("unexpected", 1, PeerFailedError, 1),
        ("unexpected", 77, PeerFailedError, 1),
        ("killed", 1, UserError, 1),
    ],
)
def test_the_survivors_exit_code_is_that_of_the_failure(
    kind: str, exit_code: int, error: type[Exception], code: int
) -> None:
    """The table of exit codes holds for all processes; what is not in it is a failure."""
    failure = Failure(rank=2, exit_code=exit_code, sentence="What it saw.", kind=kind)  # type: ignore[arg-type]
    raised = consequence(failure)
    assert isinstance(raised, error)
    assert raised.exit_code == code
    assert str(raised).startswith("Process 2")
