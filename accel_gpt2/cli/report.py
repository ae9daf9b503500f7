"""`report`: one HTML page and its pictures from a run directory."""

from pathlib import Path

from accel_gpt2.classify.lock import working_owner
from accel_gpt2.classify.status import read_classes, where_they_are
from accel_gpt2.cli.comparison_runs import COMPARISON_FILE
from accel_gpt2.cli.options import DebugOption, JsonOption, RunArgument
from accel_gpt2.cli.output import print_json, print_line
from accel_gpt2.cli.run_directory import require_run


def report(
    run_directory: RunArgument, json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Write a run's or comparison's report: a page and its pictures."""
    from accel_gpt2.report import write_comparison_report, write_report

    if (run_directory / COMPARISON_FILE).is_file():
        path = write_comparison_report(run_directory)
    else:
        require_run(run_directory)
        path = write_report(run_directory, notices=_not_trained(run_directory))
    if json:
        print_json({"report": str(path)})
    else:
        print_line(str(path))


def _not_trained(run_directory: Path) -> list[str]:
    """Where the classes are, unless all of them are trained."""
    classes = read_classes(run_directory)
    if all(x.state == "finished" for x in classes):
        return []
    at_work = working_owner(run_directory) is not None
    said = f"Not all is trained: {where_they_are(classes, at_work=at_work)}"
    return [said, *(f"{x.name} failed: {x.message}" for x in classes if x.message)]
