"""One training on one rented machine: what the budget pays for, and the scripts that it runs.

The scripts are one text for every engine. Their working directory holds what was uploaded; the run
directory is below it, on the machine's own disk, and is copied to the bucket where there is one.
"""

import shlex
from dataclasses import dataclass

from accel_gpt2.catalog.engines import (
    SPOT_CONTROLLER_IDLE_SECONDS,
    SPOT_CONTROLLER_USD_PER_HOUR,
    CloudSpec,
)

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
_LAST_COPY_SECONDS = 60  # for what a rehearsal copies at its end

KEPT = "/kept"  # where the bucket is mounted
ENDING = "cloud.json"  # in the run directory: which launch ended last, and its exit code
_UV_INSTALLER = "https://astral.sh/uv/install.sh"


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudJob:
    """One training on one rented machine.

    `words` are typed after `accel-gpt2 train`, without directory and budget. `run_directory` is
    where the results are to be here, `uploaded` the directory that goes to the machine. `package`
    is what the machine installs: `./package` or `.` where the sources are uploaded, or anything
    else that pip takes. `usd_per_hour` is of the whole machine, for spot with the one that brings
    it back; `budget_usd` is for all attempts, of which earlier ones had `spent_usd`, as far as it
    is known here.
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
    def machine_usd_per_hour(self) -> float:
        """Of the machine that trains alone."""
        watching = SPOT_CONTROLLER_USD_PER_HOUR if self.spot else 0.0
        return round(self.usd_per_hour - watching, 6)

    @property
    def unseen_seconds(self) -> int:
        """What is billed before the first script begins and after the last one ends."""
        unseen = self.cloud.boot_seconds + 60 * self.kept_minutes
        if self.spot:
            share = SPOT_CONTROLLER_USD_PER_HOUR / self.usd_per_hour
            unseen += round(SPOT_CONTROLLER_IDLE_SECONDS * share)
        return unseen

    @property
    def alive_seconds(self) -> int:
        """How long after its first script began a machine ends itself, whatever else happens.

        That is when the budget is used up, idle minutes included, which the scripts keep free. This
        machine costs nothing when they are done, so it has time for their last copy.
        """
        if self.cloud.engine == "local":
            return self.left_seconds + 2 * self.grace_seconds + _LAST_COPY_SECONDS
        return max(_LAST_COPY_SECONDS, self.left_seconds - self.cloud.boot_seconds)

    @property
    def kept(self) -> str | None:
        """Where the run directory is copied to on the machine: a mounted bucket, or None."""
        if self.bucket is None:
            return None
        root = self.bucket if self.cloud.engine == "local" else KEPT
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

    >>> from accel_gpt2.catalog.engines import CLOUDS
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
{_watchdog(job)}\
# The bill began before this line, while the machine booted, and goes on after the last one until
# the machine is gone: {job.unseen_seconds} s that are counted as spent from the start.
[ -f .billed_since ] || echo $(( $(date +%s) - {job.unseen_seconds} )) > .billed_since
mkdir -p {shlex.quote(f"runs/{job.run_name}")}
if [ -z "${{TRAINING_BIN:-}}" ]; then
  timeout --signal=TERM --kill-after=30 {SETUP_LIMIT_SECONDS} bash -euo pipefail <<'SETUP'
export PATH="$HOME/.local/bin:$PATH"
command -v uv > /dev/null || curl -LsSf {_UV_INSTALLER} | sh
[ -x .venv/bin/python ] || uv venv --quiet --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python {constrained}{shlex.quote(job.package)}
SETUP
fi
"""


# Kills everything that was started in the directory $1, at the time that .ends_at says. It waits
# elsewhere, and ends when the directory is gone.
_WATCH = """\
cd /
while [ -d "$1" ] && [ "$(date +%s)" -lt "$(cat "$1/.ends_at")" ]; do sleep 2; done
[ -d "$1" ] || exit 0
for process in /proc/[0-9]*; do
  case "$(readlink "$process/cwd")/" in "$1"/*) kill -KILL "${process#/proc/}" ;; esac
done
"""

# SkyPilot's own daemon ends the machine by the provider's API, as it does with idle ones; where it
# is dead, a machine that is switched off is at least not billed as a running one at AWS and Google.
SKY_DOWN = """\
from sky.skylet import autostop_lib as lib
lib.set_autostop(0, "cloudvmray", lib.AutostopWaitFor.NONE, True)
"""
_END_SKY_MACHINE = f"""\
sleep 120  # who waits for the training has seen it end, and takes the machine down
"$(cat ~/.sky/python_path || command -v python3)" -c '{SKY_DOWN}'
sleep 600
sudo shutdown -h now
"""


def _watchdog(job: CloudJob) -> str:
    """What ends the machine when nothing else of ours does, before anything else; bash.

    The server ends a Hugging Face job by itself. Detached from what starts it, because SkyPilot
    ends what a set-up leaves behind.
    """
    if job.cloud.engine == "hf-jobs":
        return ""
    ending = _END_SKY_MACHINE if job.cloud.engine == "skypilot" else ""
    return f"""\
# Whatever becomes of everything below, the machine ends itself when the budget is used up.
[ -f .ends_at ] || echo $(( $(date +%s) + {job.alive_seconds} )) > .ends_at
cat > .watchdog <<'WATCHDOG'
{_WATCH}{ending}\
WATCHDOG
setsid --fork bash .watchdog "$(pwd -P)" < /dev/null > .watchdog.log 2>&1
"""


def run_script(job: CloudJob) -> str:
    """Train, go on from what is kept, stop with the budget, keep what there is; bash.

    Exit codes are those of `accel-gpt2 train`, so 4 says that the budget is used up and what there
    is is saved.
    """
    run = shlex.quote(f"runs/{job.run_name}")
    ending = shlex.quote(f"runs/{job.run_name}/{ENDING}")
    end = f"""printf '{{"launch": "%s", "exit_code": %d}}\\n' {shlex.quote(job.name)}"""
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
export ACCEL_GPT2_BILLED_SINCE="$(cat .billed_since)" ACCEL_GPT2_LAUNCH={shlex.quote(job.name)}
{restore}\
spent=$({settle}) || exit 1  # seconds at today's price, on all machines
seconds_left=$(( {job.budget_seconds} - {job.grace_seconds} - spent ))  # {_money(job)}
if [ "$seconds_left" -le 0 ]; then
  echo 'The budget of ${job.budget_usd:.2f} was used up before the training could begin.' >&2
  {end} 4 > {ending}
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
{end} "$code" > {ending}
{stop_copying}\
exit "$code"
"""


def _money(job: CloudJob) -> str:
    return f"${job.budget_usd:.2f} at ${job.usd_per_hour:g} an hour"
