"""Hugging Face Jobs: a stand-in for `hf`, and huggingface_hub's own client against a small hub."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from accel_gpt2.cloud.hf_jobs import HfJobsEngine
from accel_gpt2.cloud.ledger import Launch
from accel_gpt2.cloud.programs import Answer
from accel_gpt2.errors import UserError
from tests.render.test_cloud import HF

TOKEN = "hf_planted0123456789"


class Hub:
    """Its jobs, by id: name and stage; and what was cancelled."""

    def __init__(self) -> None:
        self.jobs: dict[str, tuple[str, str]] = {}
        self.cancelled: list[str] = []
        self.url = ""


def _job(id_: str, name: str, stage: str) -> dict[str, object]:
    """As /api/jobs/<user> lists it."""
    return {
        "id": id_,
        "createdAt": "2026-11-23T10:00:00.000Z",
        "dockerImage": "python:3.12",
        "command": ["bash"],
        "arguments": [],
        "environment": {},
        "secrets": {},
        "flavor": "a100-large",
        "labels": {"name": name},
        "status": {"stage": stage, "message": None},
        "owner": {"id": "1", "name": "me", "type": "user"},
    }


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that knows one user."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply()

        def do_POST(self) -> None:
            self._reply()

        def _reply(self) -> None:
            where = urlsplit(self.path)
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self._send(401, {"error": "Invalid credentials"})
            if where.path == "/api/whoami-v2":
                return self._send(200, {"name": "me", "type": "user"})
            if where.path == "/api/jobs/me":
                label = parse_qs(where.query).get("label", [""])[0]
                found = [
                    _job(id_, name, stage)
                    for id_, (name, stage) in hub.jobs.items()
                    if label in {"", f"name={name}"}
                ]
                return self._send(200, found)
            id_ = where.path.removeprefix("/api/jobs/me/").removesuffix("/cancel")
            hub.cancelled.append(id_)
            return self._send(200, {})

        def _send(self, status: int, document: object) -> None:
            text = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


LAUNCH = Launch(
    name=HF.name,
    engine="hf-jobs",
    provider="hf-jobs",
    gpu=HF.gpu,
    num_gpus=1,
    usd_per_hour=2.5,
    budget_usd=10.0,
    began="2026-11-23T10:00:00+00:00",
    deadline="2026-11-23T14:00:00+00:00",
    run_directory="/nowhere/runs/my imdb",
    bucket="me/runs",
    spot=False,
    state="submitting",
)


class Recorded:
    """Runs nothing: `hf jobs run` makes a job at the hub, and its log ends with it."""

    def __init__(self, hub: Hub, *, ends: str = "COMPLETED", submits: int = 0, syncs: int = 0):
        self.calls: list[tuple[str, ...]] = []
        self._hub, self._ends, self._submits, self._syncs = hub, ends, submits, syncs

    def __call__(self, argv: object, seconds: float, keep_stdout: bool) -> Answer:
        words = tuple(map(str, argv))  # type: ignore[call-overload]
        assert Path(words[0]).name == "hf"
        self.calls.append(words[1:3])
        if words[1:3] == ("jobs", "run"):
            self._hub.jobs["j1"] = (HF.name, "RUNNING")
            return Answer(exit_code=self._submits, stdout="")
        if words[1:3] == ("jobs", "logs"):
            assert words[3:] == ("--follow", "j1")
            self._hub.jobs["j1"] = (HF.name, self._ends)
        if words[1:3] == ("buckets", "sync"):
            assert words[3:] == ("hf://buckets/me/runs/my imdb", LAUNCH.run_directory)
            return Answer(exit_code=self._syncs, stdout="")
        return Answer(exit_code=0, stdout="")


@pytest.mark.parametrize(("ends", "code"), [("COMPLETED", 0), ("ERROR", None), ("CANCELED", None)])
def test_a_job_is_followed_to_its_end_and_fetched(hub: Hub, ends: str, code: int | None) -> None:
    """However it ends, what the bucket has comes here; its exit code is in there, or unknown."""
    run = Recorded(hub, ends=ends)
    assert HfJobsEngine(run=run, endpoint=hub.url).submit(HF, LAUNCH) == code
    assert run.calls == [("jobs", "run"), ("jobs", "logs"), ("buckets", "sync")]


@pytest.mark.parametrize(
    ("run", "complaint"),
    [
        ({"submits": 1}, r"`hf jobs run` failed \(1\); see above\. `hf auth login` if it is the"),
        ({"ends": "RUNNING"}, "The log of accel-gpt2-imdb-1a2b ended and the job goes on"),
        (
            {"syncs": 1},
            r"The results are in hf://buckets/me/runs/my imdb: .* cloud fetch accel-gpt2",
        ),
    ],
)
def test_what_goes_wrong_is_one_sentence(hub: Hub, run: dict[str, object], complaint: str) -> None:
    """With what to type next."""
    engine = HfJobsEngine(run=Recorded(hub, **run), endpoint=hub.url)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=complaint):
        engine.submit(HF, LAUNCH)


def test_only_our_running_job_is_cancelled(hub: Hub) -> None:
    """By its name, which the record has before the hub knows of it; what has ended is let be."""
    engine = HfJobsEngine(endpoint=hub.url)
    assert engine.status(LAUNCH) == "gone"
    engine.cancel(LAUNCH)  # a launch that died before it was submitted
    hub.jobs = {"j0": ("another", "RUNNING"), "j1": (HF.name, "RUNNING"), "j2": (HF.name, "ERROR")}
    assert engine.status(LAUNCH) == "running"
    engine.cancel(LAUNCH)
    assert hub.cancelled == ["j1"]


def test_a_hub_that_refuses_is_one_sentence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the token in it."""
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"The hub could not be asked: .* `hf auth whoami`") as told:
        HfJobsEngine(endpoint=hub.url).status(LAUNCH)
    assert "hf_wrong" not in str(told.value)
