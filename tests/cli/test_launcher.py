"""Launching: exit codes come through, signals reach the trainer, and nobody leaves before it saved.

The processes are real; only what they do instead of training is small.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.classify.lock import read_owner, working_owner
from accel_gpt2.cli import launcher
from accel_gpt2.cli.launcher import (
    Launch,
    recorded_outcome,
    run_launch,
    shipped_file,
    training_launch,
    use_expandable_segments,
    use_nvidia_smi_order,
)
from accel_gpt2.errors import DoesNotFitError, ExitCode, StoppedEarly, UserError

# Like accelerate's simple launcher: starts the script, and turns its failure into 1.
LAUNCHER = """
import subprocess, sys
sys.exit(1 if subprocess.run([sys.executable, *sys.argv[1:]]).returncode else 0)
"""

# A trainer of "steps" of 0.1 s that stops as the real one does: it finishes its step, takes half
# a second to save, and says 75.
TRAINER = """
import signal, sys, time
from pathlib import Path
from accel_gpt2.cli.launcher import recorded_outcome, stop_with_parent
from accel_gpt2.errors import ExitCode, StoppedEarly

run_directory = Path(sys.argv[1])
stop_with_parent()
got = []
with recorded_outcome(run_directory) as this:
    this.take_run_directory()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: got.append(signal.Signals(number).name))
    (run_directory / "training").touch()
    for step in range(600):  # however slow the machine is, the signal comes before the end
        time.sleep(0.1)
        if len(got) >= int(sys.argv[2]):
            time.sleep(0.5)
            (run_directory / "saved").write_text(",".join(got))
            raise StoppedEarly("Stopped; the work is saved.", ExitCode.STOPPED)
"""


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """An empty run directory, as `train` has prepared it."""
    directory = tmp_path / "run"
    directory.mkdir()
    return directory


@pytest.fixture(autouse=True)
def _own_signal_handlers() -> Iterator[None]:
    """What a trainer sets for the rest of its life ends with its test."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def launch_of(run_directory: Path, trainer: str, *arguments: str) -> Launch:
    """A launch of a trainer script through a launcher that dies at once from any signal."""
    scripts = run_directory.parent
    (scripts / "launcher.py").write_text(LAUNCHER, "utf-8")
    (scripts / "trainer.py").write_text(textwrap.dedent(trainer), "utf-8")
    argv = (
        sys.executable,
        str(scripts / "launcher.py"),
        str(scripts / "trainer.py"),
        str(run_directory),
        *arguments,
    )
    return Launch(argv=argv, run_directory=run_directory)


@pytest.fixture
def parent(run_directory: Path) -> Iterator["subprocess.Popen[str]"]:
    """`run_launch` of the trainer above in a process of its own, once the trainer is training."""
    launch = launch_of(run_directory, TRAINER, "1")
    process = start_parent(launch)
    wait_for(run_directory / "training")
    yield process
    process.kill()
    process.communicate()


def start_parent(launch: Launch) -> "subprocess.Popen[str]":
    """A process that does what `accel-gpt2 train` does with a launch."""
    program = (
        "import sys; from pathlib import Path\n"
        "from accel_gpt2.cli.errors import run\n"
        "from accel_gpt2.cli.launcher import Launch, run_launch\n"
        "launch = Launch(argv=tuple(sys.argv[2:]), run_directory=Path(sys.argv[1]))\n"
        "run(lambda **options: sys.exit(run_launch(launch)))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(launch.run_directory), *launch.argv],
        stderr=subprocess.PIPE,
        text=True,
        # The tests themselves may run under nohup, and what ignores SIGHUP hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509
    )


def ended(parent: "subprocess.Popen[str]") -> tuple[int, str]:
    """The exit code of a process that is about to end, and what it said."""
    _, said = parent.communicate(timeout=30)
    return parent.returncode, said


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    wait_until(path.exists)


