"""A run's trained models as plain directories of transformers, adapters merged into their base."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from accel_gpt2.classify.parts import ALL_CLASSES, Part
from accel_gpt2.classify.run import TRAINING_RECORD, Run, check_belongs, open_run
from accel_gpt2.data.quiet import quiet_transformers
from accel_gpt2.errors import UsageError, UserError, nearest
from accel_gpt2.train.manifest import MANIFEST, read_manifest, staged_directory, verify
from accel_gpt2.train.model import is_adapter, load_final_tokenizer, load_merged
from accel_gpt2.units import format_bytes

EXPORT_FOLDER = "export"  # in the run directory

# What the weights are written in. trained: as they were trained; a merged adapter's are fp32.
ExportDtype = Literal["trained", "fp32", "bf16"]

_DTYPES: dict[ExportDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedModel:
    """One exported directory; `kind` says what in it was trained."""

    class_name: str
    directory: Path
    kind: Literal["model", "merged adapter", "adapter"]
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    class_name: str
    part: Part
    final: Path
    target: Path


def export_run(
    run_directory: Path,
    output_directory: Path | None = None,
    *,
    class_name: str | None = None,
    merge: bool = True,
    dtype: ExportDtype = "trained",
) -> tuple[ExportedModel, ...]:
    """Write each trained model with its tokenizer as `AutoModel...from_pretrained` loads it.

    Each is a folder of its own, named as in the run, which is there whole or not at all. Nothing
    that is there is overwritten.

    Args:
        output_directory: None for `export/` in the run directory.
        class_name: the only class to export; the others need not be trained yet.
        merge: whether adapters are merged into their base, which has to be there for it; else they
            are left as peft loads them.
        dtype: of the weights.

    Raises:
        UsageError: for a class that is not there, and choices without an effect.
        UserError: when a model is not trained, is damaged, or has no room on the disk, or when
            something with its name is there.
    """
    run = open_run(run_directory, finished=False)
    jobs = _jobs(run, output_directory or run_directory / EXPORT_FOLDER, class_name)
    _check_choices(jobs, merge=merge, dtype=dtype)
    exported = []
    for job in jobs:
        check_belongs(run, job.part, job.final)
        keeps_adapter = is_adapter(job.final) and not merge
        with staged_directory(job.target) as staging:
            if keeps_adapter:
                written_in = _copy_adapter(job, staging)
            else:
                written_in = _write_model(run, job, staging, dtype)
        merged: Literal["model", "merged adapter"]
        merged = "merged adapter" if is_adapter(job.final) else "model"
        exported.append(
            ExportedModel(
                class_name=job.class_name,
                directory=job.target,
                kind="adapter" if keeps_adapter else merged,
                dtype=written_in,
                bytes=sum(file.bytes for file in read_manifest(job.target).files.values()),
            )
        )
    return tuple(exported)


def _jobs(run: Run, output_directory: Path, class_name: str | None) -> list[_Job]:
    jobs = [
        _Job(
            class_name=_name_of(run, part, number),
            part=part,
            final=final,
            target=output_directory / final.parent.name,
        )
        for part in run.parts
        for number, final in enumerate(part.finals)
    ]
    if class_name is not None:
        names = [job.class_name for job in jobs]
        if class_name not in names:
            raise UsageError(
                f"{run.directory} has no model of {class_name!r}, but of {', '.join(names)}."
                f"{nearest(class_name, names)}"
            )
        jobs = [job for job in jobs if job.class_name == class_name]
    for job in jobs:
        if not (job.final / MANIFEST).is_file():
            raise UserError(
                f"{job.class_name} is not trained to the end: {job.final} is missing. Go on with "
                f"`accel-gpt2 train --recipe {run.directory / 'recipe.yaml'} --output-dir "
                f"{run.directory}`, or give --class with one that is."
            )
        if job.target.exists():
            raise UserError(
                f"{job.target} is there already and is left as it is; give another --output-dir, "
                "or remove it first."
            )
    return jobs


def _name_of(run: Run, part: Part, number: int) -> str:
    """Of a class, also where the models of all classes are one part."""
    return run.class_names[number] if len(part.finals) > 1 else part.name


def _check_choices(jobs: Sequence[_Job], *, merge: bool, dtype: ExportDtype) -> None:
    if merge:
        return
    if not any(is_adapter(job.final) for job in jobs):
        raise UsageError(
            f"--no-merge: {jobs[0].final.parent.parent} was trained whole and has no adapter to "
            "leave alone; leave --no-merge out."
        )
    if dtype != "trained":
        raise UsageError(
            f"--no-merge with --dtype {dtype}: an adapter alone is copied as it is; leave one of "
            "them out."
        )


def _copy_adapter(job: _Job, staging: Path) -> str:
    verify(job.final)
    files = [name for name in read_manifest(job.final).files if name != TRAINING_RECORD]
    num_bytes = sum(read_manifest(job.final).files[name].bytes for name in files)
    _check_room(job.target, num_bytes)
    for name in files:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(job.final / name, staging / name)
    return "as trained"


def _write_model(run: Run, job: _Job, staging: Path, dtype: ExportDtype) -> str:
    names = () if job.part.name != ALL_CLASSES else run.class_names
    model: Any = load_merged(job.final, run.recipe, class_names=names)
    if dtype != "trained":
        model = model.to(_DTYPES[dtype])
    tensors = {id(tensor): tensor.nbytes for tensor in model.parameters()}
    _check_room(job.target, sum(tensors.values()))
    model.config.use_cache = True  # for whoever generates text with it
    with quiet_transformers():
        model.save_pretrained(staging)
    load_final_tokenizer(job.final).save(staging)
    return str(model.dtype).removeprefix("torch.")


def _check_room(target: Path, num_bytes: int) -> None:
    there = next(path for path in target.parents if path.exists())
    free = shutil.disk_usage(there).free
    if num_bytes > free:
        raise UserError(
            f"{target} takes {format_bytes(num_bytes)} and the disk has {format_bytes(free)} free; "
            "make room, give --dtype bf16, or an --output-dir on another disk."
        )
