"""What a rented machine is told: the committed files, and the limits in every layer of them."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from accel_gpt2.catalog.engines import CLOUDS
from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.catalog.providers import PROVIDERS
from accel_gpt2.render.cloud import hf_jobs_argv, sky_files, sky_yaml
from accel_gpt2.render.cloud_job import CloudJob, run_script, setup_script

JOB = CloudJob(
    name="accel-gpt2-imdb-1a2b",
    cloud=CLOUDS["lambda"],
    gpu="a100-40",
    num_gpus=1,
    usd_per_hour=1.99,
    budget_usd=10.0,
    words=("--model", "gpt2-large", "--set", "class_names=no,it's"),
    run_directory="/home/me/runs/my imdb",
    uploaded="/state/upload",
    package="./package",
)
SPOT = dataclasses.replace(JOB, cloud=CLOUDS["gcp"], bucket="my-runs", spot=True)
HF = dataclasses.replace(
    JOB, cloud=CLOUDS["hf-jobs"], gpu="a100-80", bucket="me/runs", usd_per_hour=2.5
)


def test_the_committed_tasks_are_what_the_catalog_says() -> None:
    """`accel-gpt2 configs write` would change none of them, and none is left over."""
    root = Path(__file__).parents[2]
    files = sky_files()
    assert len(files) >= 10
    assert {str(path.relative_to(root)) for path in root.glob("launch/*.sky.yaml")} == set(files)
    for name, text in files.items():
        assert (root / name).read_text(encoding="utf-8") == text, name


@pytest.mark.parametrize("name", sky_files())
def test_every_task_limits_time_and_money(name: str) -> None:
    """Down when idle, the machine's price capped, both scripts under `timeout`, TERM first."""
    task = yaml.safe_load(sky_files()[name])
    resources = task["resources"]
    assert resources["autostop"]["down"] is True
    assert 0 < resources["autostop"]["idle_minutes"] <= 15
    assert 0 < resources["max_hourly_cost"] <= 11
    assert "instance_type" not in resources  # SkyPilot 0.14.1 heeds no cap beside it
    assert resources["use_spot"] is False
    assert "file_mounts" not in task  # these files name nobody's bucket
    first, *_ = [x for x in task["setup"].splitlines()[1:] if x and not x.startswith("#")]
    seconds = int(10 / float(re.findall(r"price_usd_per_hour=([\d.]+)", task["run"])[0]) * 3600)
    assert first == f"[ -f .ends_at ] || echo $(( $(date +%s) + {seconds - 180} )) > .ends_at"
    assert task["setup"].index("setsid --fork bash .watchdog") < task["setup"].index("timeout")
    for script in (task["setup"], task["run"]):
        assert "timeout --signal=TERM --kill-after=" in script
    assert "--budget-usd=10" in task["run"]
    (price,) = re.findall(r"price_usd_per_hour=([\d.]+)", task["run"])
    assert float(price) <= resources["max_hourly_cost"] < float(price) + 0.01


def test_only_what_can_recover_is_spot_and_only_buckets_are_mounted() -> None:
    """A spot job goes on after a preemption and after exit code 75, from its bucket."""
    task = yaml.safe_load(sky_yaml(SPOT))
    assert task["resources"]["use_spot"] is True
    recovery = {"strategy": "FAILOVER", "recover_on_exit_codes": [75]}  # not when money is gone
    assert task["resources"]["job_recovery"] == recovery
    assert task["resources"]["max_hourly_cost"] == 1.79  # without the machine that brings it back
    assert task["file_mounts"] == {
        "/kept": {"name": "my-runs", "store": "gcs", "mode": "MOUNT_CACHED"}
    }
    assert task["resources"]["autostop"]["idle_minutes"] == 5
    assert yaml.safe_load(sky_yaml(JOB))["resources"]["autostop"]["idle_minutes"] == 15


@pytest.mark.parametrize("job", [JOB, SPOT, HF], ids=["plain", "spot", "hf-jobs"])
def test_the_scripts_are_bash(job: CloudJob) -> None:
    """Also with a name that has a space, and a value with a quote."""
    for script in (setup_script(job), run_script(job)):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)
    assert "'runs/my imdb'" in run_script(job)


def test_time_is_what_the_budget_pays_for() -> None:
    """From boot to the last idle minute; earlier attempts shorten it, and a share is kept back."""
    assert JOB.budget_seconds == int(10 / 1.99 * 3600) == 18090
    assert JOB.unseen_seconds == 180 + 15 * 60
    later = dataclasses.replace(JOB, spent_usd=4.0)
    assert later.left_seconds == int(6 / 1.99 * 3600)
    assert JOB.grace_seconds == 120
    assert dataclasses.replace(JOB, budget_usd=0.5).grace_seconds == 18  # 2% of 904 s


def test_a_machine_ends_itself_when_the_budget_does() -> None:
    """Its clock starts after booting; the server ends a job of Hugging Face's."""
    assert JOB.alive_seconds == 18090 - 180
    assert dataclasses.replace(JOB, spent_usd=9.99).alive_seconds == 60
    assert SPOT.unseen_seconds == 180 + 5 * 60 + round(600 * 0.20 / 1.99)
    assert ".watchdog" not in setup_script(HF)
    assert "shutdown" not in setup_script(dataclasses.replace(JOB, cloud=CLOUDS["local"]))


def test_the_server_of_hf_jobs_ends_a_job_too() -> None:
    """A flavor of the GPU's, the time that is left, the token by name only."""
    argv = hf_jobs_argv(dataclasses.replace(HF, spent_usd=5.0))
    assert {"--flavor=a100-large", "--timeout=7200s", "--secrets=HF_TOKEN"} <= set(argv)
    assert "--volume=hf://buckets/me/runs:/kept" in argv


def test_the_real_hf_takes_the_command_line() -> None:
    """`hf jobs run --dry-run` of huggingface_hub reads every option as it is meant."""
    hf = Path(sys.executable).parent / "hf"
    argv = hf_jobs_argv(HF, dry_run=True)
    ended = subprocess.run(
        [str(hf), *argv[1:]], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    said = " ".join(ended.stdout.split())
    for expected in (
        "image ghcr.io/astral-sh/uv",
        "command bash -c",
        "flavor a100-large",
        "timeout 14400s",
        "HF_TOKEN",
        "hf://buckets/me/runs:/kept",
        "/state/upload:/uploaded",
        "name=accel-gpt2-imdb-1a2b",
        "(dry run) Job not submitted.",
    ):
        assert expected in said, (expected, said)


def test_hf_knows_every_flavor() -> None:
    """The names are those of huggingface_hub."""
    from huggingface_hub import JobHardware

    flavors = CLOUDS["hf-jobs"].gpus
    assert len(flavors) >= 5
    assert set(flavors.values()) <= {flavor.value for flavor in JobHardware}


def test_rows_name_what_the_catalog_has() -> None:
    """Providers and GPUs of the engines' rows are rows themselves; this machine is neither."""
    for row in CLOUDS.values():
        assert row.provider in PROVIDERS or row.provider == "local"
        assert set(row.gpus) <= set(GPUS)
        assert row.store is None or row.has_buckets
