"""Starting a trainer through `accelerate launch`, and staying with it until it has saved.

The trainer says how it ended in the run directory's `status.json`, because launchers turn every
failure into 1. Signals go to the trainer alone: it finishes its step and saves, while a launcher
that is hit by the same signal dies at once or kills what it started.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.classify.lock import hold, read_owner, working_owner
from accel_gpt2.classify.status import STATUS_FILE, read_ending, with_ending
from accel_gpt2.cli.errors import outcome
from accel_gpt2.cli.hardware import threads_per_process
from accel_gpt2.cli.output import is_main_process, say
from accel_gpt2.cli.run_directory import RECIPE_FILE
from accel_gpt2.durable import write_text
from accel_gpt2.errors import ExitCode, StoppedEarly, UserError
from accel_gpt2.failures import mark_as_told
from accel_gpt2.parent import WAITED_FOR_BY, stop_with_parent
from accel_gpt2.render.accelerate import ACCELERATE_DIRECTORY, DEEPSPEED_DIRECTORY
from accel_gpt2.terminal import shortened

COMMAND_FILE = "command.txt"

_KILLING_INTERRUPTS = 3  # Ctrl-C: 1 saves and stops, 2 stops, 3 kills a trainer that hangs
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A command, and the run directory in which its trainer works."""

    argv: tuple[str, ...]
    run_directory: Path

    @property
    def line(self) -> str:
        """The command as one types it."""
        return shlex.join(self.argv)


class Launcher(Protocol):
    """What runs a launch to its end and returns the exit code of the trainer."""

    def __call__(self, launch: Launch) -> int: ...


def shipped_file(name: str) -> Path:
    """A file that is handed to a launcher, such as `launch/train.py`: a checkout's, or its copy
    inside an installed package.

    Raises:
        UserError: when neither is there.
    """
    import accel_gpt2

    package = Path(accel_gpt2.__file__).parent
    for path in (package.parent / name, package / f"_{name}"):
        if path.is_file():
            return _relative(path)
    raise UserError(f"{name} is neither beside nor inside {package}: install accel-gpt2 again.")


def _relative(path: Path) -> Path:
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the newer name first


