"""SkyPilot, called as the program `sky` from its own environment: Lambda, AWS, GCP, Azure, RunPod.

It cannot share ours, because it pins an older click than huggingface_hub needs.
"""

import dataclasses
import datetime
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accel_gpt2.classify.lock import LOCK_FILE, OWNER_FILE
from accel_gpt2.cloud.engine import Standing, What, Wish, listed_offer, quote_offer
from accel_gpt2.cloud.fetch import fetch_run
from accel_gpt2.cloud.lambda_api import LAMBDA_URL, find_key, instance_types
from accel_gpt2.cloud.ledger import Launch, exit_code_of, launch_directory
from accel_gpt2.cloud.programs import Answer, Runner, run_program
from accel_gpt2.durable import STAGING_PREFIX
from accel_gpt2.errors import ExitCode, UserError
from accel_gpt2.plan.cost import CostQuote
from accel_gpt2.render.cloud import sky_yaml
from accel_gpt2.render.cloud_job import CloudJob

SKY_VERSION = "0.14.1"
INSTALL = f"uv tool install 'skypilot[lambda,aws,gcp,azure,runpod]=={SKY_VERSION}'"

TASK = "task.sky.yaml"

# `sky launch` and `sky logs --status` end with these for a job that is known (sky/exceptions.py,
# JobExitCode); a launch that never became a job ends with others.
_JOB_STANDINGS: dict[int, Standing] = {
    0: "succeeded",
    100: "failed",
    101: "running",
    102: "gone",
    103: "cancelled",
}

_BILLED: tuple[Standing, ...] = ("starting", "running")

_AZURE_ACCOUNT = "AZURE_STORAGE_ACCOUNT"

_ASK_SECONDS = 120.0  # the first `sky` of a day starts its server and fetches its catalogs
_DOWN_SECONDS = 600.0
_FETCH_SECONDS = 1800.0
_LATER_SECONDS = 1800.0  # after the budget's last second, until a launch that hangs is given up


@dataclass(frozen=True, slots=True, kw_only=True)
class SkyPilotEngine:
    """One cluster for each launch, named as it; spot machines are managed jobs, which recover."""

    run: Runner = run_program
    lambda_url: str = LAMBDA_URL

    def quote(self, wish: Wish) -> CostQuote:
        offer = listed_offer(wish)
        if wish.cloud.provider == "lambda" and (key := find_key()) is not None:
            machines = instance_types(key, base_url=self.lambda_url)
            price = _live_price(offer.sku, machines, self.lambda_url)
            offer = dataclasses.replace(
                offer,
                usd_per_gpu_hour=price / offer.min_gpus,
                as_of=datetime.datetime.now().date(),
                source=f"{self.lambda_url}/api/v1/instance-types",
            )
        return quote_offer(offer, wish)

    def render(self, job: CloudJob) -> dict[str, str]:
        return {TASK: sky_yaml(job), "command.txt": shlex.join(_launch_argv(job)) + "\n"}

    def check(self) -> None:
        """The program is there, in the version whose behaviour is relied upon."""
        install = f"Install it beside this environment: {INSTALL}"
        try:
            answer = self._ask("--version")
        except UserError as error:
            raise UserError(f"{error} {install}") from None
        found = re.search(r"version (\d+\.\d+)\S*", answer.stdout)
        if found is None or found[1] != SKY_VERSION.rpartition(".")[0]:
            said = answer.stdout.strip() or f"nothing (exit code {answer.exit_code})"
            raise UserError(
                f"`sky --version` says {said!r}, and {SKY_VERSION} is needed. {install}"
            )

    def submit(self, job: CloudJob, launch: Launch) -> int | None:
        deadline = datetime.datetime.fromisoformat(launch.deadline)
        left = (deadline - datetime.datetime.now(datetime.UTC)).total_seconds()
        try:
            answer = self.run(_launch_argv(job), left + _LATER_SECONDS, False)
        except UserError as error:  # it hangs
            raise self._given_up(launch, str(error)) from None
        if answer.exit_code not in _JOB_STANDINGS:
            raise self._given_up(launch, f"`sky launch` failed ({answer.exit_code}); see above.")
        standing = _JOB_STANDINGS[answer.exit_code]
        if standing == "running":
            raise UserError(
                f"The connection to {job.name} was lost and the training goes on; `accel-gpt2 "
                f"cloud logs {job.name}` follows it, `accel-gpt2 cloud cancel {job.name}` ends it."
            )
        if standing in {"gone", "cancelled"}:
            raise self._given_up(launch, f"The job was {standing} before its end.")
        fetch_run(self, launch)
        if not launch.spot:  # else its machine is gone
            self.cancel(launch)
        return int(ExitCode.DONE) if standing == "succeeded" else exit_code_of(launch)

    def status(self, launch: Launch) -> Standing:
        argv = ("jobs", "queue") if launch.spot else ("logs", "--status", launch.name)
        answer = self._ask(*argv)
        if launch.spot:
            if answer.exit_code != 0:
                raise UserError(f"`sky jobs queue` failed ({answer.exit_code}); see above.")
            return _managed_standing(answer.stdout, launch.name)
        if answer.exit_code in _JOB_STANDINGS:
            return _JOB_STANDINGS[answer.exit_code]
        clusters = self._ask("status", launch.name, "--output", "json")
        if clusters.exit_code != 0:
            raise UserError(f"`sky status` failed ({clusters.exit_code}); what it said is above.")
        return "starting" if f'"{launch.name}"' in clusters.stdout else "gone"

    def logs(self, launch: Launch, *, follow: bool) -> None:
        how = "--follow" if follow else "--no-follow"
        argv = (
            ("sky", "jobs", "logs", how, "--name", launch.name)
            if launch.spot
            else ("sky", "logs", how, launch.name)
        )
        self.run(argv, 7 * 86400.0, False)

    def cancel(self, launch: Launch) -> None:
        argv = (
            ("sky", "jobs", "cancel", "--yes", "--name", launch.name)
            if launch.spot
            else ("sky", "down", "--yes", launch.name)
        )
        answer = self.run(argv, _DOWN_SECONDS, False)
        if answer.exit_code != 0 and not (launch.spot and self.status(launch) not in _BILLED):
            raise UserError(
                f"`{shlex.join(argv)}` failed ({answer.exit_code}), and {launch.name} may be "
                "running and billed: try again, or end it on the provider's page."
            )

    def _ask(self, *words: str) -> Answer:
        return self.run(("sky", *words), _ASK_SECONDS, True)

    def copy(self, launch: Launch, what: What) -> None:
        """By SSH, whose configuration SkyPilot keeps; from the bucket when the machine is gone."""
        on_machine = launch.bucket is None
        if launch.bucket is not None and not launch.spot:
            on_machine = self.status(launch) != "gone"
        Path(launch.run_directory).mkdir(parents=True, exist_ok=True)
        argv = _rsync_argv(launch, what) if on_machine else _bucket_argv(launch, what)
        answer = self.run(argv, _FETCH_SECONDS, False)
        if answer.exit_code != 0:
            where = (
                "on the machine, which is taken down when it was idle for some minutes"
                if on_machine
                else f"in {launch.bucket}"
            )
            raise UserError(
                f"The results are still {where}: `{shlex.join(argv)}` failed ({answer.exit_code}). "
                f"Type `accel-gpt2 cloud fetch {launch.name}`"
                + (f", then `accel-gpt2 cloud cancel {launch.name}`." if on_machine else ".")
            )

    def _given_up(self, launch: Launch, why: str) -> UserError:
        """What to tell when a launch went wrong, after taking down what there may be of it."""
        try:
            self.cancel(launch)
        except UserError as error:
            return UserError(f"{why} {error} Or type `accel-gpt2 cloud reap`.")
        return UserError(f"{why} What was started is taken down.")


