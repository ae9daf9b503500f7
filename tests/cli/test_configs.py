"""`configs`: the committed launch files are the catalog's rows, and can be had where none are."""

import re
from pathlib import Path

import pytest

from accel_gpt2.render.accelerate import config_files
from tests.cli.conftest import CommandLine

ROOT = Path(__file__).parents[2]


def test_the_committed_files_are_what_the_rows_say(accel_gpt2: CommandLine) -> None:
    """`configs check` finds nothing in the repository."""
    ended = accel_gpt2("configs", "check", "--directory", str(ROOT))
    assert (ended.returncode, ended.stdout) == (0, "")
    assert re.fullmatch(r"\d\d files are what the catalog's rows say\.\n", ended.stderr)


def test_writing_makes_checking_content(accel_gpt2: CommandLine, tmp_path: Path) -> None:
    """All files are written and named; a second time changes nothing."""
    for _ in range(2):
        ended = accel_gpt2("configs", "write", "--directory", str(tmp_path))
        assert ended.stdout.splitlines() == [str(tmp_path / name) for name in config_files()]
        assert "14 files written." in ended.stderr
        assert accel_gpt2("configs", "check", "--directory", str(tmp_path)).returncode == 0


def test_what_is_missing_changed_or_too_many_is_said(
    accel_gpt2: CommandLine, tmp_path: Path
) -> None:
    """One sentence each, both ways, and exit code 1."""
    accel_gpt2("configs", "write", "--directory", str(tmp_path))
    (tmp_path / "ds_configs" / "zero1.json").unlink()
    with (tmp_path / "accelerate_configs" / "ddp.yaml").open("a") as file:
        file.write("mixed_precision: fp16\n")
    (tmp_path / "accelerate_configs" / "old").mkdir()
    (tmp_path / "accelerate_configs" / "old" / "two_gpus.yaml").touch()
    ended = accel_gpt2("configs", "check", "--directory", str(tmp_path))
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        f"{tmp_path}/accelerate_configs/ddp.yaml is not what the catalog's row says.",
        f"{tmp_path}/ds_configs/zero1.json is missing.",
        f"{tmp_path}/accelerate_configs/old/two_gpus.yaml belongs to no row.",
        f"Write them again by `accel-gpt2 configs write --directory {tmp_path}`.",
    ]


def test_a_checkouts_tasks_are_checked_too(accel_gpt2: CommandLine, tmp_path: Path) -> None:
    """Where there is launch/: one that is changed or too many is said, scripts are not."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.py").touch()
    ended = accel_gpt2("configs", "write", "--directory", str(tmp_path))
    assert "25 files written." in ended.stderr
    assert accel_gpt2("configs", "check", "--directory", str(tmp_path)).returncode == 0
    (tmp_path / "launch" / "lambda-a100-40.sky.yaml").write_text("name: mine\n")
    (tmp_path / "launch" / "moon-a100-40.sky.yaml").touch()
    ended = accel_gpt2("configs", "check", "--directory", str(tmp_path))
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[:2] == [
        f"{tmp_path}/launch/lambda-a100-40.sky.yaml is not what the catalog's row says.",
        f"{tmp_path}/launch/moon-a100-40.sky.yaml belongs to no row.",
    ]


def test_copies_can_be_launched_with_from_where_they_were_asked_for(
    accel_gpt2: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The YAML files name the JSON files by the path that was typed."""
    monkeypatch.chdir(tmp_path)
    ended = accel_gpt2("configs", "copy", "mine/launch")
    assert ended.returncode == 0
    assert (
        "accelerate launch --config_file=mine/launch/accelerate_configs/ddp.yaml " in ended.stderr
    )
    text = (tmp_path / "mine/launch/accelerate_configs/zero2.yaml").read_text("utf-8")
    assert "deepspeed_config_file: mine/launch/ds_configs/zero2.json\n" in text
    assert (tmp_path / "mine/launch/ds_configs/zero2.json").is_file()
    assert accel_gpt2("configs", "check", "--directory", "mine/launch").returncode == 0
    accel_gpt2("configs", "copy", ".")
    assert accel_gpt2("configs", "check").returncode == 0
