"""What the real SkyPilot makes of every task; `make test-cloud` has it, other tests do not."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from accel_gpt2.catalog.engines import CLOUDS
from accel_gpt2.catalog.prices import shipped_prices
from accel_gpt2.cloud.skypilot import SKY_VERSION
from accel_gpt2.render.cloud import is_offered, sky_files, sky_yaml
from accel_gpt2.render.cloud_job import SKY_DOWN
from tests.render.test_cloud import JOB, SPOT

SKY_PYTHON = os.environ.get("SKY_PYTHON", "")

pytestmark = pytest.mark.skipif(not SKY_PYTHON, reason="needs SkyPilot: make test-cloud")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """What SkyPilot read in each task, by its file name; in a home of its own, offline."""
    folder = tmp_path_factory.mktemp("sky")
    offers = []
    for offer in shipped_prices().offers:
        cloud = CLOUDS.get(offer.provider)
        if cloud is not None and cloud.engine == "skypilot" and is_offered(cloud, offer):
            offers.append(
                {
                    "provider": offer.provider,
                    "gpu": cloud.gpus[offer.gpu],
                    "num_gpus": offer.min_gpus,
                    "usd_per_hour": (offer.usd_per_gpu_hour or 0) * offer.min_gpus,
                    "machine": offer.sku.replace(" ", "-"),
                }
            )
    (folder / "offers.json").write_text(json.dumps(offers))
    tasks = {Path(name).name: text for name, text in sky_files().items()}
    tasks |= {"job.sky.yaml": sky_yaml(JOB), "spot.sky.yaml": sky_yaml(SPOT)}
    for name, text in tasks.items():
        # The workdir has to be there; its place is no matter here.
        (folder / name).write_text(text.replace("workdir: /state/upload", "workdir: ."))
    script = Path(__file__).with_name("sky_facts.py")
    ended = subprocess.run(
        [SKY_PYTHON, str(script), "offers.json", *tasks],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = [x for x in ended.stdout.splitlines() if x.startswith("FACTS ")]
    found = json.loads(line.removeprefix("FACTS "))
    assert len(found) == len(tasks) >= 13
    return dict(zip(tasks, found, strict=True))


def test_it_reads_every_task_as_it_is_meant(facts: dict[str, dict[str, object]]) -> None:
    """The cloud, the GPU, one machine that is taken down, both scripts."""
    for name, fact in facts.items():
        assert fact["version"] == SKY_VERSION
        assert fact["down"] is True, name
        assert fact["wait_for"] == "jobs", name
        assert fact["has_scripts"], name
        provider, _, rest = name.removesuffix(".sky.yaml").partition("-")
        if provider in CLOUDS:
            assert fact["cloud"] == provider
            assert fact["gpus"] == {CLOUDS[provider].gpus[rest]: 1}
            assert fact["spot"] is False


def test_spot_jobs_recover_and_have_their_bucket(facts: dict[str, dict[str, object]]) -> None:
    """As managed jobs read it."""
    spot = facts["spot.sky.yaml"]
    assert spot["spot"] is True
    assert spot["recovery"] == {
        "strategy": "FAILOVER",
        "recover_on_exit_codes": [75],
    }
    assert spot["mounts"] == ["/kept"]
    assert facts["job.sky.yaml"]["mounts"] == []


def test_its_daemon_takes_a_machine_down_when_the_watchdog_says_so(tmp_path: Path) -> None:
    """At once, whatever job is running, by the daemon's own settings; it is no stop."""
    read = "config = lib.get_autostop_config(); print(config.autostop_idle_minutes, "
    read += "config.wait_for.value, config.down, config.backend == backend.NAME)"
    ended = subprocess.run(
        [
            SKY_PYTHON,
            "-c",
            f"{SKY_DOWN}\nfrom sky.backends import CloudVmRayBackend as backend\n{read}",
        ],
        env={**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.stdout.splitlines()[-1:] == ["0 none True True"], ended.stderr
