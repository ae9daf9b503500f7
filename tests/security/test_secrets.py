"""Secrets of the environment are in nothing that is written or said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.harness import Case, make_workshop, run_command, train_argv

SECRET = "hunter2-cafebabe"  # planted, with a number behind it, wherever secrets stand
VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "LAMBDA_API_KEY",
    "LAMBDA_CLOUD_API_KEY",
    "RUNPOD_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "OPENAI_API_KEY",
    "MY_PASSWORD",
    "ACCEL_GPT2_API_KEY",
    "ACCELERATE_TOKEN",
    "CUDA_SECRET",
    "MASTER_PASSWORD",
    "HF_CREDENTIALS",
    "hf_token_lower",
    "NCCL_AUTH",
)
ADDRESSES = ("HF_ENDPOINT", "HTTPS_PROXY", "ALL_PROXY", "ACCELERATE_URL", "HF_MIRROR")


@pytest.fixture
def secrets() -> dict[str, str]:
    """A value of its own for every variable, and addresses with a user and a password."""
    found = {name: f"{SECRET}-{number}" for number, name in enumerate(VARIABLES)}
    found |= {
        name: f"http://user:{SECRET}-url-{number}@127.0.0.1:9/x"
        for number, name in enumerate(ADDRESSES)
    }
    return found


def check_free_of_secrets(folder: Path, *said: str) -> int:
    """Look into every file and every word; returns the number of files."""
    for text in said:
        assert SECRET not in text
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
        assert SECRET not in path.name
    return len(files)


TRACKED = tuple(
    "--set=trackers=tensorboard" if word == "--set=trackers=" else word
    for word in train_argv("good", output_dir="run")
)


def test_no_secret_is_written_or_said(
    tmp_path: Path, secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, evaluating, predicting, reporting, the doctor and failures of each kind: planted
    values are in no file of the run and the cache, and in no output, with --debug too."""
    work = tmp_path / "work"
    work.mkdir()
    make_workshop(work, Case(id="", argv=(), said=""), None)
    environment = {**secrets, "ACCEL_GPT2_CACHE": str(tmp_path / "cache")}
    commands = {
        TRACKED: 0,
        ("accel-gpt2", "evaluate", "run"): 0,
        ("accel-gpt2", "evaluate", "run", "--json"): 0,
        ("accel-gpt2", "predict", "run", "a pear", "--json"): 0,
        ("accel-gpt2", "report", "run"): 0,
        ("accel-gpt2", "doctor"): 0,
        ("accel-gpt2", "doctor", "--json"): 0,
        ("accel-gpt2", "profiles", "--json"): 0,
        ("accel-gpt2", "train", "--dry-run"): 0,
        ("accel-gpt2", "train", "--debug", "--dataset=imbd", "--output-dir=failed"): 1,
        train_argv("imbd", "--debug", output_dir="failed"): 1,
        train_argv("someone/private", output_dir="failed"): 1,
        tuple(word.replace("=tensorboard", "=nothing") for word in (*TRACKED, "--debug")): 2,
        ("accel-gpt2", "train", "--debug", "--set=nothing=1"): 2,
        ("accel-gpt2", "evaluate", "run", "--debug", "--dataset=./nothing"): 1,
    }
    for argv, code in commands.items():
        ended = run_command(argv, cwd=work, environment=environment)
        assert ended.exit_code == code, (argv, ended.stderr)
        check_free_of_secrets(tmp_path, ended.stdout, ended.stderr)
    assert check_free_of_secrets(tmp_path) >= 50
    assert list((work / "run" / "trackers").rglob("events*"))


def test_the_launched_training_keeps_them_to_itself(
    tmp_path: Path, secrets: dict[str, str]
) -> None:
    """The same through `accel-gpt2 train` and accelerate, in processes of their own."""
    work = tmp_path / "work"
    work.mkdir()
    make_workshop(work, Case(id="", argv=(), said=""), None)
    argv = [word for word in TRACKED if word != "launch/train.py"]
    ended = subprocess.run(
        [sys.executable, "-c", "from accel_gpt2.cli.app import main; main()", "train", *argv],
        cwd=work,
        env={
            **os.environ,
            **secrets,
            "ACCEL_GPT2_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert check_free_of_secrets(tmp_path, ended.stdout, ended.stderr) >= 30
    assert (work / "run" / "command.txt").is_file()


def test_the_doctor_says_that_they_are_set(tmp_path: Path, secrets: dict[str, str]) -> None:
    """A person sees which variables are set, and where the hub is, without the password."""
    ended = run_command(("accel-gpt2", "doctor"), cwd=tmp_path, environment=secrets)
    assert "HF_TOKEN" in ended.stdout
    assert "http://***@127.0.0.1:9/x" in ended.stdout