def _launch_argv(job: CloudJob) -> Sequence[str]:
    task = str(launch_directory(job.name) / TASK)
    if job.spot:
        return ("sky", "jobs", "launch", "--yes", f"--name={job.name}", task)
    return ("sky", "launch", "--yes", f"--cluster={job.name}", task)


def _rsync_argv(launch: Launch, what: What) -> tuple[str, ...]:
    run = Path(launch.run_directory)
    left_out = (LOCK_FILE, OWNER_FILE, *(["checkpoint-*"] if what == "results" else []))
    return (
        "rsync",
        "--archive",
        f"--partial-dir={STAGING_PREFIX}rsync",  # what broke off goes on in the middle of a file
        *(f"--exclude={name}" for name in left_out),
        f"{launch.name}:sky_workdir/runs/{run.name}/",
        f"{run}/",
    )


def _bucket_argv(launch: Launch, what: What) -> tuple[str, ...]:
    """The provider's own program, each of which copies what is missing.

    Raises:
        UserError: when Azure's account, which is in its addresses, is not known.
    """
    run, where = launch.run_directory, f"{launch.bucket}/{Path(launch.run_directory).name}"
    only_results = what == "results"
    if launch.provider == "aws":
        without = ("--exclude=*/checkpoint-*",) if only_results else ()
        return ("aws", "s3", "sync", f"s3://{where}", run, *without)
    if launch.provider == "gcp":
        without = ("--exclude=.*/checkpoint-.*",) if only_results else ()
        return ("gcloud", "storage", "rsync", "--recursive", *without, f"gs://{where}", run)
    account = os.environ.get(_AZURE_ACCOUNT)
    if not account:
        raise UserError(
            f"Which storage account has {launch.bucket}? Set {_AZURE_ACCOUNT} (`az storage account "
            f"list` names them), then type `accel-gpt2 cloud fetch {launch.name}`."
        )
    without = ("--exclude-regex=checkpoint-",) if only_results else ()
    url = f"https://{account}.blob.core.windows.net/{where}/*"
    return ("azcopy", "copy", url, run, "--recursive", "--overwrite=ifSourceNewer", *without)


def _managed_standing(queue: str, name: str) -> Standing:
    """A managed job's row in the table of `sky jobs queue`.

    >>> _managed_standing("1  -  accel-gpt2-a  1x[A100:1]  2m  1m  0  RUNNING  -", "accel-gpt2-a")
    'running'
    """
    standings: dict[str, Standing] = {
        "SUCCEEDED": "succeeded",
        "CANCELLED": "cancelled",
        "FAILED": "failed",
        "RUNNING": "running",
        "RECOVERING": "running",
        "PENDING": "starting",
        "STARTING": "starting",
    }
    for line in queue.splitlines():
        words = line.split()
        if name in words:
            return next((x for word, x in standings.items() if word in line), "failed")
    return "gone"


def _live_price(sku: str, machines: dict[str, dict[str, object]], url: str) -> float:
    """What Lambda asks for a machine now, in dollars an hour.

    Raises:
        UserError: when none is free.
    """
    try:
        free = sorted(
            name for name, machine in machines.items() if machine["regions_with_capacity_available"]
        )
        if sku in free:
            described = machines[sku]["instance_type"]
            return float(described["price_cents_per_hour"]) / 100  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{url} answered something that is no list of instance types.") from None
    there = f" Free are {', '.join(free)}." if free else ""
    raise UserError(f"Lambda has no {sku} free in any region now: try again later.{there}")
