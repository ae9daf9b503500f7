"""The command line as a whole: light, quiet where it should be, and in sentences."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from accel_gpt2 import __version__
from accel_gpt2.catalog.profiles import PROFILES
from accel_gpt2.cli.docs import cli_markdown
from accel_gpt2.cli.doctor import examine
from tests.cli.conftest import CommandLine

REPOSITORY = Path(__file__).parents[2]
VERBS = (
    "demo",
    "profiles",
    "plan",
    "bench",
    "train",
    "evaluate",
    "predict",
    "report",
    "compare",
    "export",
    "doctor",
    "cost",
    "cloud",
    "configs",
)
HEAVY = ("torch", "transformers", "accelerate", "datasets", "numpy", "sklearn", "matplotlib")

LOADED = f"""
import sys
from accel_gpt2.cli.app import main
try:
    main()
finally:
    loaded = sorted({set(HEAVY)} & set(sys.modules))
    print("loaded", *loaded, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["predict", "--help"],
        ["profiles"],
        ["profiles", "--json"],
        ["plan", "--profile", "rtx4070ti"],
        ["plan", "--json", "--all"],
        ["train", "--dry-run"],
        ["train", "--dry-run", "--profile", "a100-40", "--set", "lora_rank=8"],
        ["train", "--epochs", "-1"],
    ],
)
def test_what_only_talks_loads_nothing_heavy(tmp_path: Path, arguments: list[str]) -> None:
    """Help, profiles and dry runs answer without torch and its company."""
    ended = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stderr.splitlines()[-1] == "loaded"


