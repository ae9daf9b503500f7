"""What all tests share: a cache of their own, and a small data set whose classes really differ."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
from hypothesis import settings

# Tests run side by side and multiply small matrices: one thread each is the fastest. Read by torch
# when it is loaded, which no test has done yet.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background has Ctrl-C ignored in them and in all that they
# start; what these do with it is to be seen.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Words of three made-up languages: a tiny model tells them apart after a few steps.
_WORDS = {
    "river": ["water", "boat", "bank", "stream", "fish", "bridge", "flow", "deep"],
    "kitchen": ["oven", "bread", "salt", "spoon", "taste", "fry", "butter", "plate"],
    "orbit": ["moon", "rocket", "thrust", "planet", "probe", "gravity", "launch", "crater"],
}
_SHARED = ["the", "a", "and", "very", "slowly", "near", "old", "some", "they", "saw"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("torture", "breaking things for longer (`make torture`)")
    group.addoption(
        "--torture", action="store_true", help="the long form: hundreds of kills, many more inputs"
    )
    group.addoption(
        "--torture-report",
        type=Path,
        metavar="FILE.md",
        help="write what was done to this file, and to FILE.json",
    )
    group.addoption(
        "--torture-seed", type=int, default=0, metavar="N", help="draw other moments than seed 0"
    )


def pytest_configure(config: pytest.Config) -> None:
    # The same examples each time, so that a change is told from a draw; the long form draws anew.
    settings.register_profile("repeatable", derandomize=True)
    if not config.getoption("--torture", default=False):
        settings.load_profile("repeatable")


_STARTED = time.monotonic()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    path = config.getoption("--torture-report")
    if path is not None and not hasattr(config, "workerinput"):  # a worker has but its own tests
        from tests.breaking.torture_report import write_torture_report

        stats = terminalreporter.stats
        outcomes = [
            x for key in ("passed", "failed", "error", "skipped") for x in stats.get(key, [])
        ]
        write_torture_report(path, outcomes, time.monotonic() - _STARTED)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache, data or settings."""
    for name in ("ACCEL_GPT2_DATA", "ACCEL_GPT2_MODELS"):
        monkeypatch.delenv(name, raising=False)
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(cache))


def write_texts(
    path: Path, *, documents_per_class: int, num_classes: int = 3, seed: int = 0
) -> Path:
    """A CSV of made-up documents, 5 to 25 words each; labels are the names."""
    generator = random.Random(seed)
    rows = []
    for name in list(_WORDS)[:num_classes]:
        for _ in range(documents_per_class):
            words = [
                generator.choice(_WORDS[name] if generator.random() < 0.4 else _SHARED)
                for _ in range(generator.randint(5, 25))
            ]
            rows.append(f"{' '.join(words)},{name}")
    generator.shuffle(rows)
    path.write_text("text,label\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 documents, three classes."""
    return write_texts(tmp_path_factory.mktemp("texts") / "texts.csv", documents_per_class=30)
