"""`accel-gpt2 cloud` with stand-ins for `sky` and rsync: what would run, and how it may end."""

import datetime
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from accel_gpt2.cloud import skypilot
from accel_gpt2.cloud.ledger import Launch, read_launches
from accel_gpt2.errors import UserError
from tests.cloud.conftest import KEY, CommandLine, Programs
from tests.cloud.lambda_server import LambdaCloud, lambda_cloud
from tests.render.test_cloud import JOB

TRAINING = ("--model=gpt2", "--dataset=imdb")
LAUNCH = ("cloud", "launch", "--provider=runpod", "--gpu=a100-80", "--budget=10", *TRAINING)


def _only_launch() -> Launch:
    (launch,) = read_launches()
    return launch


def _ended(exit_code: int) -> dict[str, object]:
    """What rsync fetches: a run whose scripts ended so, and its machine's row."""
    return {
        "does": f"""
name = sys.argv[-2].split(":")[0]
Path(sys.argv[-1], "cloud.json").write_text(json.dumps(dict(launch=name, exit_code={exit_code})))
row = dict(launch=name, billed_since="2026", seconds=1800, price_usd_per_hour=1.79)
Path(sys.argv[-1], "spent.json").write_text(json.dumps(dict(machines=[row])))
"""
    }


def test_a_dry_run_shows_everything_and_does_nothing(
    accel_gpt2: CommandLine, programs: Programs, home: Path
) -> None:
    """Plan, fit, hours, price with set-up, files, command; nothing is asked, run or written."""
    code, out, _ = accel_gpt2(*LAUNCH, "--dry-run")
    assert code == 0
    for expected in (
        r"Plan +full fine-tuning, bf16, AdamW; [\d.]+ GiB of [\d.]+ GiB \(fits\)",
        r"Time +.* min .* s, and 25 min 00 s around it",
        r"Price +\$1\.79 an hour \(2026-11-09, ",
        r"Estimate +\$\d\.\d\d of a budget of \$10\.00",
        r"Ends +after 5 h 35 min at the latest, saved",
        r"max_hourly_cost: 1\.79",
        r"sky launch --yes --cluster=accel-gpt2-imdb-gpt2-[0-9a-f]{4} .*task\.sky\.yaml",
    ):
        assert re.search(expected, out), (expected, out)
    assert programs.calls == []
    assert not (home / "state").exists()


def test_json_is_one_document(accel_gpt2: CommandLine, programs: Programs) -> None:
    """With the files' texts."""
    code, out, _ = accel_gpt2(*LAUNCH, "--dry-run", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["provider"] == "runpod"
    assert document["usd_total"] < document["budget_usd"] == 10
    assert document["verdict"] == "fits"
    assert set(document["files"]) == {"task.sky.yaml", "command.txt"}


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("--budget=0.3",), 3, r"expected to cost \$\d\.\d\d, which exceeds --budget 0\.3: give"),
        (("--budget=0",), 2, "buys nothing"),
        (("--provider=lamda",), 2, r"No engine starts machines of 'lamda'\. Did you mean 'lambda'"),
        (("--gpu=a100-8",), 2, r"There is no GPU 'a100-8'\. Did you mean 'a100-80'"),
        (("--gpu=t4",), 2, r"There is no price for t4 of runpod\. It has .*a100-80"),
        (("--provider=aws",), 2, r"aws sells a100-80 only 8 at a time: give --num-gpus 8"),
        (("--spot",), 2, r"--spot needs somewhere to go on from .* \(aws, gcp, azure\)"),
        (("--bucket=b",), 2, "No bucket can be mounted on machines of runpod"),
        (("--provider=hf-jobs",), 2, "The disk of a Hugging Face job is gone when it ends"),
        (("--provider=hf-jobs", "--num-gpus=2"), 2, "Hugging Face jobs are rented with one GPU"),
        (("--model=gpt2-xl", "--gpu=rtx4090", "--strategy=single", "--finetuning=full",
          "--optimizer=adamw", "--mixed-precision=no"), 3, "gpt2-xl does not fit on"),
        (("--hours=0",), 2, "is no time to train for"),
        (("--set=price_usd_per_hour=1",), 2, "give --budget and leave it out"),
        (("--usd-per-hour=0",), 2, "is no price"),
        ((), 2, "This spends money, and nobody can be asked here: give --yes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_starts(
    accel_gpt2: CommandLine,
    programs: Programs,
    arguments: tuple[str, ...],
    code: int,
    complaint: str,
) -> None:
    """One sentence, the exit code of its kind, no record."""
    ended, _, err = accel_gpt2(*LAUNCH, *arguments)
    assert re.search(complaint, err), err
    assert ended == code
    assert programs.calls == []
    assert read_launches() == []


