"""Where a benchmark writes what it finds: stdout and a page for docs/benchmarks/, as it goes."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path


def say(text: str) -> None:
    """A line for who waits."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class Page:
    """A Markdown page that is whole after every line."""

    def __init__(self, folder: Path, name: str, title: str, *, packages: tuple[str, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        today = datetime.date.today().isoformat()
        self.path = folder / f"{today}-{name}.md"
        self._text = ""
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
        program, *options = sys.argv
        self.add(
            f"# {title}\n\n`{shlex.join(['python', f'benchmarks/{Path(program).name}', *options])}`"
            f", {today}, at {_commit()}.\n\nPython {platform.python_version()}, {versions}; "
            f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start.\n"
        )

    def add(self, text: str) -> None:
        """A line, or several."""
        self._text += f"{text}\n"
        say(text)
        self.path.write_text(self._text, encoding="utf-8")

    def bar(self, claim: str, value: float, bar: float, *, at_most: bool = False) -> None:
        """Whether a number is as good as it was to be."""
        met = value <= bar if at_most else value >= bar
        word = "at most" if at_most else "at least"
        self.add(
            f"- {claim}: {value:.2f}, {word} {bar:g} was wanted: **{'met' if met else 'not met'}**."
        )


def _commit() -> str:
    here = Path(__file__).parent
    ask = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(ask, check=False, capture_output=True, text=True)
    except OSError:  # a lent machine may have no git
        return "no commit"
    return found.stdout.strip() or "no commit"


def processor() -> str:
    """The name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