def wait_until(happens: Callable[[], bool]) -> None:
    """Wait until something is true, at most half a minute."""
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.mark.parametrize("code", [ExitCode.DONE, *ExitCode])
def test_the_trainers_exit_code_comes_through_the_launcher(
    run_directory: Path, code: ExitCode
) -> None:
    """Launchers end with 1 whatever happened; status.json carries the true code."""
    trainer = f"""
        import sys
        from pathlib import Path
        from accel_gpt2.cli.launcher import recorded_outcome
        with recorded_outcome(Path(sys.argv[1])) as this:
            this.take_run_directory()
            sys.exit({int(code)})
    """
    assert run_launch(launch_of(run_directory, trainer)) == code


def test_a_killed_trainer_is_no_success(run_directory: Path) -> None:
    """A trainer that memory pressure killed says nothing, and a stale status of an earlier run must
    not speak for it."""
    (run_directory / "status.json").write_text('{"exit_code": 0}', "utf-8")
    trainer = """
        import os, signal, sys
        from pathlib import Path
        from accel_gpt2.cli.launcher import recorded_outcome
        with recorded_outcome(Path(sys.argv[1])) as this:
            this.take_run_directory()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    with pytest.raises(UserError, match=r"killed before it could say why, perhaps because memory"):
        run_launch(launch_of(run_directory, trainer))


def test_a_launcher_that_starts_nothing_is_no_success(run_directory: Path) -> None:
    """Exit code 0 without a trainer is a failure; so is a launcher that fails."""
    with pytest.raises(UserError, match="ended without having started the training"):
        run_launch(Launch(argv=("true",), run_directory=run_directory))
    with pytest.raises(UserError, match=r"could not be started \(exit code 1\).*Its command was: "):
        run_launch(Launch(argv=("false",), run_directory=run_directory))


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (signal.SIGTERM, "SIGTERM"),
        (signal.SIGINT, "SIGINT"),
        (signal.SIGUSR1, "SIGUSR1"),
        (signal.SIGHUP, "SIGTERM"),
    ],
)
def test_a_signal_to_the_parent_lets_the_trainer_save(
    run_directory: Path, parent: "subprocess.Popen[str]", sent: signal.Signals, received: str
) -> None:
    """The trainer gets the signal once; the parent stays until it has saved, and ends with 75."""
    parent.send_signal(sent)
    assert ended(parent)[0] == ExitCode.STOPPED
    assert (run_directory / "saved").read_text("utf-8") == received
    assert read_owner(run_directory) is None


def test_a_second_interrupt_is_passed_on(run_directory: Path) -> None:
    """Whoever presses Ctrl-C twice speaks to the trainer twice."""
    parent = start_parent(launch_of(run_directory, TRAINER, "2"))
    wait_for(run_directory / "training")
    parent.send_signal(signal.SIGINT)
    time.sleep(0.3)
    parent.send_signal(signal.SIGINT)
    assert ended(parent)[0] == ExitCode.STOPPED
    assert (run_directory / "saved").read_text("utf-8") == "SIGINT,SIGINT"


def test_a_third_interrupt_kills_a_trainer_that_hangs(run_directory: Path) -> None:
    """No trainer can be so stuck that the keyboard does not end it."""
    parent = start_parent(launch_of(run_directory, TRAINER, "99"))
    wait_for(run_directory / "training")
    for _ in range(3):
        parent.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert ended(parent)[0] == ExitCode.INTERRUPTED


def test_a_dead_launcher_makes_the_trainer_save_and_the_parent_waits(
    run_directory: Path, parent: "subprocess.Popen[str]"
) -> None:
    """The kernel tells the trainer that its launcher was killed; the parent still gets its code."""
    trainer = working_owner(run_directory)
    assert trainer is not None
    launcher_pid = int(Path(f"/proc/{trainer.pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(launcher_pid, signal.SIGKILL)
    assert ended(parent)[0] == ExitCode.STOPPED
    assert (run_directory / "saved").read_text("utf-8") == "SIGTERM"


def test_a_killed_parent_leaves_no_trainer_running(
    run_directory: Path, parent: "subprocess.Popen[str]"
) -> None:
    """kill -9 of `accel-gpt2 train` stops the training too, saved."""
    parent.kill()
    wait_for(run_directory / "saved")
    wait_for(run_directory / "status.json")
    wait_until(lambda: working_owner(run_directory) is None)


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (signal.SIGTERM, ExitCode.STOPPED, "Stopped by SIGTERM before the training began.\n"),
        (signal.SIGINT, ExitCode.INTERRUPTED, ""),
    ],
)
def test_a_signal_before_the_trainer_is_there_ends_the_launcher(
    run_directory: Path, sent: signal.Signals, code: ExitCode, said: str
) -> None:
    """While the launcher is still importing there is nothing to save, and nothing to wait for."""
    slow = f"import time; open({str(run_directory / 'starting')!r}, 'w'); time.sleep(60)"
    launch = Launch(argv=(sys.executable, "-c", slow), run_directory=run_directory)
    parent = start_parent(launch)
    wait_for(run_directory / "starting")
    parent.send_signal(sent)
    assert ended(parent) == (code, said)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("The folder x does not exist."), 1, "The folder x does not exist."),
        (DoesNotFitError("It needs 20 GiB."), 3, "It needs 20 GiB."),
        (StoppedEarly("The time limit is reached.", ExitCode.LIMIT_REACHED), 4, "The time limit"),
        (ValueError("bad"), 1, "ValueError: bad. Run again with --debug"),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (MemoryError(), 3, "The machine ran out of memory. What was saved before is intact"),
        (OSError(28, "No space left on device"), 1, "No space left on device. What was saved"),
    ],
)
def test_the_trainer_says_how_it_ended(
    run_directory: Path, error: BaseException, code: int, message: str
) -> None:
    """status.json holds code, message and process of whatever ended the training."""
    with pytest.raises(type(error)), recorded_outcome(run_directory) as this:  # noqa: PT012
        this.take_run_directory()
        assert getattr(read_owner(run_directory), "pid", None) == os.getpid()
        raise error
    status = json.loads((run_directory / "status.json").read_text("utf-8"))
    assert status["exit_code"] == code
    assert status["message"].startswith(message)
    assert status["pid"] == os.getpid()
    assert read_owner(run_directory) is None


def test_other_ranks_do_not_write(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only rank 0 speaks for the run."""
    monkeypatch.setenv("RANK", "1")
    with recorded_outcome(run_directory) as this:
        this.take_run_directory()
    assert list(run_directory.iterdir()) == []


