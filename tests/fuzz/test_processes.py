"""Processes of their own: that the tables' way of running is the real one, and what only a fresh
process can show, such as variables that are read when Python or a library starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import test_arguments, test_data_files, test_recipes, test_run_directories
from tests.fuzz.harness import (
    Case,
    Ended,
    check_refusal,
    make_workshop,
    run_command,
    train_argv,
)

REPOSITORY = Path(__file__).parents[2]
PROGRAMS = {
    "accel-gpt2": "from accel_gpt2.cli.app import main; main()",
    "launch/train.py": "from accel_gpt2.cli.train import launched_main; launched_main()",
    "launch/evaluate.py": "from accel_gpt2.cli.evaluate import launched_main; launched_main()",
}

TABLES = (
    *test_arguments.CASES,
    *test_arguments.ENVIRONMENT_CASES,
    *test_data_files.CASES,
    *test_recipes.CASES,
    *test_run_directories.CASES,
)
BY_ID = {case.id: case for case in TABLES}

# One of each kind; those that load torch take seconds each.
LIGHT = (
    "verb-trian",
    "verb-escape",
    "option--epoch",
    "set-bytes-as-value",
    "profile-rtx4070",
    "near-rate",
    "an-alias-bomb-yaml",
    "report-nowhere",
)
HEAVY = ("label-null-jsonl", "predict-final-model.safetensors-flip")


def test_all_tables_together_are_more_than_promised() -> None:
    """Over 900 malformed inputs made by hand, where 200 were asked for."""
    assert len(TABLES) >= 900
    assert sum(case.id in {*LIGHT, *HEAVY} for case in TABLES) == len(LIGHT) + len(HEAVY)


def start(case: Case, folder: Path, **variables: str | None) -> Ended:
    """The same command in a process of its own, as a person starts it."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ACCEL_GPT2_") or name == "ACCEL_GPT2_CACHE"
    }
    environment |= {"COLUMNS": "80", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    for name, value in {**case.environment, **variables}.items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    program, *words = case.argv
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAMS[program], *words],
        cwd=folder,
        env=environment,
        input=case.stdin,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return Ended(
        exit_code=ended.returncode,
        stdout=ended.stdout.decode("utf-8", "backslashreplace"),
        stderr=ended.stderr.decode("utf-8", "backslashreplace"),
        seconds=0.0,
    )


def without_usage(text: str) -> str:
    """What is said, without the name by which Python was started."""
    return re.sub(r"^(Usage: |Try ').*$", "", text, flags=re.MULTILINE).strip()


@pytest.mark.parametrize("id", [*LIGHT, *HEAVY])
def test_a_process_of_its_own_says_the_same(id: str, tmp_path: Path, run_template: Path) -> None:
    """Exit code, stdout and stderr are those of the run within the tests' process."""
    case = BY_ID[id]
    folder = tmp_path / "same-name"
    folder.mkdir()
    make_workshop(folder, case, run_template if case.run else None)
    here = run_command(case.argv, cwd=folder, environment=case.environment, stdin=case.stdin)
    there = start(case, folder)
    check_refusal(there, said=case.said, exit_codes=case.exit_codes)
    assert (there.exit_code, there.stdout) == (here.exit_code, here.stdout)
    assert without_usage(there.stderr) == without_usage(here.stderr)


PROFILES = Case(id="profiles", argv=("accel-gpt2", "profiles"), said="")


@pytest.mark.parametrize(
    "variables",
    [
        {"TERM": "dumb"},
        {"TERM": "\x1b[31m"},
        {"TERM": None},
        {"COLUMNS": "0"},
        {"COLUMNS": "abc"},
        {"COLUMNS": "-5"},
        {"COLUMNS": "99999999"},
        {"LINES": "x"},
        {"LANG": "C", "LC_ALL": "C"},
        {"LANG": "xx_YY.nothing", "LC_ALL": None},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONUTF8": "0", "LC_ALL": "POSIX"},
        {"HOME": None},
        {"HOME": "/proc/none"},
        {"HOME": ""},
        {"PATH": ""},
        {"TMPDIR": "/nowhere"},
        {"NO_COLOR": "1", "FORCE_COLOR": "x"},
        {"CUDA_VISIBLE_DEVICES": "abc,\x1b"},
        {"OMP_NUM_THREADS": "many"},
        {"ACCELERATE_USE_CPU": "perhaps"},
        {"HF_HUB_OFFLINE": "maybe"},
        {"HF_HOME": "/proc/none"},
        {"PYTHONWARNINGS": "nonsense::::"},
        {"XDG_CACHE_HOME": "\x07"},
    ],
    ids=lambda variables: "-".join(f"{k}={v!r}" for k, v in variables.items())[:50],
)
def test_strange_surroundings_are_no_reason_to_fail(
    variables: dict[str, str | None], tmp_path: Path
) -> None:
    """What talks only goes on talking under every terminal, locale and home."""
    ended = start(PROFILES, tmp_path, **variables)
    assert ended.exit_code == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "rtx4070ti" in ended.stdout


@pytest.mark.slow
def test_a_training_in_strange_surroundings(tmp_path: Path) -> None:
    """No home, a C locale, ASCII streams, garbage for threads and terminal, and a run directory, a
    data set and labels beyond ASCII: it trains, and its report says so."""
    folder = tmp_path / "größe 大"
    folder.mkdir()
    make_workshop(folder, Case(id="", argv=(), said=""), None)
    data = folder / "dätä"
    (folder / "good").rename(data)
    for path in data.iterdir():
        path.write_text(path.read_text("utf-8").replace("fruit", "früchte 🍎"), "utf-8")
    strange: dict[str, str | None] = {
        "HOME": "/proc/none",
        "LANG": "C",
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "TERM": "dumb",
        "COLUMNS": "abc",
        "OMP_NUM_THREADS": "many",
        "HF_HOME": "/proc/none/hf",
        "MASTER_PORT": "x",
    }
    train = Case(id="", argv=train_argv("dätä", output_dir="läufe"), said="")
    ended = start(train, folder, **strange)
    assert ended.exit_code == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    predict = Case(id="", argv=("accel-gpt2", "predict", "läufe", "ein Apfel 🍎"), said="")
    ended = start(predict, folder, **strange)
    assert ended.exit_code == 0, ended.stderr
    assert "fr\\xfcchte" in ended.stdout


def test_a_closed_stdout_is_no_crash(tmp_path: Path) -> None:
    """Nobody reads: no traceback, and an exit code."""
    for redirect in (">&-", ">/dev/full", "2>&-", ">&- 2>&-", "<&-"):
        ended = subprocess.run(
            f"{sys.executable} -c '{PROGRAMS['accel-gpt2']}' profiles {redirect}",
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode in (0, 1), (redirect, ended.stderr)
        assert "Traceback" not in ended.stderr, (redirect, ended.stderr)