def test_a_launch_is_run_fetched_and_taken_down(
    accel_gpt2: CommandLine, programs: Programs, tmp_path: Path, home: Path
) -> None:
    """In this order, with the sources in the upload and nothing else of the checkout."""
    seen = tmp_path / "seen.txt"
    listing = f"import yaml; task = yaml.safe_load(open(sys.argv[-1])); Path({str(seen)!r})"
    listing += ".write_text('\\n'.join(sorted(str(x.relative_to(task['workdir'])) "
    listing += "for x in Path(task['workdir']).rglob('*'))))"
    programs.answer({("sky", "launch"): {"does": listing}, ("rsync",): _ended(0)})
    begun = tmp_path / "work" / "runs" / "imdb-gpt2" / "class-0-neg"
    begun.mkdir(parents=True)
    (begun / "state.json").write_text("a run to go on with")
    code, _, err = accel_gpt2(*LAUNCH, "--yes")
    assert code == 0, err
    launch = _only_launch()
    name, run = launch.name, tmp_path / "work" / "runs" / "imdb-gpt2"
    task = home / "state" / "accel-gpt2" / "cloud" / name / "task.sky.yaml"
    assert programs.calls == [
        ["sky", "--version"],
        ["sky", "launch", "--yes", f"--cluster={name}", str(task)],
        [
            "rsync",
            "--archive",
            "--partial-dir=.staging-rsync",
            "--exclude=run.lock",
            "--exclude=owner.json",
            f"{name}:sky_workdir/runs/imdb-gpt2/",
            f"{run}/",
        ],
        ["sky", "down", "--yes", name],
    ]
    assert (launch.state, launch.exit_code) == ("ended", 0)
    uploaded = set(seen.read_text().splitlines())
    needed = (
        "pyproject.toml",
        "constraints.txt",
        "accel_gpt2/recipe/__init__.py",
        "launch/train.py",
    )
    assert {f"package/{name}" for name in needed} <= uploaded
    assert "runs/imdb-gpt2/class-0-neg/state.json" in uploaded
    left_out = ("package/tests", "package/docs", "package/.git", "package/runs")
    assert not [x for x in uploaded if "__pycache__" in x or x.startswith(left_out)]
    assert "--model gpt2 --dataset imdb" in task.read_text()


@pytest.mark.parametrize(
    ("sky_code", "trained", "code", "says"),
    [
        (100, 4, 4, "Stopped by the budget, saved"),
        (100, 75, 75, "Stopped by a signal, saved"),
        (100, 1, 1, "Ended with exit code 1"),
        (102, None, 1, "The job was gone before its end. What was started is taken down"),
        (103, None, 1, "The job was cancelled before its end. What was started is taken down"),
        (1, None, 1, r"`sky launch` failed \(1\); see above. What was started is taken down"),
    ],
)
def test_however_a_job_ends_its_machine_is_taken_down(
    accel_gpt2: CommandLine,
    programs: Programs,
    sky_code: int,
    trained: int | None,
    code: int,
    says: str,
) -> None:
    """With the exit code that the trainer wrote down there, where there was one."""
    programs.answer(
        {
            ("sky", "launch"): {"code": sky_code},
            ("sky", "logs"): {"code": 1},
            ("sky", "status"): {"says": "[]"},
            ("rsync",): {} if trained is None else _ended(trained),
        }
    )
    ended, _, err = accel_gpt2(*LAUNCH, "--yes")
    assert re.search(says, err), err
    assert ended == code
    assert ["sky", "down", "--yes", _only_launch().name] in programs.calls
    assert _only_launch().state == "ended"