def test_a_refused_trainer_does_not_speak_for_the_other_run(run_directory: Path) -> None:
    """Whoever finds another process at work leaves no status in its run directory."""
    with subprocess.Popen(["sleep", "60"]) as other:
        record = {
            "pid": other.pid,
            "create_time": psutil.Process(other.pid).create_time(),
            "host": socket.gethostname(),
            "command": "accel-gpt2 train",
            "started_at": "2026-11-23T08:00:00+00:00",
        }
        (run_directory / "owner.json").write_text(json.dumps(record), "utf-8")
        with (
            pytest.raises(UserError, match=rf"Process {other.pid} on .* is at work in"),
            recorded_outcome(run_directory) as this,
        ):
            this.take_run_directory()
        assert [path.name for path in run_directory.iterdir()] == ["owner.json"]
        other.kill()


def test_a_launchers_signal_does_not_hide_why_the_trainer_leaves(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun sends SIGTERM to the survivors of a failure, perhaps while they write it down."""
    real = launcher.write_text

    def interrupted(path: Path, text: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(path, text)

    monkeypatch.setattr(launcher, "write_text", interrupted)
    with pytest.raises(UserError, match="peer"), recorded_outcome(run_directory) as this:  # noqa: PT012
        this.take_run_directory()
        raise UserError("Its peer failed.")
    status = json.loads((run_directory / "status.json").read_text("utf-8"))
    assert (status["exit_code"], status["message"]) == (1, "Its peer failed.")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_on_a_full_disk_the_status_still_gets_its_place(tmp_path: Path) -> None:
    """What the trainer says is not lost for want of one block: the lock's record makes room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        run_directory = disk / "run"
        run_directory.mkdir()
        with pytest.raises(OSError, match="No space"), recorded_outcome(run_directory) as this:  # noqa: PT012
            this.take_run_directory()
            with (run_directory / "log.jsonl").open("wb", buffering=0) as log:
                while True:
                    log.write(b"x" * 4096)
        status = json.loads((run_directory / "status.json").read_text("utf-8"))
        assert status["exit_code"] == 1
        assert status["message"].startswith("No space left on device")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_nothing_is_written_before_the_run_directory_exists(tmp_path: Path) -> None:
    """A start that fails early leaves no folder behind."""
    with pytest.raises(UserError, match="no data"), recorded_outcome(tmp_path / "run"):
        raise UserError("no data")
    assert not (tmp_path / "run").exists()


def test_the_command_can_be_typed_as_printed(tmp_path: Path) -> None:
    """Quoting survives spaces; every value is in the command or in the files that it names."""
    launch = training_launch(
        tmp_path / "my run",
        strategy=STRATEGIES["ddp"],
        num_cores=8,
        num_processes=2,
        options=["--quiet"],
        environment={},
    )
    echoed = subprocess.run(
        f"printf '%s\\n' {launch.line}", shell=True, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert tuple(echoed) == launch.argv
    assert echoed[1:3] == ["launch", "--quiet"]
    assert "--num_cpu_threads_per_process=4" in echoed
    assert f"--recipe={tmp_path}/my run/recipe.yaml" in echoed
    assert echoed[-3:] == [f"--output-dir={tmp_path}/my run", "--strategy=ddp", "--quiet"]


def test_the_persons_number_of_threads_is_kept(tmp_path: Path) -> None:
    """OMP_NUM_THREADS is honoured, not overwritten."""
    launch = training_launch(
        tmp_path,
        strategy=STRATEGIES["single"],
        num_cores=8,
        num_processes=1,
        environment={"OMP_NUM_THREADS": "3"},
    )
    assert "--num_cpu_threads_per_process=3" in launch.argv


def test_what_is_handed_to_a_launcher_is_found() -> None:
    """The files of the checkout (or of the wheel) are where the function says."""
    names = ["launch/train.py", "launch/evaluate.py", "ds_configs/zero3.json"]
    names += [f"accelerate_configs/{name}.yaml" for name in STRATEGIES]
    for name in names:
        assert shipped_file(name).is_file()
    with pytest.raises(UserError, match=r"launch/other\.py is neither beside nor inside"):
        shipped_file("launch/other.py")


@pytest.mark.parametrize("name", STRATEGIES)
def test_accelerate_reads_our_file_and_no_stale_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Accelerate's own parser takes every value from our command and the file that it names, also
    where the person's default config asks for something else altogether."""
    from accelerate.commands import launch as accelerate_launch

    strategy = STRATEGIES[name]
    others = {
        "DEEPSPEED": {"deepspeed_config": {"zero_stage": 3, "gradient_clipping": 7.0}},
        "FSDP": {"fsdp_config": {"fsdp_version": 1, "fsdp_offload_params": True}},
    }
    stale = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP" if strategy.zero_stage else "DEEPSPEED",
        "mixed_precision": "fp16",
        "num_processes": 8,
        "num_machines": 2,
        "main_process_port": 29999,
        "gpu_ids": "5",
        "use_cpu": True,
    }
    stale |= others["FSDP" if strategy.zero_stage else "DEEPSPEED"]
    default = tmp_path / "default_config.yaml"
    default.write_text(yaml.safe_dump(stale), "utf-8")
    monkeypatch.setattr(accelerate_launch, "default_config_file", str(default))

    launch = training_launch(
        tmp_path, strategy=strategy, num_cores=4, num_processes=4, environment={}
    )
    parser = accelerate_launch.launch_command_parser()
    parsed, _, _ = accelerate_launch._validate_launch_command(parser.parse_args(launch.argv[2:]))

    assert (parsed.num_processes, parsed.num_machines) == (4, 1)
    assert parsed.main_process_port == (None if name == "single" else 0)
    assert (parsed.mixed_precision, parsed.gpu_ids, parsed.use_cpu) == ("no", "all", False)
    kinds = (bool(parsed.multi_gpu), bool(parsed.use_fsdp), bool(parsed.use_deepspeed))
    assert kinds == tuple(strategy.backend == x for x in ("ddp", "fsdp2", "deepspeed"))
    assert (parsed.zero_stage, parsed.gradient_clipping) == (None, None)
    assert (parsed.fsdp_version, parsed.fsdp_offload_params) == (
        (2, False) if name == "fsdp2" else ("1", "false")
    )
    if strategy.backend == "deepspeed":
        config = json.loads(Path(parsed.deepspeed_config_file).read_text("utf-8"))
        assert config["zero_optimization"]["stage"] == strategy.zero_stage
    assert parsed.training_script.endswith("launch/train.py")
    assert parsed.training_script_args == list(launch.argv[-3:])


@pytest.mark.parametrize(
    ("profile", "platform", "before", "added"),
    [
        ("rtx4070ti", "linux", {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ("cpu", "linux", {}, {}),
        ("rtx4070ti", "win32", {}, {}),
        ("rtx4070ti", "linux", {"PYTORCH_ALLOC_CONF": ""}, {}),
        ("rtx4070ti", "linux", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {}),
    ],
)
def test_the_allocator_is_set_where_the_person_has_not(
    profile: str, platform: str, before: dict[str, str], added: dict[str, str]
) -> None:
    """On a GPU under Linux; whatever the person has said about it, also nothing, stays."""
    environment = dict(before)
    use_expandable_segments(PROFILES[profile], environment, platform)
    assert environment == before | added


def test_gpus_are_numbered_as_they_were_detected() -> None:
    """`nvidia-smi` lists them by bus; whatever the person has set stays."""
    for before, after in (({}, "PCI_BUS_ID"), ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, None)):
        environment = dict(before)
        use_nvidia_smi_order(environment)
        assert environment["CUDA_DEVICE_ORDER"] == (after or before["CUDA_DEVICE_ORDER"])


def test_accelerate_itself_starts_the_trainer_and_stays_quiet(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through the real `accelerate launch`: one CPU process, our threads, code 75, no traceback."""
    script = run_directory.parent / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, sys
            from pathlib import Path
            from accel_gpt2.cli.launcher import recorded_outcome
            from accel_gpt2.errors import ExitCode, StoppedEarly
            run_directory = Path(sys.argv[2].partition("=")[2])
            with recorded_outcome(run_directory) as this:
                this.take_run_directory()
                names = ("ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS")
                (run_directory / "seen").write_text(" ".join(os.environ[n] for n in names))
                sys.exit(75)
            """
        ),
        "utf-8",
    )
    monkeypatch.setattr(
        launcher, "shipped_file", lambda name: script if "train" in name else shipped_file(name)
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    code = run_launch(
        training_launch(run_directory, strategy=STRATEGIES["single"], num_cores=3, num_processes=1)
    )

    assert code == ExitCode.STOPPED
    assert (run_directory / "seen").read_text("utf-8") == "False no 3"
    assert "Traceback" not in capfd.readouterr().err
