"""What a rented machine is told: set-up and run scripts, SkyPilot's YAML, `hf jobs` command lines.

The scripts are one text for every engine. Their working directory holds what was uploaded; the run
directory is below it, on the machine's own disk, and is copied to the bucket where there is one.
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from accel_gpt2.catalog.engines import CLOUDS, CloudSpec
from accel_gpt2.catalog.prices import GpuPrice, shipped_prices

LAUNCH_DIRECTORY = "launch"

# What is rented and cannot be set up in this time is broken. Installing takes 3 to 6 minutes.
SETUP_LIMIT_SECONDS = 1200

# From SIGTERM to SIGKILL, which comes when the budget is used up: a step and a checkpoint of the
# largest model. The trainer itself stops long before, so less will do where there is less.
_GRACE_SECONDS = 120
_GRACE_SHARE = 0.02

# Until SkyPilot takes an idle machine down. Where no bucket has the results, they have to be
# fetched from the machine, which `accel-gpt2 cloud launch` does as soon as the training ends.
_KEPT_MINUTES_WITH_BUCKET = 5
_KEPT_MINUTES_WITHOUT = 15

_COPY_EVERY_SECONDS = 300
_RECOVERIES = 3  # by SkyPilot, of a job that failed by itself; preempted ones are always recovered

_KEPT = "/kept"  # where the bucket is mounted
_HF_IMAGE = "ghcr.io/astral-sh/uv:0.9-python3.12-bookworm"
_UV_INSTALLER = "https://astral.sh/uv/install.sh"


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudJob:
    """One training on one rented machine.

    `words` are typed after `accel-gpt2 train`, without directory and budget. `run_directory` is
    where the results are to be here, `uploaded` the directory that goes to the machine. `package`
    is what the machine installs: `./package` or `.` where the sources are uploaded, or anything
    else that pip takes. `usd_per_hour` is of the whole machine, and `budget_usd` for all attempts,
    of which earlier ones had `spent_usd`, as far as it is known here.
    """

    name: str
    cloud: CloudSpec
    gpu: str
    num_gpus: int
    usd_per_hour: float
    budget_usd: float
    words: tuple[str, ...]
    run_directory: str
    uploaded: str
    package: str
    bucket: str | None = None
    spot: bool = False
    spent_usd: float = 0.0

    @property
    def run_name(self) -> str:
        """The last part of the run directory, which it has on the machine and in the bucket too."""
        return self.run_directory.rstrip("/").rsplit("/", 1)[-1]

    @property
    def kept_minutes(self) -> int:
        """How long an idle machine is kept until SkyPilot takes it down."""
        return kept_minutes(self.cloud, self.bucket)

    @property
    def budget_seconds(self) -> int:
        """The time that the budget pays for, from the beginning of the bill to its end."""
        return int(self.budget_usd / self.usd_per_hour * 3600)

    @property
    def left_seconds(self) -> int:
        """What of it earlier attempts have left."""
        return int((self.budget_usd - self.spent_usd) / self.usd_per_hour * 3600)

    @property
    def grace_seconds(self) -> int:
        """How long before the end of the budget a training is told to save and stop."""
        return max(1, min(_GRACE_SECONDS, int(self.budget_seconds * _GRACE_SHARE)))

    @property
    def unseen_seconds(self) -> int:
        """What is billed before the first script begins and after the last one ends."""
        return self.cloud.boot_seconds + 60 * self.kept_minutes

    @property
    def kept(self) -> str | None:
        """Where the run directory is copied to on the machine: a mounted bucket, or None."""
        if self.bucket is None:
            return None
        root = self.bucket if self.cloud.engine == "local" else _KEPT
        return f"{root.rstrip('/')}/{self.run_name}"

    @property
    def train_command(self) -> str:
        """What the machine runs."""
        return shlex.join(
            [
                "accel-gpt2",
                "train",
                *self.words,
                f"--output-dir=runs/{self.run_name}",
                f"--budget-usd={self.budget_usd:g}",
                f"--set=price_usd_per_hour={self.usd_per_hour:g}",
                "--quiet",
            ]
        )


def kept_minutes(cloud: CloudSpec, bucket: str | None) -> int:
    """How long an idle machine is billed until its engine takes it down.

    >>> kept_minutes(CLOUDS["lambda"], None), kept_minutes(CLOUDS["hf-jobs"], "me/runs")
    (15, 0)
    """
    if cloud.engine != "skypilot":
        return 0
    return _KEPT_MINUTES_WITHOUT if bucket is None else _KEPT_MINUTES_WITH_BUCKET


def setup_script(job: CloudJob) -> str:
    """Install the package into `.venv`, within a time limit; bash.

    Where TRAINING_BIN names the bin/ directory of an environment, that one is used, with the
    uploaded sources before its own.
    """
    constraints = "package/constraints.txt" if job.package == "./package" else "constraints.txt"
    constrained = f"--constraint {constraints} " if job.package.startswith(".") else ""
    return f"""\
