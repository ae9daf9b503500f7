"""Hugging Face Jobs, through huggingface_hub: its `hf` to submit and follow, its API to ask."""

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_gpt2.cloud.engine import Standing, What, Wish, listed_offer, quote_offer
from accel_gpt2.cloud.fetch import fetch_run
from accel_gpt2.cloud.ledger import Launch, exit_code_of
from accel_gpt2.cloud.programs import Runner, run_program
from accel_gpt2.errors import ExitCode, UserError
from accel_gpt2.plan.cost import CostQuote
from accel_gpt2.render.cloud import hf_jobs_argv
from accel_gpt2.render.cloud_job import CloudJob

_SUBMIT_SECONDS = 900.0  # the sources are uploaded first
_FETCH_SECONDS = 1800.0
_FOLLOW_SECONDS = 7 * 86400.0

_STANDINGS: dict[str, Standing] = {
    "COMPLETED": "succeeded",
    "CANCELED": "cancelled",
    "ERROR": "failed",
    "DELETED": "gone",
    "SCHEDULING": "starting",
    "RUNNING": "running",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HfJobsEngine:
    """One job for each launch, named as it; its results are in the bucket."""

    run: Runner = run_program
    endpoint: str | None = None  # None: the hub's own

    def quote(self, wish: Wish) -> CostQuote:
        return quote_offer(listed_offer(wish), wish)

    def render(self, job: CloudJob) -> dict[str, str]:
        return {"command.txt": shlex.join(hf_jobs_argv(job)) + "\n"}

    def check(self) -> None:
        """The `hf` of huggingface_hub is in this very environment."""

    def submit(self, job: CloudJob, launch: Launch) -> int | None:
        answer = self.run(_with_own_hf(hf_jobs_argv(job)), _SUBMIT_SECONDS, False)
        if answer.exit_code != 0:
            raise UserError(
                f"`hf jobs run` failed ({answer.exit_code}); see above. `hf auth login` if it is "
                "the token, `hf buckets create` if it is the bucket."
            )
        self.logs(launch, follow=True)
        standing = self.status(launch)
        if standing in {"starting", "running"}:
            raise UserError(
                f"The log of {job.name} ended and the job goes on; `accel-gpt2 cloud logs "
                f"{job.name}` follows it, `accel-gpt2 cloud cancel {job.name}` ends it."
            )
        fetch_run(self, launch)
        return int(ExitCode.DONE) if standing == "succeeded" else exit_code_of(launch)

    def status(self, launch: Launch) -> Standing:
        jobs = self._jobs(launch)
        return _STANDINGS.get(str(jobs[0].status.stage), "failed") if jobs else "gone"

    def logs(self, launch: Launch, *, follow: bool) -> None:
        jobs = self._jobs(launch)
        if not jobs:
            raise UserError(f"The hub knows no job named {launch.name}.")
        argv = ["hf", "jobs", "logs", *(["--follow"] if follow else []), jobs[0].id]
        self.run(_with_own_hf(argv), _FOLLOW_SECONDS, False)

    def cancel(self, launch: Launch) -> None:
        from huggingface_hub import HfApi

        for job in self._jobs(launch):
            if _STANDINGS.get(str(job.status.stage)) in {"starting", "running"}:
                with _asking():
                    HfApi(endpoint=self.endpoint).cancel_job(job_id=job.id)

    def _jobs(self, launch: Launch) -> list[Any]:
        """The jobs of this name, whose random part makes it the only one."""
        from huggingface_hub import HfApi

        with _asking():
            api = HfApi(endpoint=self.endpoint)
            user = api.whoami()["name"]  # list_jobs would ask the public hub, whatever the endpoint
            jobs = api.list_jobs(labels={"name": launch.name}, namespace=user, timeout=60)
            return list(jobs)

    def copy(self, launch: Launch, what: What) -> None:
        source = f"hf://buckets/{launch.bucket}/{Path(launch.run_directory).name}"
        without = ("--exclude=*/checkpoint-*",) if what == "results" else ()
        argv = ("hf", "buckets", "sync", source, launch.run_directory, *without)
        answer = self.run(_with_own_hf(argv), _FETCH_SECONDS, False)
        if answer.exit_code != 0:
            raise UserError(
                f"The results are in {source}: `{shlex.join(argv)}` failed ({answer.exit_code}). "
                f"Type `accel-gpt2 cloud fetch {launch.name}`."
            )


def _with_own_hf(argv: tuple[str, ...] | list[str]) -> list[str]:
    """With the `hf` of this very environment, where there is one."""
    beside = Path(sys.executable).parent / argv[0]
    return [str(beside) if beside.exists() else argv[0], *argv[1:]]


@contextmanager
def _asking() -> Iterator[None]:
    """Whatever goes wrong with the hub is one sentence; huggingface_hub's texts hold no token."""
    try:
        yield
    except Exception as error:  # the network's errors have many types
        first_line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The hub could not be asked: {first_line}. Check the connection and `hf auth whoami`."
        ) from None
