"""`doctor`: what is installed and what this machine can do, for the person and for a bug report; or
where a run stands."""

import os
import platform
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import accel_gpt2
from accel_gpt2.classify.lock import working_owner
from accel_gpt2.classify.status import read_classes, read_ending, state_of
from accel_gpt2.cli.hardware import detect_hardware, profile_for
from accel_gpt2.cli.options import DebugOption, JsonOption
from accel_gpt2.cli.output import print_json, print_table, say, warn
from accel_gpt2.cli.run_directory import RECIPE_FILE, require_run
from accel_gpt2.units import format_bytes
from accel_gpt2.versions import installed_versions

# Their values help; of the secret ones only whether they are set.
_VARIABLES = (
    "ACCEL_GPT2_",
    "ACCELERATE_",
    "CUDA_",
    "HF_",
    "MASTER_",
    "NCCL_",
    "NO_COLOR",
    "OMP_NUM_THREADS",
    "PYTORCH_",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "TOKENIZERS_PARALLELISM",
    "TRANSFORMERS_",
)
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL", "AUTH")
_HUB_TIMEOUT_SECONDS = 3.0


def doctor(
    run_directory: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="A run directory, for where its training stands."),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what is installed and in the way, or where a run stands."""
    if run_directory is not None:
        _say_where_it_stands(run_directory, as_json=json)
        return
    findings = examine()
    if json:
        print_json(findings)
        return
    print_table({"": "left", "found": "left"}, _rows(findings))
    for problem in findings["problems"]:
        warn(problem)


def _say_where_it_stands(run_directory: Path, *, as_json: bool) -> None:
    require_run(run_directory)
    owner = working_owner(run_directory)
    classes = read_classes(run_directory)
    ending = read_ending(run_directory) if owner is None else None
    states = [state_of(x, at_work=owner is not None) for x in classes]
    if as_json:
        last = None if ending is None else {"exit_code": ending[0], "message": ending[1]}
        print_json(
            {
                "at_work": None if owner is None else asdict(owner),
                "ending": last,
                "classes": [
                    {**asdict(x), "state": state} for x, state in zip(classes, states, strict=True)
                ],
            }
        )
        return
    columns = {"class": "left", "state": "left", "step": "right", "best": "right", "at": "left"}
    rows = [
        [
            x.name,
            state,
            f"{x.step}/{x.total_steps}",
            "" if x.best_loss_bits is None else f"{x.best_loss_bits:.3f} bits",
            x.updated[:19].replace("T", " "),
        ]
        for x, state in zip(classes, states, strict=True)
    ]
    if rows:
        print_table(columns, rows)  # type: ignore[arg-type]
    for x in classes:
        if x.message:
            say(f"{x.name} failed: {x.message}", style="red")
    if owner is not None:
        since = owner.started_at.replace("T", " ")
        said = f"Process {owner.pid} is at work since {since}"
        say(f"{said}; `kill {owner.pid}` has it save and stop.")
    elif not rows:
        say("No training has got as far as its classes.")
    elif set(states) != {"finished"}:
        say(_last_words(ending))
        recipe = shlex.quote(str(run_directory / RECIPE_FILE))
        directory = shlex.quote(str(run_directory))
        say(f"Go on with `accel-gpt2 train --recipe {recipe} --output-dir {directory}`.")


def _last_words(ending: tuple[int, str] | None) -> str:
    if ending is None:
        return "Nobody is at work, and who was last has not said how that ended."
    return f"Nobody is at work; the last training ended with exit code {ending[0]}. {ending[1]}"


def examine() -> dict[str, Any]:
    """Everything that `doctor` shows, as one document."""
    hardware = detect_hardware()
    torch = _torch()
    hub = _hub()
    folder = Path.cwd()
    cache = _hub_cache()
    findings: dict[str, Any] = {
        "accel_gpt2": accel_gpt2.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "packages": installed_versions(),
        "torch": torch,
        "gpus": [
            {
                "name": gpu.name,
                "memory_bytes": gpu.memory_bytes,
                "catalog_row": None if gpu.spec is None else gpu.spec.name,
                "bf16": gpu.compute_capability >= (8, 0),
            }
            for gpu in hardware.gpus
        ],
        "gpus_hidden_by": hardware.hidden_by,
        "profile": profile_for(hardware).name,
        "num_cores": hardware.num_cores,
        "host_memory_bytes": hardware.host_memory_bytes,
        "disk": {"path": str(folder), "free_bytes": shutil.disk_usage(folder).free},
        "hub": hub,
        "hub_cache": {"path": str(cache), "exists": cache.is_dir()},
        "data_folder": _shown(os.environ.get("ACCEL_GPT2_DATA", "")) or None,
        "environment": _environment(),
    }
    return {**findings, "problems": _problems(findings)}


def _torch() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:  # a broken installation is what one comes to the doctor with
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    cuda = torch.cuda.is_available()
    return {
        "cuda_build": torch.version.cuda,
        "cuda_available": cuda,
        "bf16_supported": cuda and torch.cuda.is_bf16_supported(including_emulation=False),
        "num_threads": torch.get_num_threads(),
    }


def _hub() -> dict[str, Any]:
    import urllib.error
    import urllib.request

    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    endpoint = _shown(address)
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return {"endpoint": endpoint, "answers": False, "reason": "HF_HUB_OFFLINE is set"}
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_SECONDS):
            return {"endpoint": endpoint, "answers": True, "reason": None}
    except urllib.error.HTTPError as error:
        return {"endpoint": endpoint, "answers": error.code < 500, "reason": f"HTTP {error.code}"}
    except (OSError, ValueError) as error:
        reason = _shown(" ".join(str(getattr(error, "reason", error)).split()))
        return {"endpoint": endpoint, "answers": False, "reason": reason}


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", f"{home}/hub")).expanduser()


def _environment() -> dict[str, str]:
    return {
        name: "set" if any(word in name.upper() for word in _SECRET_WORDS) else _shown(value)
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES)
    }


def _shown(text: str) -> str:
    """A value without the user and password that an address in it may hold.

    >>> _shown("https://me:secret@hub.example.org/x")
    'https://***@hub.example.org/x'
    """
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _problems(findings: dict[str, Any]) -> list[str]:
    problems = [
        f"{name} is not installed: type `pip install {name}`."
        for name, version in findings["packages"].items()
        if version is None and not (name == "bitsandbytes" and sys.platform == "darwin")
    ]
    torch = findings["torch"]
    if "error" in torch:
        problems.append(f"torch cannot be imported ({torch['error']}): install it again.")
    elif findings["gpus"] and not torch["cuda_available"]:
        problems.append(
            "This machine has a GPU that this torch cannot use: install the CUDA build of torch."
        )
    if not findings["hub"]["answers"]:
        problems.append(
            f"{findings['hub']['endpoint']} does not answer ({findings['hub']['reason']}): "
            "pretrained weights and hub data sets must be local. `--model gpt2-tiny --dataset "
            "docstrings` needs neither."
        )
    return problems


def _rows(findings: dict[str, Any]) -> list[list[str]]:
    torch = findings["torch"]
    gpus = [
        f"{gpu['name']}, {format_bytes(gpu['memory_bytes'])}, "
        f"{gpu['catalog_row'] or 'no catalog row: MFU will be unknown'}"
        for gpu in findings["gpus"]
    ]
    hidden = findings["gpus_hidden_by"]
    rows = [
        ["accel-gpt2", findings["accel_gpt2"]],
        ["python", findings["python"]],
        ["platform", findings["platform"]],
        *([name, version or "missing"] for name, version in findings["packages"].items()),
        ["GPUs", "\n".join(gpus) or (f"none ({hidden} hides them)" if hidden else "none")],
        ["CUDA", torch.get("error") or _cuda(torch)],
        ["profile auto", findings["profile"]],
        ["CPU cores", str(findings["num_cores"])],
        ["host memory", format_bytes(findings["host_memory_bytes"])],
        [
            "disk",
            f"{format_bytes(findings['disk']['free_bytes'])} free in {findings['disk']['path']}",
        ],
        ["hub", f"{findings['hub']['endpoint']} {_answer(findings['hub'])}"],
        ["hub cache", findings["hub_cache"]["path"]],
        ["ACCEL_GPT2_DATA", findings["data_folder"] or "not set"],
    ]
    others = {k: v for k, v in findings["environment"].items() if k != "ACCEL_GPT2_DATA"}
    return rows + [[name, value] for name, value in others.items()]


def _cuda(torch: dict[str, Any]) -> str:
    build = torch["cuda_build"]
    if build is None:
        return "none: this is a CPU build of torch"
    usable = "usable" if torch["cuda_available"] else "not usable here"
    bf16 = ", bf16" if torch["bf16_supported"] else ""
    return f"{build}, {usable}{bf16}"


def _answer(hub: dict[str, Any]) -> str:
    return "answers" if hub["answers"] else f"does not answer ({hub['reason']})"
