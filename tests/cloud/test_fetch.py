"""Fetching a run: from where it is, only what is missing, and nothing that is not whole."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from accel_gpt2.classify.spending import MachineTime, note_launch, read_ledger, write_ledger
from accel_gpt2.cloud.engines import engine_of
from accel_gpt2.cloud.fetch import fetch_run
from accel_gpt2.cloud.ledger import Launch, launch_directory, read_launches, write_launch
from accel_gpt2.durable import make_directory
from accel_gpt2.errors import UserError
from accel_gpt2.train.manifest import publish_directory, verify
from tests.cloud.conftest import CommandLine, Programs

NAME = "accel-gpt2-imdb-1a2b"
MODEL, CHECKPOINT = "class-0-neg/final", "class-0-neg/checkpoint-5"


def _launch(run: Path, *, bucket: str | None = None, provider: str = "local") -> Launch:
    engine = {"local": "local", "hf-jobs": "hf-jobs"}.get(provider, "skypilot")
    return Launch(
        name=NAME,
        engine=engine,  # type: ignore[arg-type]  # one of them
        provider=provider,
        gpu="a100-40",
        num_gpus=1,
        usd_per_hour=2.0,
        budget_usd=10.0,
        began="2026-11-23T10:00:00+00:00",
        deadline="2026-11-23T15:00:00+00:00",
        run_directory=str(run),
        bucket=bucket,
        spot=False,
        state="running",
    )


def _write_run(run: Path, *, exit_code: int = 4) -> None:
    """As a machine leaves it: a model and a checkpoint with manifests, a log, a ledger."""
    for name in (MODEL, CHECKPOINT):
        make_directory(run / name)
        publish_directory(run / name, _fill)
    (run / "log.jsonl").write_text("{}\n")
    (run / "recipe.yaml").write_text("seed: 1\n")
    (run / "cloud.json").write_text(json.dumps({"launch": NAME, "exit_code": exit_code}))
    write_ledger(run, [_machine(NAME, 1800)])


def _fill(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 400)


def _machine(launch: str, seconds: float) -> MachineTime:
    return MachineTime(
        billed_since="2026-11-23T10:05:00+00:00",
        seconds=seconds,
        price_usd_per_hour=2.0,
        launch=launch,
    )


@pytest.fixture
def run(home: Path, tmp_path: Path) -> Path:
    """Where the run is to come; its machine is gone, and its bucket is beside it."""
    _write_run(tmp_path / "bucket" / "imdb")
    return tmp_path / "work" / "runs" / "imdb"


def _bucket(run: Path) -> Path:
    return run.parents[2] / "bucket" / "imdb"


def _fetch(run: Path, **how: str) -> tuple[str, ...]:
    launch = _launch(run, bucket=str(_bucket(run).parent))
    return fetch_run(engine_of("local"), launch, **how).whole  # type: ignore[arg-type]


def test_a_run_outlives_its_machine_in_the_bucket(run: Path) -> None:
    """Models, checkpoints, log and ledger; each model and checkpoint as its manifest says."""
    assert _fetch(run) == (CHECKPOINT, MODEL)
    for name in (MODEL, CHECKPOINT):
        verify(run / name)
    assert (run / "log.jsonl").read_text() == "{}\n"


def test_the_machine_is_fresher_than_the_bucket(run: Path) -> None:
    """While it is there, the run comes from it."""
    machine = launch_directory(NAME) / "machine" / "runs" / "imdb"
    shutil.copytree(_bucket(run), machine)
    (machine / "log.jsonl").write_text("{}\n{}\n")
    _fetch(run)
    assert (run / "log.jsonl").read_text() == "{}\n{}\n"


def test_results_come_without_checkpoints_and_take_none_away(run: Path) -> None:
    """What is here stays, also what the other side has rotated away."""
    make_directory(run / "class-0-neg" / "checkpoint-4")
    (run / "class-0-neg" / "checkpoint-4" / "state.json").write_text("mine")
    assert _fetch(run, what="results") == (MODEL,)
    assert not (run / CHECKPOINT).exists()
    assert (run / "class-0-neg" / "checkpoint-4" / "state.json").read_text() == "mine"


def test_a_fetch_that_broke_off_goes_on(run: Path) -> None:
    """Half a file is copied again, a whole one is not; a file whose content is wrong comes anew."""
    _fetch(run)
    model = run / MODEL / "model.safetensors"
    untouched = (run / CHECKPOINT / "model.safetensors").stat().st_mtime_ns
    for content in (model.read_bytes()[:5000], bytes(model.stat().st_size)):
        model.write_bytes(content)
        assert _fetch(run) == (CHECKPOINT, MODEL)
        verify(run / MODEL)
    assert (run / CHECKPOINT / "model.safetensors").stat().st_mtime_ns == untouched


def test_what_is_damaged_there_is_named(run: Path) -> None:
    """It is said, and is not taken for whole."""
    (_bucket(run) / MODEL / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"class-0-neg/final in .* came twice, and not as its man"):
        _fetch(run)
    verify(run / CHECKPOINT)


def test_what_was_spent_here_stays_counted(run: Path) -> None:
    """The ledgers are put together, also when the copy breaks off; the machine's row is right."""
    note_launch(run, "accel-gpt2-imdb-0000", seconds=100, usd_per_hour=2.0)
    note_launch(run, NAME, seconds=900, usd_per_hour=2.0)
    _fetch(run)
    assert {row.launch: row.seconds for row in read_ledger(run)} == {
        "accel-gpt2-imdb-0000": 100,
        NAME: 1800,
    }


