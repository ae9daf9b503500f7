"""This machine as if it were rented: the same scripts, in a fresh directory. A rehearsal."""

import contextlib
import datetime
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from accel_gpt2.cloud.engine import Standing, What, Wish, upload_directory
from accel_gpt2.cloud.fetch import fetch_run
from accel_gpt2.cloud.keep import copy_run, in_checkpoint
from accel_gpt2.cloud.ledger import Launch, exit_code_of, launch_directory
from accel_gpt2.errors import UsageError, UserError
from accel_gpt2.plan.cost import CostQuote
from accel_gpt2.render.cloud_job import CloudJob, run_script, setup_script

SETUP, RUN = "setup.sh", "run.sh"
_PID = "pid"  # of the session in which the scripts run


class LocalEngine:
    """Installs nothing: it uses this program's own environment, with the uploaded sources."""

    def quote(self, wish: Wish) -> CostQuote:
        if wish.usd_per_hour is None:
            raise UsageError(
                "What this machine costs is not known: give --usd-per-hour, for instance 0.08 for "
                "the electricity of one GPU."
            )
        seconds = wish.run_seconds
        return CostQuote(
            provider=wish.cloud.provider,
            sku="this machine",
            gpu=wish.gpu,
            form_factor="unknown",
            tier="own",
            num_gpus=wish.num_gpus,
            pricing="on-demand",
            usd_per_hour=wish.usd_per_hour,
            run_seconds=seconds,
            setup_seconds=0,
            billed_seconds=seconds,
            usd_compute=wish.usd_per_hour * seconds / 3600,
            usd_disk=0.0,
            usd_egress=0.0,
            usd_total=wish.usd_per_hour * seconds / 3600,
            spot_usd_total=None,
            not_included=(),
            as_of=datetime.datetime.now().date(),
            age_days=0,
            freshness="fresh",
            source="--usd-per-hour",
        )

    def render(self, job: CloudJob) -> dict[str, str]:
        machine = shlex.quote(str(_machine(job.name)))
        command = f"cd {machine} && TRAINING_BIN={shlex.quote(str(_bin()))} bash"
        lines = f"{command} ../{SETUP}\n{command} ../{RUN}\n"
        return {SETUP: setup_script(job), RUN: run_script(job), "command.txt": lines}

    def check(self) -> None:
        """Bash is here: this program runs."""

    def submit(self, job: CloudJob, launch: Launch) -> int | None:
        machine = _machine(job.name)
        shutil.copytree(upload_directory(job.name), machine)
        if _run_script(machine, SETUP) == 0:
            _run_script(machine, RUN)
        fetch_run(self, launch)
        shutil.rmtree(machine)
        return exit_code_of(launch)

    def status(self, launch: Launch) -> Standing:
        return "gone" if _session(launch) is None else "running"

    def logs(self, launch: Launch, *, follow: bool) -> None:
        raise UsageError(
            f"What {launch.name} says is in the terminal that launched it, and in log.jsonl below "
            f"{_machine(launch.name) / 'runs'}."
        )

    def copy(self, launch: Launch, what: What) -> None:
        run = Path(launch.run_directory)
        source = _machine(launch.name) / "runs" / run.name
        if not source.is_dir() and launch.bucket is not None:
            source = Path(launch.bucket) / run.name
        if not source.is_dir():
            raise UserError(
                f"Nothing of {launch.name} is left but what {run} has: it had no --bucket."
                if launch.bucket is None
                else f"Nothing of {launch.name} is in {launch.bucket}."
            )
        only_results = what == "results"
        copy_run(source, run, leave_out=lambda path: only_results and in_checkpoint(path))

    def cancel(self, launch: Launch) -> None:
        session = _session(launch)
        if session is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(session, signal.SIGTERM)  # the run script has the training save
        elif launch.state != "ended":
            shutil.rmtree(_machine(launch.name), ignore_errors=True)


def _machine(name: str) -> Path:
    return launch_directory(name) / "machine"


def _bin() -> Path:
    return Path(sys.executable).parent


def _run_script(machine: Path, name: str) -> int:
    """Run a script as an engine would; a Ctrl-C here has it save and stop."""
    process = subprocess.Popen(
        ["bash", f"../{name}"],
        cwd=machine,
        env={**os.environ, "TRAINING_BIN": str(_bin())},
        stdin=subprocess.DEVNULL,
        stdout=2,
        start_new_session=True,
    )
    pid = machine / _PID
    pid.write_text(str(process.pid))
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                process.terminate()
    finally:
        pid.unlink()


def _session(launch: Launch) -> int | None:
    """The process that runs a launch's script, or None when none does."""
    import psutil

    try:
        process = psutil.Process(int((_machine(launch.name) / _PID).read_text()))
        there = process.cwd() == str(_machine(launch.name).resolve())
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    except (ValueError, OSError, psutil.Error) as error:
        raise UserError(f"Whether {launch.name} still runs is not known: {error}.") from None
    return process.pid if there else None
