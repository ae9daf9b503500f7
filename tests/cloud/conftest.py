"""A home without keys and without launches, and programs on PATH that only write down what they
are asked."""

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

KEY = "secret_lambda_0123456789.abcdef"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads the person's keys, prices or launches, or writes any."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(home / "cache"))
    for name in ("LAMBDA_API_KEY", "HF_TOKEN", "HF_HOME", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    return home


_STUB = """\
#!{python}
import json, os, sys, time
from pathlib import Path
here = Path({folder!r})
name = Path(sys.argv[0]).name
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
for words, answer in json.loads((here / "answers.json").read_text()):
    if words == [name, *sys.argv[1:]][: len(words)]:
        print(answer.get("says", ""))
        if "does" in answer:
            exec(answer["does"])
        time.sleep(answer.get("seconds", 0))
        sys.exit(answer.get("code", 0))
sys.exit(0)
"""


class Programs:
    """Stand-ins for the programs that are called, on PATH: what they were asked, and answer.

    `answers` maps the first words of a command line to its exit code (`code`), what it prints
    (`says`), how long it takes (`seconds`), and Python that it runs (`does`).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.answer({})

    def answer(self, answers: dict[tuple[str, ...], dict[str, object]]) -> None:
        """What to answer from now on."""
        both = [*answers.items(), (("sky", "--version"), {"says": "skypilot, version 0.14.1"})]
        longest_first = sorted(both, key=lambda pair: -len(pair[0]))
        (self._folder / "answers.json").write_text(json.dumps(longest_first))

    @property
    def calls(self) -> list[list[str]]:
        """The command lines so far."""
        path = self._folder / "calls.jsonl"
        return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """`sky`, `hf` and what copies, which only write down what they are asked."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("sky", "rsync", "hf", "aws", "gcloud", "azcopy"):
        path = folder / name
        path.write_text(_STUB.format(python=sys.executable, folder=str(folder)))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Programs(folder)


CommandLine = Callable[..., "tuple[int, str, str]"]


@pytest.fixture
def accel_gpt2(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> CommandLine:
    """Runs `accel-gpt2 ARGUMENTS` in an empty folder: the exit code, stdout and stderr."""
    from accel_gpt2.cli.app import main

    work = tmp_path / "work"
    work.mkdir()

    def run_to_exit(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(work)
        monkeypatch.setattr("sys.argv", ["accel-gpt2", *arguments])
        monkeypatch.setenv("COLUMNS", "120")
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run_to_exit