def test_a_lost_connection_leaves_the_machine_and_says_so(
    accel_gpt2: CommandLine, programs: Programs
) -> None:
    """101: the job goes on; status and logs find it, and cancel ends it."""
    programs.answer({("sky", "launch"): {"code": 101}, ("sky", "logs"): {"code": 101}})
    code, _, err = accel_gpt2(*LAUNCH, "--yes")
    launch = _only_launch()
    assert code == 1
    assert f"`accel-gpt2 cloud logs {launch.name}` follows it" in err
    assert launch.state == "submitting"
    code, out, _ = accel_gpt2("cloud", "status", "--json")
    (row,) = json.loads(out)["launches"]
    assert (code, row["standing"], row["overdue"]) == (0, "running", False)
    accel_gpt2("cloud", "logs", launch.name, "--follow")
    assert programs.calls[-1] == ["sky", "logs", "--follow", launch.name]
    assert accel_gpt2("cloud", "cancel", launch.name)[0] == 0
    assert programs.calls[-1] == ["sky", "down", "--yes", launch.name]
    assert _only_launch().state == "ended"


def test_a_launch_that_hangs_is_given_up(
    home: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the budget's time it is killed, and what there may be of it taken down."""
    monkeypatch.setattr(skypilot, "_LATER_SECONDS", 0.0)
    programs.answer({("sky", "launch"): {"seconds": 600}})
    now = datetime.datetime.now(datetime.UTC)
    launch = Launch(
        name=JOB.name,
        engine="skypilot",
        provider="lambda",
        gpu=JOB.gpu,
        num_gpus=1,
        usd_per_hour=JOB.usd_per_hour,
        budget_usd=JOB.budget_usd,
        began=now.isoformat(),
        deadline=(now + datetime.timedelta(seconds=8)).isoformat(),
        run_directory=str(home / "run"),
        bucket=None,
        spot=False,
        state="submitting",
    )
    with pytest.raises(UserError, match=r"did not end within \d s and was killed\. What was start"):
        skypilot.SkyPilotEngine().submit(JOB, launch)
    assert time.time() - now.timestamp() < 100
    assert programs.calls[0][:2] == ["sky", "launch"]
    assert programs.calls[1:] == [["sky", "down", "--yes", JOB.name]]


def test_results_that_cannot_be_fetched_keep_the_machine(
    accel_gpt2: CommandLine, programs: Programs
) -> None:
    """It is not taken down with what was paid for; what to type is said."""
    programs.answer({("rsync",): {"code": 12}, ("sky", "logs"): {"code": 0}})
    code, _, err = accel_gpt2(*LAUNCH, "--yes")
    assert code == 1
    assert "The results are still on the machine" in err
    assert "sky down" not in {" ".join(call[:2]) for call in programs.calls}


@pytest.mark.parametrize(
    "version", ["skypilot, version 0.13.0", "", "skypilot, version 1.0.0.dev0"]
)
def test_another_sky_is_refused(accel_gpt2: CommandLine, programs: Programs, version: str) -> None:
    """With the line that installs the one that is known, before a machine is asked for."""
    programs.answer({("sky", "--version"): {"says": version}})
    code, _, err = accel_gpt2(*LAUNCH, "--yes")
    assert code == 1
    assert "Install it beside this environment: uv tool install 'skypilot[" in err
    assert "sky launch" not in {" ".join(call[:2]) for call in programs.calls}


def test_spot_is_a_managed_job(accel_gpt2: CommandLine, programs: Programs) -> None:
    """Which SkyPilot brings back after a preemption; its results come from the bucket."""
    arguments = ("--provider=gcp", "--gpu=a100-40", "--spot", "--bucket=my-runs", "--yes")
    code, _, err = accel_gpt2(*LAUNCH, *arguments)
    assert code == 0, err
    launch = _only_launch()
    call = programs.calls[1]
    assert call[:5] == ["sky", "jobs", "launch", "--yes", f"--name={launch.name}"]
    run = str(Path(launch.run_directory))
    source = "gs://my-runs/imdb-gpt2"
    assert programs.calls[2:] == [["gcloud", "storage", "rsync", "--recursive", source, run]]


def test_the_machine_that_brings_spot_back_is_paid_for(
    accel_gpt2: CommandLine, programs: Programs
) -> None:
    """$0.20 an hour of it are in the price, the estimate and the budget; it idles ten minutes."""
    arguments = ("--provider=gcp", "--gpu=a100-40", "--bucket=my-runs", "--hours=1", "--dry-run")
    documents = {}
    for name, price in {"spot": ("--spot",), "own": ("--usd-per-hour=1",)}.items():
        spot = ("--spot",) if name == "own" else ()
        code, out, err = accel_gpt2(*LAUNCH, *arguments, *price, *spot, "--json")
        assert code == 0, err
        documents[name] = json.loads(out)
    own = documents["own"]
    assert own["usd_per_hour"] == 1.2
    billed_seconds = 3600 + 600 + 300
    assert own["usd_total"] == pytest.approx(1.2 * billed_seconds / 3600 + 0.2 * 600 / 3600)
    assert own["left_seconds"] == int(10 / 1.2 * 3600)
    assert "max_hourly_cost: 1.0\n" in own["files"]["task.sky.yaml"]
    assert "--set=price_usd_per_hour=1.2" in own["train_command"]
    assert documents["spot"]["usd_per_hour"] == pytest.approx(1.293355 + 0.2)
    _, out, _ = accel_gpt2(*LAUNCH, *arguments, "--spot")
    assert "an hour, of it $0.20 for the machine that brings it back (" in out


@pytest.fixture
def cloud(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LambdaCloud]:
    """A Lambda that takes the key in the environment, in place of the real one."""
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    with lambda_cloud(KEY) as server:
        for function in ("instances", "terminate", "instance_types"):
            keywords = getattr(
                __import__("accel_gpt2.cloud.lambda_api", fromlist=[function]), function
            ).__kwdefaults__
            monkeypatch.setitem(keywords, "base_url", server.url)
        fields = skypilot.SkyPilotEngine.__init__.__kwdefaults__
        monkeypatch.setitem(fields, "lambda_url", server.url)
        yield server


def test_what_dies_half_way_is_reaped(
    accel_gpt2: CommandLine, programs: Programs, cloud: LambdaCloud, home: Path, tmp_path: Path
) -> None:
    """The record is there before `sky` runs; machines of ours that no record has go too."""
    asked = f"""
import urllib.request
name = next(x.split("=")[1] for x in sys.argv if x.startswith("--cluster=")) + "-head"
body = dict(region_name="us-west-1", instance_type_name="gpu_1x_a100_sxm4",
            ssh_key_names=["mine"], name=name)
urllib.request.urlopen(urllib.request.Request(
    {cloud.url!r} + "/api/v1/instance-operations/launch", data=json.dumps(body).encode(),
    headers=dict(Authorization="Bearer {KEY}")))
(record,) = Path({str(home)!r}).glob("state/accel-gpt2/cloud/*/launch.json")
assert json.loads(record.read_text())["state"] == "submitting"
"""
    programs.answer(
        {
            ("sky", "launch"): {"does": asked, "code": 1},
            ("sky", "down"): {"code": 1},
            ("sky", "logs"): {"code": 1},
            ("sky", "status"): {"code": 1},
        }
    )
    lambda_launch = ("cloud", "launch", "--provider=lambda", "--gpu=a100-40", "--budget=10")
    code, _, err = accel_gpt2(*lambda_launch, *TRAINING, "--yes")
    launch = _only_launch()
    assert code == 1
    assert f"{launch.name} may be there and cost money: `accel-gpt2 cloud reap` ends it" in err
    assert [x["name"] for x in cloud.machines.values()] == [f"{launch.name}-head"]
    assert launch.state == "submitting"

    code, _, err = accel_gpt2("cloud", "reap", "--yes")  # `sky` is still out of order
    assert code == 1
    assert "may be running and billed" in err
    assert [x["status"] for x in cloud.machines.values()] == ["terminating"]
    programs.answer({})
    code, out, err = accel_gpt2("cloud", "reap", "--yes")
    assert code == 0
    assert launch.name in out
    assert _only_launch().state == "ended"
    assert "Nothing is left running" in accel_gpt2("cloud", "reap")[2]


def test_no_key_is_written_or_said(
    accel_gpt2: CommandLine,
    programs: Programs,
    cloud: LambdaCloud,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launching, asking and failing of each kind: keys are in no file, no output, no argument."""
    tokens = {"HF_TOKEN": "hf_planted0123456789", "AWS_SECRET_ACCESS_KEY": "planted/aws"}
    for name, value in tokens.items():
        monkeypatch.setenv(name, value)
    lambda_launch = ("cloud", "launch", "--provider=lambda", "--gpu=a100-40", "--budget=10")
    hf_launch = ("cloud", "launch", "--provider=hf-jobs", "--gpu=a100-80", "--bucket=me/b")
    commands = {
        (*lambda_launch, *TRAINING, "--dry-run"): 0,
        (*lambda_launch, *TRAINING, "--dry-run", "--json"): 0,
        (*lambda_launch, *TRAINING, "--yes", "--debug"): 0,
        (*hf_launch, "--budget=10", *TRAINING, "--dry-run"): 0,
        ("cloud", "status", "--json"): 0,
        ("cloud", "reap", "--yes"): 0,
        ("cloud", "cancel", "nothing", "--debug"): 2,
    }
    for argv, code in commands.items():
        ended, out, err = accel_gpt2(*argv)
        assert ended == code, (argv, err)
        for secret in (KEY, *tokens.values()):
            assert secret not in out + err, argv
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "package" not in path.parts]
    assert len(files) >= 4
    for path in files:
        text = path.read_bytes()
        for secret in (KEY, *tokens.values()):
            assert secret.encode() not in text, path


def test_a_damaged_record_is_named(accel_gpt2: CommandLine, home: Path) -> None:
    """What it was may still be running, so it is not passed over."""
    folder = home / "state" / "accel-gpt2" / "cloud" / "accel-gpt2-a-1a2b"
    folder.mkdir(parents=True)
    (folder / "launch.json").write_text('{"name": "accel-gpt2-a-1a2b"}')
    code, _, err = accel_gpt2("cloud", "status")
    assert code == 1
    assert "Look at the provider's page for a machine named accel-gpt2-a-1a2b" in err


def test_lambda_that_is_not_there_is_one_sentence(
    accel_gpt2: CommandLine, programs: Programs, cloud: LambdaCloud
) -> None:
    """A refused key stops a launch; nothing was started."""
    cloud.key = "another"
    lambda_launch = ("cloud", "launch", "--provider=lambda", "--gpu=a100-40", "--budget=10")
    code, _, err = accel_gpt2(*lambda_launch, *TRAINING, "--yes")
    assert code == 1
    assert "refuses the API key of LAMBDA_API_KEY" in err
    assert programs.calls == []


def test_the_stand_in_for_lambda_refuses_what_the_real_one_does(cloud: LambdaCloud) -> None:
    """An unknown key has no answer there either: what passes here has sent one."""
    import urllib.request

    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cloud.url}/api/v1/instances", timeout=20)
