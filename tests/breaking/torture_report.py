"""What a long run of these tests did, as JSON for programs and Markdown for people.

Tests say what they have done by `record_property`: whole numbers are added up, except a seed; of
other numbers the largest counts.
"""

import json
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from accel_gpt2.versions import installed_versions


def write_torture_report(path: Path, reports: Sequence[pytest.TestReport], seconds: float) -> None:
    """Write `path` (Markdown) and the same with the suffix .json."""
    tests = [_row(report) for report in reports if report.user_properties or report.failed]
    others = Counter(
        (report.nodeid.split("[")[0], report.outcome)
        for report in reports
        if not (report.user_properties or report.failed)
    )
    tests += [
        {"test": name, "outcome": outcome, "cases": count}
        for (name, outcome), count in others.items()
    ]
    content = {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["pytest", *sys.argv[1:]]),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": installed_versions(),
        "seconds": round(seconds),
        "outcomes": dict(Counter(report.outcome for report in reports)),
        "totals": _totals(tests),
        "tests": tests,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    path.write_text(_markdown(content), encoding="utf-8")


def _row(report: pytest.TestReport) -> dict[str, object]:
    seconds = round(report.duration, 1)
    own = dict(report.user_properties)
    return {"test": report.nodeid, "outcome": report.outcome, "seconds": seconds, **own}


def _totals(tests: Sequence[dict[str, object]]) -> dict[str, float]:
    """Sums and maxima of what tests of any outcome have recorded.

    >>> _totals([{"kills": 2, "slowest": 0.5, "seed": 7}, {"kills": 3, "slowest": 0.25}])
    {'kills': 5, 'slowest': 0.5}
    """
    totals: dict[str, float] = {}
    for test in tests:
        for name, value in test.items():
            if isinstance(value, bool) or name in {"seed", "seconds"}:
                continue
            if isinstance(value, int):
                totals[name] = totals.get(name, 0) + value
            elif isinstance(value, float):
                totals[name] = max(totals.get(name, value), value)
    return totals


def _markdown(content: dict[str, object]) -> str:
    versions = content["versions"]
    tests = content["tests"]
    totals = content["totals"]
    outcomes = content["outcomes"]
    assert isinstance(versions, dict)
    assert isinstance(tests, list)
    assert isinstance(totals, dict)
    assert isinstance(outcomes, dict)
    packages = ("torch", "transformers", "accelerate", "peft", "safetensors")
    lines = [
        "# Torture: killed, signalled and fed nonsense, over and over",
        "",
        f"- Command: `{content['command']}` (`make torture`)",
        f"- Date: {content['date']}. Machine: {content['machine']}.",
        f"- Python {content['python']}, "
        + ", ".join(f"{name} {versions[name]}" for name in packages)
        + ".",
        f"- {content['seconds']:,} s; tests: "
        + ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
        + ".",
        "",
        "| in all | |",
        "|---|---|",
        *(f"| {_words(name)} | {value:,} |" for name, value in totals.items()),
        "",
        "| test | outcome | s | |",
        "|---|---|---|---|",
    ]
    for test in tests:
        own = [(k, v) for k, v in test.items() if k not in {"test", "outcome", "seconds"}]
        done = ", ".join(f"{_words(name)} {value}" for name, value in own)
        name = test["test"].split("/")[-1].replace("::", " ").replace("|", "\\|")
        lines.append(f"| {name} | {test['outcome']} | {test.get('seconds', '')} | {done} |")
    return "\n".join(lines) + "\n"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1] for line in text.splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.machine()
