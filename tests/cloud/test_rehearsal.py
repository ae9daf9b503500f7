"""A rented training rehearsed on this machine: the budget ends it, and a second launch ends it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from accel_gpt2.classify.spending import read_ledger, spent_usd
from accel_gpt2.train.manifest import verify
from tests.conftest import write_texts

USD_PER_HOUR = 36.0  # a cent a second
SECRETS = {"LAMBDA_API_KEY": "planted-lambda", "HF_TOKEN": "hf_planted", "AWS_SECRET_KEY": "aws"}

# Long enough not to end before the budget does, short enough to be waited for.
TRAINING = (
    "--dataset=texts.csv",
    "--model=gpt2-tiny",
    "--init=scratch",
    "--epochs=100",
    "--global-batch-tokens=256",
    "--set=tokenizer=train",
    "--set=tokenizer_vocab_size=400",
    "--max-length=64",
)


@dataclass(frozen=True)
class Work:
    """An empty folder with texts, and a state folder of its own."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "texts.csv-gpt2-tiny"

    def launch(self, budget_usd: float) -> "subprocess.CompletedProcess[str]":
        """`accel-gpt2 cloud launch --provider local`, expected to be cheap."""
        argv = (
            "cloud",
            "launch",
            "--provider=local",
            f"--usd-per-hour={USD_PER_HOUR}",
            "--hours=0.0003",
            f"--budget={budget_usd}",
            "--bucket=kept",
            "--yes",
            *TRAINING,
        )
        return subprocess.run(
            [sys.executable, "-c", "from accel_gpt2.cli.app import main; main()", *argv],
            cwd=self.folder,
            env={
                **os.environ,
                **SECRETS,
                "XDG_STATE_HOME": str(self.folder / "state"),
                "ACCEL_GPT2_CACHE": str(self.folder / "cache"),
                "HF_HUB_OFFLINE": "1",
            },
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """With 40 documents of two classes."""
    write_texts(tmp_path / "texts.csv", documents_per_class=20, num_classes=2)
    return Work(tmp_path)


def _checkpoints(run: Path) -> list[Path]:
    return sorted(path for path in run.glob("class-*/checkpoint-*") if path.name != "checkpoint-0")


def _resumed_at(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["event"] == "resume"]


def _stopped_by_budget(work: Work) -> float:
    """Launch with ever more money until a training is there to stop by itself; what it was."""
    for budget_usd in (0.22, 0.44, 0.88, 1.76):
        ended = work.launch(budget_usd)
        assert ended.returncode == 4, ended.stderr
        # With little time, `timeout` may come between: the trainer asks after each step.
        if _checkpoints(work.run) and "95% of the budget of $" in ended.stderr:
            assert re.search(r"Stopped by the budget, saved: about \$\d\.\d\d of \$", ended.stderr)
            return budget_usd
        for folder in ("runs", "kept"):
            shutil.rmtree(work.folder / folder, ignore_errors=True)
    raise AssertionError("a machine on which nothing trains in three minutes")


@pytest.mark.slow
def test_a_budget_ends_a_training_and_a_second_launch_ends_it(
    work: Work, request: pytest.FixtureRequest
) -> None:
    """Exit code 4 in mid-training, a whole checkpoint, a ledger; then more money goes on from the
    bucket, on a fresh machine, and ends within what is left. Nothing has a secret in it."""
    if not request.config.getoption("--torture", default=False):
        pytest.skip(
            "money must end a training of seconds on an unshared machine; --torture runs it"
        )
    budget_usd = _stopped_by_budget(work)
    checkpoints = _checkpoints(work.run)
    for checkpoint in checkpoints:
        verify(checkpoint)
    (first,) = read_ledger(work.run)
    assert first.billed_since is not None
    assert first.price_usd_per_hour == USD_PER_HOUR
    # All of it is counted: also what came before the trainer's own first second.
    assert 0.9 * budget_usd <= spent_usd(work.run) <= 1.3 * budget_usd
    assert len(list(work.run.glob("class-*/final"))) < 2
    newest = max(work.run.glob("class-*/checkpoint-*"), key=lambda path: path.stat().st_mtime)

    again = work.launch(budget_usd)
    assert again.returncode == 3
    assert f"which exceeds --budget {budget_usd:g}" in again.stderr

    shutil.rmtree(work.run)  # what is here may be lost
    assert len(_checkpoints(work.folder / "kept" / work.run.name)) == len(checkpoints)
    second_budget_usd = budget_usd + 4.0
    ended = work.launch(second_budget_usd)
    assert ended.returncode == 0, ended.stderr
    assert f"goes on from runs/{work.run.name}/{newest.parent.name}/{newest.name}" in ended.stderr
    assert "Trained: about $" in ended.stderr
    assert _resumed_at(work.run) == [int(newest.name.removeprefix("checkpoint-"))]
    assert len(list(work.run.glob("class-*/final"))) == 2
    earlier, later = read_ledger(work.run)
    assert earlier == first
    assert later.billed_since != first.billed_since
    assert first.seconds / 100 < spent_usd(work.run) < second_budget_usd

    launches = list((work.folder / "state").glob("accel-gpt2/cloud/*"))
    assert not [path for path in launches if (path / "machine").exists()]
    files = [path for path in work.folder.rglob("*") if path.is_file()]
    assert len(files) >= 30
    for path in files:
        content = path.read_bytes()
        for secret in SECRETS.values():
            assert len(secret) < 4 or secret.encode() not in content, path
