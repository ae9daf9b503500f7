"""The progress display on a terminal of 80 columns and without a terminal."""

import io

import pytest
from rich.console import Console

from accel_gpt2.train.progress import TrainProgress, describe_step

FACTS = describe_step(
    loss=4.2,
    tokens_per_second=21_500,
    mfu=0.34,
    seconds_left=3 * 3600 + 45 * 60,
    peak_memory_bytes=14 * 2**30,
    cost_usd=12.3,
)


@pytest.mark.parametrize("name", ["kitchen (1/3)", "x" * 200])
def test_everything_fits_into_80_columns(name: str) -> None:
    """Step, total and all facts are readable on a narrow terminal, whatever the class is called."""
    progress = TrainProgress(shown=True, quiet=True)
    progress._progress.add_task(name, total=12_345, completed=1234, facts=FACTS)
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, color_system=None)
    console.print(progress._progress.get_renderable())
    lines = screen.getvalue().splitlines()
    assert len(lines) == 2
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert "1234/12345" in lines[0]
    assert lines[1].rstrip() == FACTS


def test_without_a_terminal_lines_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    """A log file gets whole lines without escape codes, and a phase's last line always."""
    with TrainProgress(shown=True, quiet=False) as progress:
        progress.start("kitchen (1/3)", 2)
        progress.update("kitchen (1/3)", 1, 2, FACTS)  # sooner than the next line is due
        progress.update("kitchen (1/3)", 2, 2, FACTS)
        progress.update("validation", 6, 6, "")
        progress.say("[done] 100%")
    assert capsys.readouterr().err == f"kitchen (1/3) 2/2 {FACTS}\nvalidation 6/6\n[done] 100%\n"


def test_a_note_is_a_line_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """Below the bar on a terminal, which is drawn anew anyway; a plain line elsewhere."""
    note = "Finishing the step and saving; Ctrl-C again leaves at once."
    progress = TrainProgress(shown=True, quiet=True)
    progress._live = True
    progress.note(note)
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, color_system=None)
    console.print(progress._progress.get_renderable())
    assert screen.getvalue().splitlines()[-1].rstrip() == note
    assert capfd.readouterr().err == ""
    TrainProgress(shown=True, quiet=True).note(note)
    TrainProgress(shown=False, quiet=True).note(note)
    assert capfd.readouterr().err == f"{note}\n"


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Of several processes only the first one talks."""
    with TrainProgress(shown=False, quiet=False) as progress:
        progress.start("kitchen (1/3)", 1)
        progress.update("kitchen (1/3)", 1, 1, FACTS)
        progress.say("done")
    assert capsys.readouterr().err == ""
