"""`configs`: the files that `accelerate launch` reads, generated from the strategies' rows."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from accel_gpt2.cli.errors import plain_app
from accel_gpt2.cli.options import DebugOption
from accel_gpt2.cli.output import print_line, say
from accel_gpt2.durable import write_text
from accel_gpt2.errors import UserError

app = plain_app(no_args_is_help=True)

_Directory = Annotated[
    Path, typer.Option(help="Where accelerate_configs/ and ds_configs/ are.", file_okay=False)
]


@app.callback()
def configs(debug: DebugOption = False) -> None:
    """Write and check the launch files, one for each strategy."""


@app.command()
def write(directory: _Directory = Path(), debug: DebugOption = False) -> None:
    """Write the files, from the catalog's rows."""
    write_files(directory, _committed_files(directory))


@app.command()
def check(directory: _Directory = Path(), debug: DebugOption = False) -> None:
    """Say which files `configs write` would change; exit code 1 if any."""
    found = differences(directory)
    if found:
        where = "" if directory == Path() else f" --directory {shlex.quote(str(directory))}"
        again = f"Write them again by `accel-gpt2 configs write{where}`."
        raise UserError("\n".join([*found, again]))
    say(f"{len(_committed_files(directory))} files are what the catalog's rows say.")


@app.command()
def copy(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made if it is not there.")],
    debug: DebugOption = False,
) -> None:
    """Write the files into a directory, to launch with from here."""
    from accel_gpt2.cli.launcher import shipped_file
    from accel_gpt2.render.accelerate import config_files

    write_files(directory, config_files(directory.as_posix()))
    file = directory / "accelerate_configs" / "ddp.yaml"
    words = ["accelerate", "launch", f"--config_file={file}", str(shipped_file("launch/train.py"))]
    say(f"For instance: {shlex.join(words)}")


def _committed_files(directory: Path) -> dict[str, str]:
    """What is below `directory` by the rows; a checkout has a launch/ too."""
    from accel_gpt2.render.accelerate import config_files
    from accel_gpt2.render.cloud import LAUNCH_DIRECTORY, sky_files

    tasks = sky_files() if (directory / LAUNCH_DIRECTORY).is_dir() else {}
    return {**config_files(), **tasks}


def write_files(directory: Path, files: Mapping[str, str]) -> None:
    """Write files below `directory`, by their paths there, and name them."""
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
        print_line(str(path))
    say(f"{len(files)} files written.")


def differences(directory: Path) -> list[str]:
    """One sentence for each file below `directory` that is missing, different or one too many."""
    from accel_gpt2.render.accelerate import config_files

    files = _committed_files(directory)
    copied = config_files(directory.as_posix())  # by `configs copy`, with its own folder in them
    found = []
    for name, text in files.items():
        path = directory / name
        if not path.is_file():
            found.append(f"{path} is missing.")
        elif path.read_bytes() not in {text.encode(), copied.get(name, text).encode()}:
            found.append(f"{path} is not what the catalog's row says.")
    folders = {directory / Path(name).parent for name in files}
    there = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
    generated = {path for path in there if path.suffix != ".py"}  # launch/train.py is not
    extra = generated - {directory / name for name in files}
    return [*found, *(f"{path} belongs to no row." for path in sorted(extra))]