set -euo pipefail
# The bill began before this line, while the machine booted, and goes on after the last one until
# the machine is gone: {job.unseen_seconds} s that are counted as spent from the start.
[ -f .billed_since ] || echo $(( $(date +%s) - {job.unseen_seconds} )) > .billed_since
if [ -z "${{TRAINING_BIN:-}}" ]; then
  timeout --signal=TERM --kill-after=30 {SETUP_LIMIT_SECONDS} bash -euo pipefail <<'SETUP'
export PATH="$HOME/.local/bin:$PATH"
command -v uv > /dev/null || curl -LsSf {_UV_INSTALLER} | sh
[ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python {constrained}{shlex.quote(job.package)}
SETUP
fi
"""


def run_script(job: CloudJob) -> str:
    """Train, go on from what is kept, stop with the budget, keep what there is; bash.

    Exit codes are those of `accel-gpt2 train`, so 4 says that the budget is used up and what there
    is is saved.
    """
    run = shlex.quote(f"runs/{job.run_name}")
    settle = f"python -m accel_gpt2.classify.spending {run} --usd-per-hour {job.usd_per_hour:g}"
    restore = copy = stop_copying = keep_all = ""
    if job.kept is not None:
        kept = shlex.quote(job.kept)
        keep = "python -m accel_gpt2.cloud.keep"
        # Else the copying below would put an empty run in the place of a begun one.
        restore = f"{keep} {kept} {run} || exit 1\n"
        copy = f"{keep} {run} {kept} --every {_COPY_EVERY_SECONDS} &\ncopying=$!\n"
        keep_all = f"{keep} {run} {kept}\n  "
        stop_copying = f'kill -TERM "$copying"; wait "$copying"\n{keep} {run} {kept} || code=1\n'
    return f"""\
set +e -uo pipefail
export PATH="${{TRAINING_BIN:-$PWD/.venv/bin}}:$PATH"
[ -z "${{TRAINING_BIN:-}}" ] || export PYTHONPATH="$PWD/package${{PYTHONPATH:+:$PYTHONPATH}}"
export ACCEL_GPT2_BILLED_SINCE="$(cat .billed_since)"
{restore}\
spent=$({settle}) || exit 1  # seconds at today's price, on all machines
seconds_left=$(( {job.budget_seconds} - {job.grace_seconds} - spent ))  # {_money(job)}
if [ "$seconds_left" -le 0 ]; then
  echo 'The budget of ${job.budget_usd:.2f} was used up before the training could begin.' >&2
  {keep_all}exit 4
fi
end=$(( $(date +%s) + seconds_left + {job.grace_seconds} ))
timeout --signal=TERM --kill-after={job.grace_seconds} "$seconds_left" \\
  {job.train_command} &
training=$!
trap 'kill -TERM "$training"' TERM INT
{copy}\
# Not `wait` alone: where a GPU hangs, no signal ends what uses it, and the bill would go on.
while kill -0 "$training" 2> /dev/null && [ "$(date +%s)" -lt $(( end + {job.grace_seconds} )) ]
do sleep 1; done
code=137
kill -0 "$training" 2> /dev/null || {{ wait "$training"; code=$?; }}
if [ "$code" -eq 124 ] || [ "$(date +%s)" -ge "$end" ]; then
  echo 'The time that ${job.budget_usd:.2f} pays for is over.' >&2
  code=4
fi
{settle} > /dev/null || code=1
{stop_copying}\
exit "$code"
"""


def _money(job: CloudJob) -> str:
    return f"${job.budget_usd:.2f} at ${job.usd_per_hour:g} an hour"


def sky_yaml(job: CloudJob, *, header: str = "") -> str:
    """The task that SkyPilot launches.

    Raises:
        KeyError: for a GPU that has no name there.
    """
    resources: dict[str, Any] = {
        "infra": job.cloud.provider,
        "accelerators": f"{job.cloud.gpus[job.gpu]}:{job.num_gpus}",
        # The dearest machine that may be taken. It has no effect beside an `instance_type`.
        "max_hourly_cost": math.ceil(job.usd_per_hour * 100) / 100,
        "use_spot": job.spot,
        # Not `stop`, which Lambda cannot; not waiting for a forgotten SSH session.
        "autostop": {"idle_minutes": job.kept_minutes, "down": True, "wait_for": "jobs"},
        "disk_size": 100,
    }
    if job.spot:
        resources["job_recovery"] = {
            "strategy": "FAILOVER",
            "max_restarts_on_errors": _RECOVERIES,
            "recover_on_exit_codes": [75],  # stopped by a signal, with the work saved
        }
    task: dict[str, Any] = {"name": job.name, "workdir": job.uploaded, "resources": resources}
    if job.bucket is not None:
        task["file_mounts"] = {
            _KEPT: {"name": job.bucket, "store": job.cloud.store, "mode": "MOUNT_CACHED"}
        }
    task |= {"setup": setup_script(job), "run": run_script(job)}
    return header + _yaml(task)


def hf_jobs_argv(job: CloudJob, *, dry_run: bool = False) -> tuple[str, ...]:
    """The `hf` command line that submits a job; the server ends it when the budget's time is over.

    The token is named, not given: `hf` reads its value where it is logged in.
    """
    assert job.bucket is not None, "a job's disk is gone when it ends"
    script = f"mkdir -p /work && cp -r /uploaded/. /work && cd /work\n{setup_script(job)}"
    return (
        "hf",
        "jobs",
        "run",
        *(["--dry-run"] if dry_run else ["--detach"]),
        f"--name={job.name}",
        f"--flavor={job.cloud.gpus[job.gpu]}",
        f"--timeout={job.left_seconds}s",
        "--secrets=HF_TOKEN",
        f"--volume={job.uploaded}:/uploaded",
        f"--volume=hf://buckets/{job.bucket}:{_KEPT}",
        "--",
        _HF_IMAGE,
        "bash",
        "-c",
        f"{script}{run_script(job)}",
    )


def _yaml(values: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Scripts as blocks, so that a person can read them."""

    def block(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
        style = "|" if "\n" in text else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, block)
    return yaml.dump(dict(values), Dumper=Dumper, sort_keys=False, width=1000)


# The training in the committed files; `accel-gpt2 cloud launch` renders any other.
_EXAMPLE = CloudJob(
    name="accel-gpt2-imdb-gpt2-large",
    cloud=CLOUDS["lambda"],
    gpu="a100-40",
    num_gpus=1,
    usd_per_hour=1.0,
    budget_usd=10.0,
    words=("--model=gpt2-large", "--dataset=imdb"),
    run_directory="runs/imdb-gpt2-large",
    uploaded=".",
    package=".",
)

_HEADER = """\
# Generated by `accel-gpt2 configs write` from accel_gpt2/catalog: engines.py and prices.csv.
# GPT-2 large on IMDB, on one {gpu} of {provider}, at ${price:g} an hour ({as_of}). From a checkout:
#     sky launch --cluster {name} {path}
# It ends by itself when ${budget:g} are spent. Nothing fetches the results, unlike
#     accel-gpt2 cloud launch --provider {provider} --gpu {gpu} --model gpt2-large \\
#       --dataset imdb --budget {budget:g}
"""


def sky_files() -> dict[str, str]:
    """`launch/<provider>-<gpu>.sky.yaml` for each machine with one GPU that SkyPilot rents.

    >>> "launch/lambda-a100-40.sky.yaml" in sky_files()
    True
    """
    files = {}
    for offer in shipped_prices().offers:
        cloud = CLOUDS.get(offer.provider)
        if cloud is None or cloud.engine != "skypilot" or not is_offered(cloud, offer):
            continue
        if offer.min_gpus > 1:
            continue
        assert offer.usd_per_gpu_hour is not None, "is_offered has looked"
        path = f"{LAUNCH_DIRECTORY}/{offer.provider}-{offer.gpu}.sky.yaml"
        job = replace(
            _EXAMPLE,
            cloud=cloud,
            gpu=offer.gpu,
            usd_per_hour=offer.usd_per_gpu_hour,
        )
        header = _HEADER.format(
            gpu=offer.gpu,
            provider=offer.provider,
            price=offer.usd_per_gpu_hour,
            as_of=offer.as_of,
            name=job.name,
            path=path,
            budget=job.budget_usd,
        )
        files[path] = sky_yaml(job, header=header)
    return dict(sorted(files.items()))


def is_offered(cloud: CloudSpec, offer: GpuPrice, *, spot: bool = False) -> bool:
    """Whether the engine rents what a price is for."""
    price = offer.spot_usd_per_gpu_hour if spot else offer.usd_per_gpu_hour
    known = offer.gpu in cloud.gpus and offer.tier == cloud.tier
    return known and offer.provider == cloud.provider and price is not None
