"""Lambda's API: live price and capacity, and our machines listed and terminated."""

import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from accel_gpt2.catalog.engines import CLOUDS
from accel_gpt2.cloud.engine import Wish
from accel_gpt2.cloud.lambda_api import instances, terminate
from accel_gpt2.cloud.skypilot import SkyPilotEngine
from accel_gpt2.errors import UserError
from tests.cloud.conftest import KEY
from tests.cloud.lambda_server import LambdaCloud, lambda_cloud

WISH = Wish(
    cloud=CLOUDS["lambda"],
    gpu="a100-40",
    num_gpus=1,
    run_seconds=3600,
    spot=False,
    usd_per_hour=None,
    kept_seconds=900,
)


@pytest.fixture
def cloud(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LambdaCloud]:
    """A Lambda whose key is in SkyPilot's own place."""
    keys = home / ".lambda_cloud" / "lambda_keys"
    keys.parent.mkdir()
    keys.write_text(f"api_key = {KEY}\n")
    with lambda_cloud(KEY) as server:
        yield server


def _launch(cloud: LambdaCloud, name: str) -> str:
    """What SkyPilot asks Lambda for."""
    body = {
        "region_name": "us-west-1",
        "instance_type_name": "gpu_1x_a100_sxm4",
        "ssh_key_names": ["mine"],
        "name": name,
    }
    request = urllib.request.Request(
        f"{cloud.url}/api/v1/instance-operations/launch",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {KEY}"},
    )
    with urllib.request.urlopen(request, timeout=20) as response:
        return str(json.load(response)["data"]["instance_ids"][0])


def test_what_was_launched_is_terminated(cloud: LambdaCloud) -> None:
    """It is on the list until then, and not after; others stay."""
    ours, other = _launch(cloud, "accel-gpt2-a-1a2b-head"), _launch(cloud, "somebody's")
    found = instances(KEY, base_url=cloud.url)
    assert found == {ours: "accel-gpt2-a-1a2b-head", other: "somebody's"}
    terminate(KEY, [ours], base_url=cloud.url)
    assert instances(KEY, base_url=cloud.url) == {other: "somebody's"}


def test_what_is_gone_already_is_no_failure(cloud: LambdaCloud) -> None:
    """404 for one machine does not keep the others from being terminated."""
    ours = _launch(cloud, "accel-gpt2-a-1a2b-head")
    terminate(KEY, ["0" * 31 + "f", ours], base_url=cloud.url)
    assert cloud.machines[ours]["status"] == "terminating"
    assert [path for _, path in cloud.requests].count("instance-operations/terminate") == 2


def test_a_quote_has_the_price_of_now(cloud: LambdaCloud) -> None:
    """$1.89, where the list of some weeks ago has $1.99."""
    quote = SkyPilotEngine(lambda_url=cloud.url).quote(WISH)
    assert quote.usd_per_hour == 1.89
    assert quote.billed_seconds == 3600 + 600 + 900
    assert quote.usd_total == pytest.approx(1.89 * 5100 / 3600)
    assert quote.freshness == "fresh"


def test_no_capacity_is_said_before_anything_is_paid(cloud: LambdaCloud) -> None:
    """With what is free instead."""
    cloud.free = False
    with pytest.raises(UserError, match=r"no gpu_1x_a100_sxm4 free .* Free are gpu_1x_a10\."):
        SkyPilotEngine(lambda_url=cloud.url).quote(WISH)


def _list(cloud: LambdaCloud, pauses: list[float]) -> object:
    return instances(KEY, base_url=cloud.url, sleep=pauses.append, timeout_seconds=0.5)


def _end(cloud: LambdaCloud, pauses: list[float]) -> object:
    return terminate(KEY, ["a"], base_url=cloud.url, sleep=pauses.append, timeout_seconds=0.5)


@pytest.mark.parametrize("ask", [_list, _end])
@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ((401, b"{}"), "refuses the API key"),
        ((403, b'{"error": {"code": "global/account-inactive"}}'), "account-inactive"),
        ((500, b"<html>"), "answered 500"),
        ((200, b'{"data": ['), "something that is no JSON"),
        ((200, b'{"data": 7}'), "no list of instances|did not say that a is terminated"),
        ((200, b'{"data": [7]}'), "no list of instances|did not say that a is terminated"),
        ((200, b"[]"), "no list of instances|did not say that a is terminated"),
        ((0, None), r"did not answer within 0\.5 s"),
    ],
    ids=["401", "403", "500", "cut", "number", "numbers", "list", "hangs"],
)
def test_a_bad_answer_is_one_sentence(
    cloud: LambdaCloud,
    ask: Callable[[LambdaCloud, list[float]], object],
    answer: tuple[int, bytes | None],
    complaint: str,
) -> None:
    """For asking and for ending; it never takes long, and never shows the key."""
    cloud.bad_answers = [answer]
    started = time.monotonic()
    with pytest.raises(UserError, match=complaint) as failed:
        ask(cloud, [])
    assert KEY not in str(failed.value)
    assert time.monotonic() - started < 10


def test_a_wrong_key_is_refused(cloud: LambdaCloud) -> None:
    """By the API's code, with where to make another."""
    with pytest.raises(UserError, match=r"\(global/invalid-api-key\): make a new one"):
        instances("wrong", base_url=cloud.url)


def test_ending_is_tried_again_when_there_are_too_many_requests(cloud: LambdaCloud) -> None:
    """429 twice, with pauses that grow; then it is done."""
    ours = _launch(cloud, "accel-gpt2-a-1a2b-head")
    cloud.bad_answers = [(429, b"{}"), (429, b"{}")]
    pauses: list[float] = []
    terminate(KEY, [ours], base_url=cloud.url, sleep=pauses.append)
    assert pauses == [1, 4]
    assert cloud.machines[ours]["status"] == "terminating"