def test_nobody_is_disturbed(run: Path) -> None:
    """Where a training is at work, nothing is copied over it."""
    import os
    import socket

    import psutil

    parent = psutil.Process(os.getppid())
    make_directory(run)
    owner = {
        "pid": parent.pid,
        "create_time": parent.create_time(),
        "host": socket.gethostname(),
        "command": "accel-gpt2 train",
        "started_at": "2026-11-23T10:00:00+00:00",
    }
    (run / "owner.json").write_text(json.dumps(owner))
    with pytest.raises(UserError, match="is at work in"):
        _fetch(run)
    assert not (run / "log.jsonl").exists()


def test_nothing_kept_is_said(home: Path, tmp_path: Path) -> None:
    """Without a bucket, when the machine is gone."""
    launch = _launch(tmp_path / "run")
    with pytest.raises(UserError, match=r"is left but what .* it had no --bucket"):
        fetch_run(engine_of("local"), launch)
    with pytest.raises(UserError, match=r"Nothing of accel-gpt2-imdb-1a2b is in .*empty"):
        fetch_run(engine_of("local"), dataclasses.replace(launch, bucket=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("provider", "what", "expected"),
    [
        ("aws", "all", "aws s3 sync s3://b/my-run RUN"),
        ("aws", "results", "aws s3 sync s3://b/my-run RUN --exclude=*/checkpoint-*"),
        ("gcp", "all", "gcloud storage rsync --recursive gs://b/my-run RUN"),
        (
            "gcp",
            "results",
            "gcloud storage rsync --recursive --exclude=.*/checkpoint-.* gs://b/my-run RUN",
        ),
        (
            "azure",
            "results",
            "azcopy copy https://acc.blob.core.windows.net/b/my-run/* RUN --recursive "
            "--overwrite=ifSourceNewer --exclude-regex=checkpoint-",
        ),
        (
            "hf-jobs",
            "results",
            "hf buckets sync hf://buckets/b/my-run RUN --exclude=*/checkpoint-*",
        ),
    ],
)
def test_a_bucket_is_read_by_its_providers_program(
    programs: Programs,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    provider: str,
    what: str,
    expected: str,
) -> None:
    """When SkyPilot knows no such machine any more; each copies only what is missing."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", "acc")
    monkeypatch.setattr("accel_gpt2.cloud.hf_jobs._with_own_hf", list)
    programs.answer({("sky", "logs"): {"code": 1}, ("sky", "status"): {"says": "[]"}})
    run = tmp_path / "my-run"
    launch = _launch(run, bucket="b", provider=provider)
    engine_of(launch.engine).copy(launch, what)  # type: ignore[arg-type]
    assert " ".join(programs.calls[-1]) == expected.replace("RUN", str(run))


def test_azures_account_is_asked_for(
    programs: Programs, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is in every address, and SkyPilot makes one up."""
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    programs.answer({("sky", "logs"): {"code": 1}, ("sky", "status"): {"says": "[]"}})
    launch = _launch(tmp_path / "run", bucket="b", provider="azure")
    with pytest.raises(UserError, match=r"Which storage account has b\? Set AZURE_STORAGE_ACCOUNT"):
        engine_of("skypilot").copy(launch, "all")


def test_a_machine_that_is_there_is_read_by_ssh(
    programs: Programs, home: Path, tmp_path: Path
) -> None:
    """It is fresher than its bucket."""
    programs.answer({("sky", "logs"): {"code": 101}})
    launch = _launch(tmp_path / "run", bucket="b", provider="aws")
    engine_of("skypilot").copy(launch, "results")
    assert programs.calls[-1][:2] == ["rsync", "--archive"]
    assert programs.calls[-1][-3:] == [
        "--exclude=checkpoint-*",
        f"{NAME}:sky_workdir/runs/run/",
        f"{tmp_path}/run/",
    ]


@pytest.mark.parametrize(
    ("exit_code", "next_step"),
    [
        (0, "It is trained: `accel-gpt2 evaluate runs/imdb`, `accel-gpt2 report runs/imdb`."),
        (4, "`accel-gpt2 train --recipe runs/imdb/recipe.yaml --output-dir runs/imdb`"),
    ],
)
def test_the_verb_says_what_came_and_what_to_type(
    accel_gpt2: CommandLine, run: Path, exit_code: int, next_step: str
) -> None:
    """By the run directory as well as by the launch's name; the launch is known to have ended."""
    _write_run(_bucket(run), exit_code=exit_code)
    write_launch(_launch(run, bucket=str(_bucket(run).parent)))
    code, out, err = accel_gpt2("cloud", "fetch", "runs/imdb")
    assert code == 0, err
    assert f"{run}: 8 files, 201" in out
    assert "class-0-neg/final is whole" in out
    assert next_step in err
    (launch,) = read_launches()
    assert (launch.state, launch.exit_code) == ("ended", exit_code)
    code, out, err = accel_gpt2("cloud", "fetch", NAME, "--what", "results", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["exit_code"] == exit_code
    assert document["standing"] == "gone"
    assert MODEL in document["whole"]
    code, _, err = accel_gpt2("cloud", "fetch", "runs/imbd")
    assert code == 2
    assert "There is no launch 'runs/imbd'" in err