def use_expandable_segments(
    profile: HardwareProfile,
    environment: MutableMapping[str, str] = os.environ,
    platform: str = sys.platform,
) -> None:
    """Have torch's allocator grow its blocks of GPU memory, before torch is imported.

    Batches of many shapes leave gaps between blocks of fixed sizes: torch would reserve 4 to 31%
    more than it allocates. It can do so on Linux; what the person has set stays.
    """
    if profile.gpu is None or platform != "linux":
        return
    if not any(name in environment for name in _ALLOCATOR_VARIABLES):
        environment[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def use_nvidia_smi_order(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have CUDA number the GPUs as `nvidia-smi` does, by which they were detected, before torch is
    imported. Its own order is fastest first; what the person has set stays."""
    environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def training_launch(
    run_directory: Path,
    *,
    strategy: ShardingStrategy,
    num_cores: int,
    num_processes: int,
    options: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> Launch:
    """The `accelerate launch` command that trains what a run directory's recipe says.

    It always names the strategy's file: without one a default_config.yaml of the person's would
    apply. `options` are passed on to `launch/train.py`. Where OMP_NUM_THREADS says nothing, each
    process gets its share of the cores; accelerate would give it one.
    """
    configs = [f"--config_file={shipped_file(f'{ACCELERATE_DIRECTORY}/{strategy.name}.yaml')}"]
    if strategy.backend == "deepspeed":  # which the YAML calls by where it is in a checkout
        file = shipped_file(f"{DEEPSPEED_DIRECTORY}/{strategy.name}.json")
        configs.append(f"--deepspeed_config_file={file}")
    threads = threads_per_process(num_cores, num_processes, environment)
    argv = (
        _accelerate(),
        "launch",
        # Without --quiet, accelerate adds a traceback of its own to each exit code but 0.
        "--quiet",
        *configs,
        f"--num_processes={num_processes}",
        f"--num_cpu_threads_per_process={threads}",
        str(shipped_file("launch/train.py")),
        f"--recipe={run_directory / RECIPE_FILE}",
        f"--output-dir={run_directory}",
        f"--strategy={strategy.name}",
        *options,
    )
    return Launch(argv=argv, run_directory=run_directory)


def _accelerate() -> str:
    """The accelerate of this very Python, by its bare name where the shell would find the same."""
    beside = Path(sys.executable).parent / "accelerate"
    found = shutil.which("accelerate")
    if found is not None and (not beside.exists() or Path(found).samefile(beside)):
        return "accelerate"
    if beside.exists():
        return str(beside)
    raise UserError(
        f"The command `accelerate` is not installed beside {sys.executable}: type "
        "`pip install accelerate`."
    )


def run_launch(launch: Launch) -> int:
    """Run a launch as a child, pass signals on to its trainer, and return the trainer's exit code.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP reach the trainer (SIGHUP as SIGTERM: a closed terminal
    saves too). This process stays until the trainer has ended, also when the launcher has died.
    """
    (launch.run_directory / STATUS_FILE).unlink(missing_ok=True)
    process = subprocess.Popen(
        launch.argv,
        env={**os.environ, WAITED_FOR_BY: str(os.getpid())},
        stdin=subprocess.DEVNULL,
        stdout=2,  # what a trainer or a library prints is talk; our stdout is for data
        start_new_session=True,  # the terminal's Ctrl-C comes to us alone, and is passed on once
        preexec_fn=stop_with_parent,  # noqa: PLW1509 -- one C call, and no thread runs here
    )
    signals: list[int] = []
    with _passing_on(process, launch.run_directory, signals):
        launcher_code = process.wait()
        owner = read_owner(launch.run_directory)
        trained = owner is not None and owner.pid != os.getpid()
        while working_owner(launch.run_directory) is not None:
            time.sleep(_POLL_SECONDS)
    return _exit_code(launch, launcher_code, signals, trained=trained)


@contextlib.contextmanager
def _passing_on(
    process: "subprocess.Popen[bytes]", run_directory: Path, signals: list[int]
) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if signals.count(signal.SIGINT) >= _KILLING_INTERRUPTS:
            _signal_group(process, signal.SIGKILL)
            return
        trainer = working_owner(run_directory)
        if trainer is None:  # the launcher is still starting it, and nothing is worth saving
            _signal_group(process, signal.SIGTERM)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(trainer.pid, signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]
    # Under nohup a closed terminal is no reason to stop.
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _exit_code(launch: Launch, launcher_code: int, signals: list[int], *, trained: bool) -> int:
    ending = read_ending(launch.run_directory)
    if ending is not None:
        code, message = ending
        # Here and not by the trainer, so that it comes after all that its launcher has to say.
        saved = code in {ExitCode.DONE, ExitCode.LIMIT_REACHED, ExitCode.STOPPED}
        if message:
            say(shortened(message), style="" if saved else "red")
        return code
    if signal.SIGINT in signals:
        return ExitCode.INTERRUPTED
    if signals and not trained:
        name = signal.Signals(signals[0]).name
        raise StoppedEarly(f"Stopped by {name} before the training began.", ExitCode.STOPPED)
    if launcher_code == ExitCode.DONE:
        raise UserError("The launcher ended without having started the training.")
    if not trained:
        raise UserError(
            f"The training could not be started (exit code {launcher_code}); what the launcher "
            f"said is above. Its command was: {launch.line}"
        )
    raise UserError(
        "The trainer was killed before it could say why, perhaps because memory ran out (`dmesg` "
        "tells). Start it again to go on from the newest whole checkpoint, with a smaller "
        "--set micro_batch_tokens=... if it was memory."
    )


def starter() -> int | None:
    """The process that started this one and waits for it, where one does."""
    waiting = os.environ.get(WAITED_FOR_BY)
    return None if waiting is None else int(waiting)


class Trainer:
    """The trainer's side of a launch: the lock of its run directory, and how it ended.

    Only the main process writes. While it has not got the directory, which another start may have,
    it writes nothing.
    """

    def __init__(self, run_directory: Path) -> None:
        self._run_directory = run_directory
        self._held = contextlib.ExitStack()
        self._holds = False

    def take_run_directory(self) -> None:
        """Take over the directory from whoever started this process; more than once is the same.

        Raises:
            UserError: when another process is at work there.
        """
        if is_main_process() and not self._holds:
            self._held.enter_context(hold(self._run_directory, heir_of=starter()))
            self._holds = True

    def record(self, error: BaseException | None) -> None:
        """Say in `status.json` how this process ends, for whoever waits for it."""
        if not self._holds:
            return
        code, message = outcome(error)
        status = with_ending(
            self._run_directory, exit_code=code, message=message, process=os.getpid()
        )
        path = self._run_directory / STATUS_FILE
        try:
            write_text(path, status)
        except UserError:
            self.leave_run_directory()  # on a full disk the lock's own record makes the room
            with contextlib.suppress(UserError):
                write_text(path, status)
        if error is not None and starter() is not None and path.exists():
            mark_as_told(error)  # who waits says it, after the launcher's own words

    def leave_run_directory(self) -> None:
        """Let others into the run directory."""
        self._held.close()
        self._holds = False


@contextlib.contextmanager
def recorded_outcome(run_directory: Path) -> Iterator[Trainer]:
    """The trainer's side: whatever happens, say how the block ended, once it has the directory.

    Until the training installs its own handlers, SIGTERM and SIGUSR1 raise `StoppedEarly` here.
    """
    trainer = Trainer(run_directory)
    if not is_main_process():
        yield trainer
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop_before_training)
    error: BaseException | None = None
    try:
        yield trainer
    except BaseException as raised:
        error = raised
        raise
    finally:
        # A launcher that has seen another process fail signals this one, which is leaving.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        trainer.record(error)
        trainer.leave_run_directory()


def _stop_before_training(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    raise StoppedEarly(f"Stopped by {name} before the training began.", ExitCode.STOPPED)