PLANNED = """
import sys
from accel_gpt2.cli.app import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "absent", "at_most"),
    [
        (["--version"], {"typer", "rich", "accel_gpt2.recipe"}, 12),
        (["plan", "--profile", "rtx4070ti", "--json"], {"rich", "accel_gpt2.plan.table"}, 60),
        (["plan", "--profile", "rtx4070ti"], {"jinja2", "accel_gpt2.plan.table"}, 60),
    ],
)
def test_a_verb_loads_itself_alone(
    tmp_path: Path, arguments: list[str], absent: set[str], at_most: int
) -> None:
    """No other verb's modules, nor what only training, clouds or costs need; and few of our own."""
    ended = subprocess.run(
        [sys.executable, "-c", PLANNED, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(ended.stderr.splitlines()[-1].split())
    assert not loaded & absent
    others = {f"accel_gpt2.cli.{verb}" for verb in VERBS} - {f"accel_gpt2.cli.{arguments[0]}"}
    heavy = {"accel_gpt2.cli.launcher", "accel_gpt2.classify.lock", "accel_gpt2.plan.cost", *HEAVY}
    assert not loaded & (others | heavy)
    assert sum(name.startswith("accel_gpt2") for name in loaded) <= at_most


def test_help_is_there_before_one_waits(tmp_path: Path) -> None:
    """`--help` in under half a second of processor time, in the best of three."""

    def seconds() -> float:
        before = os.times()
        subprocess.run(
            [sys.executable, "-c", "from accel_gpt2.cli.app import main; main()", "--help"],
            stdout=subprocess.DEVNULL,
            check=True,
            cwd=tmp_path,
        )
        after = os.times()
        return (after.children_user + after.children_system) - (
            before.children_user + before.children_system
        )

    start = time.monotonic()
    assert min(seconds() for _ in range(3)) < 0.5
    assert time.monotonic() > start


def test_help_names_every_verb_in_full(accel_gpt2: CommandLine) -> None:
    """No verb's summary is cut off at 80 columns; without a verb the help is a usage error."""
    ended = accel_gpt2("--help")
    assert ended.returncode == 0
    listed = [
        line.split()[0] for line in ended.stdout.split("Commands:")[1].splitlines() if line.strip()
    ]
    assert tuple(listed) == VERBS
    assert "..." not in ended.stdout.split("Commands:")[1]
    assert (accel_gpt2().returncode, accel_gpt2().stderr) == (2, ended.stdout)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_takes_debug(accel_gpt2: CommandLine, verb: str) -> None:
    """--debug is an option of every verb."""
    assert "--debug" in accel_gpt2(verb, "--help").stdout


def test_version(accel_gpt2: CommandLine) -> None:
    """--version prints one line to stdout."""
    assert accel_gpt2("--version").stdout == f"accel-gpt2 {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["profilez"], "No such command 'profilez'. Did you mean 'profiles'?"),
        (["train", "--optimiser", "x"], "No such option: --optimiser"),
        (["train", "--optimizer", "sgd"], "Invalid value for '--optimizer'"),
        (["train", "--epochs", "many"], "Invalid value for '--epochs'"),
        (
            ["train", "--epochs", "-1"],
            "epochs = -1.0 (from --epochs): it should be greater than 0.",
        ),
        (["train", "--set", "dropuot=1"], "'dropuot' is not a recipe key. Did you mean 'dropout'?"),
        (["train", "--profile", "rtx"], "There is no profile 'rtx'."),
        (["train", "--recipe", "none.yaml"], "The recipe none.yaml does not exist."),
        (["train", "--max-time", "soon"], "'soon' is not a duration"),
        (["evaluate"], "Missing argument 'RUN'"),
        (["evaluate", "runs/none"], "runs/none does not exist (no recipe.yaml in it)."),
        (["report", "."], ". is not a run directory (no recipe.yaml in it)."),
        (["predict", "runs/none", "a text"], "runs/none does not exist"),
    ],
)
def test_a_wrong_command_is_a_sentence_and_exit_code_2(
    accel_gpt2: CommandLine, arguments: list[str], said: str
) -> None:
    """Usage errors go to stderr, without a traceback, and stdout stays empty."""
    ended = accel_gpt2(*arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize("arguments", [["--debug", "train"], ["train", "--debug"]])
def test_debug_adds_the_traceback(accel_gpt2: CommandLine, arguments: list[str]) -> None:
    """Before or after the verb, --debug shows where a failure comes from."""
    ended = accel_gpt2(*arguments, "--profile", "rtx")
    assert ended.returncode == 2
    assert "There is no profile 'rtx'." in ended.stderr
    assert "Traceback (most recent call last)" in ended.stderr


def test_an_unexpected_failure_is_one_sentence(accel_gpt2: CommandLine, tmp_path: Path) -> None:
    """A bug shows its type and message and how to see more; the exit code is 1."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("{}", "utf-8")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "report.html").mkdir()  # where a file has to be written
    ended = accel_gpt2("report", "run")
    assert ended.returncode == 1
    assert len(ended.stderr.strip().splitlines()) == 1
    assert ended.stderr.strip().endswith("Run again with --debug for the traceback.")


def test_profiles_json_is_one_document(accel_gpt2: CommandLine) -> None:
    """Every profile with its GPU's figures, and what this machine is; stderr stays empty."""
    ended = accel_gpt2("profiles", "--json")
    document = json.loads(ended.stdout)
    assert [profile["name"] for profile in document["profiles"]] == list(PROFILES)
    super_ = document["profiles"][0]
    assert super_["gpu"]["peak_flops"]["bf16"] == 88.2e12
    assert super_["recipe_defaults"] == {"mixed_precision": "bf16"}
    assert document["auto"]["name"]
    assert ended.stderr == ""


@pytest.mark.parametrize("columns", ["80", "160"])
def test_the_profiles_table_reads_well(accel_gpt2: CommandLine, columns: str) -> None:
    """One line a profile at 80 and at 160 columns, no colour codes where nobody looks."""
    ended = accel_gpt2("profiles", COLUMNS=columns)
    lines = [line.rstrip() for line in ended.stdout.splitlines() if line.strip()]
    assert len(lines) == 2 + len(PROFILES)
    assert max(map(len, lines)) <= int(columns)
    assert "\x1b" not in ended.stdout + ended.stderr


def test_a_reader_that_goes_away_is_no_complaint(tmp_path: Path) -> None:
    """`| head` ends a listing without a word about pipes."""
    program = f"{sys.executable} -c 'from accel_gpt2.cli.app import main; main()' doctor --help"
    ended = subprocess.run(
        f"{program} | true; {program} | head -1",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr == ""


def test_doctor_never_prints_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens and keys only that they are set; of the rest the value."""
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("ACCEL_GPT2_API_KEY", "verysecret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    findings = examine()
    assert findings["environment"]["HF_TOKEN"] == "set"
    assert findings["environment"]["OMP_NUM_THREADS"] == "2"
    assert "verysecret" not in json.dumps(findings)


def test_doctor_json_says_what_is_here(accel_gpt2: CommandLine) -> None:
    """Versions, hardware, disk, hub and problems in one document; an offline hub is a problem that
    says what works without it."""
    ended = accel_gpt2("doctor", "--json", HF_HUB_OFFLINE="1")
    document = json.loads(ended.stdout)
    assert ended.returncode == 0
    assert document["packages"]["torch"]
    assert document["disk"]["free_bytes"] > 0
    assert document["hub"] == {
        "endpoint": "https://huggingface.co",
        "answers": False,
        "reason": "HF_HUB_OFFLINE is set",
    }
    assert any("--dataset docstrings" in problem for problem in document["problems"])


def test_the_generated_page_is_current() -> None:
    """docs/cli.md is what --help says; if not: python -m accel_gpt2.cli.docs > docs/cli.md"""
    page = (REPOSITORY / "docs" / "cli.md").read_text("utf-8")
    assert page == cli_markdown()
    assert all(f"## accel-gpt2 {verb}" in page for verb in VERBS)
