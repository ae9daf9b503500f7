"""Refreshing prices: from servers that answer as the real ones do, and as they do on a bad day."""

import dataclasses
import datetime
import functools
import json
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from accel_gpt2.catalog.prices import GpuPrice, shipped_prices, write_prices
from accel_gpt2.cloud.lambda_api import find_key, instance_types
from accel_gpt2.cloud.price_sources import (
    SOURCES,
    Source,
    SourceNotSetUp,
    ask_gpuhunt,
    ask_hf_jobs,
    ask_lambda,
    find_rented_gpu,
)
from accel_gpt2.cloud.prices import current_prices, merged, prices_path, refresh_prices
from accel_gpt2.errors import UserError
from tests.cloud.price_servers import (
    Answer,
    flavor,
    gpuhunt_list,
    instance_type,
    lambda_answer,
    lambda_error,
    serving,
)

TODAY = datetime.date(2026, 11, 23)
KEY = "secret_lambda_0123456789.abcdef"


@pytest.fixture(autouse=True)
def _nobodys_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the person's keys or asks a real server."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


A100 = instance_type("gpu_1x_a100_sxm4", "A100 (40 GB SXM4)", 189, 1)
LAMBDA_TYPES = (
    A100,
    instance_type("gpu_8x_a100_80gb_sxm4", "A100 (80 GB SXM4)", 2232, 8),
    instance_type("gpu_1x_h100_pcie", "H100 (80 GB PCIe)", 329, 1),
    instance_type("gpu_1x_gh200", "GH200 (96 GB)", 229, 1),  # not in the catalog
    instance_type("gpu_8x_v100", "Tesla V100 (16 GB)", 632, 8),
    instance_type("cpu_4x_general", "N/A", 20, 0),
)


def facts(offers: tuple[GpuPrice, ...]) -> dict[str, tuple[object, ...]]:
    """What an offer says, by its name."""
    return {
        x.sku: (x.provider, x.gpu, x.form_factor, x.min_gpus, x.tier, x.usd_per_gpu_hour)
        for x in offers
    }


def test_lambda_says_what_it_sells() -> None:
    """Prices of machines become prices of a GPU; what the catalog does not know is left out."""
    with serving(lambda path, number: lambda_answer(*LAMBDA_TYPES)) as server:
        offers = ask_lambda(TODAY, base_url=server.url)
    assert facts(offers) == {
        "gpu_1x_a100_sxm4": ("lambda", "a100-40", "sxm", 1, "on-demand", 1.89),
        "gpu_8x_a100_80gb_sxm4": ("lambda", "a100-80", "sxm", 8, "on-demand", 2.79),
        "gpu_1x_h100_pcie": ("lambda", "h100-80-pcie", "pcie", 1, "on-demand", 3.29),
        "gpu_8x_v100": ("lambda", "v100", "sxm", 8, "on-demand", 0.79),
    }
    assert {x.as_of for x in offers} == {TODAY}
    ((path, headers),) = server.requests
    assert path == "/api/v1/instance-types"
    assert headers["authorization"] == f"Bearer {KEY}"


def test_a_refused_request_is_repeated_after_a_pause() -> None:
    """429: as long as the answer asks, at least longer each time; then the list."""
    pauses: list[float] = []

    def answer(path: str, number: int) -> Answer:
        if number < 2:
            asked = {"Retry-After": "7"} if number == 0 else {}
            return lambda_error(429, "global/rate-limited", asked)
        return lambda_answer(A100)

    with serving(answer) as server:
        found = instance_types(KEY, base_url=server.url, sleep=pauses.append)
    assert list(found) == ["gpu_1x_a100_sxm4"]
    assert pauses == [7, 4]


def test_a_request_is_not_repeated_for_ever() -> None:
    """After four refusals the sentence says so; an absurd pause is not waited for."""
    pauses: list[float] = []
    refusal = lambda_error(429, "global/rate-limited", {"Retry-After": "86400"})
    with (
        serving(lambda path, number: refusal) as server,
        pytest.raises(UserError, match=r"127.0.0.1:\d+ refuses more requests for now \(429\)"),
    ):
        instance_types(KEY, base_url=server.url, sleep=pauses.append)
    assert pauses == [60, 60, 60]
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (
            lambda_error(401, "global/invalid-api-key"),
            r"refuses the API key of LAMBDA_API_KEY or .* \(global/invalid-api-key\): make a new",
        ),
        (lambda_error(403, "global/account-inactive"), r"\(global/account-inactive\)"),
        (lambda_error(500, "global/internal-error"), r"answered 500 \(global/internal-error\)"),
        (Answer(body=b"<html>", status=502), r"answered 502 \(Bad Gateway\): try again later"),
        (Answer(body=b'{"data": {"a": '), "answered something that is no JSON"),
        (Answer(body=b"\xff\xfe"), "answered something that is no JSON"),
        (Answer(body=b'{"error": 1}'), "something that is no list of instance types"),
        (Answer(body=b'{"data": {"a": 1}}'), "something that is no list of instance types"),
        (Answer(body=b"[]"), "something that is no list of instance types"),
        (Answer(body=b'{"data": {"a": {}}}'), "lambda could not be asked: KeyError"),
        (Answer(status=302, headers={"Location": "http://localhost:1/"}), r"answered 302"),
        (Answer(body=b" " * 10_000_001), "answered something that is no JSON"),
    ],
)
def test_a_bad_answer_is_one_sentence(answer: Answer, complaint: str) -> None:
    """Whatever Lambda answers, the person reads a sentence, and never the key."""
    with serving(lambda path, number: answer) as server, pytest.raises(UserError) as caught:
        ask_lambda(TODAY, base_url=server.url)
    text = str(caught.value)
    with pytest.raises(UserError, match=complaint):
        raise caught.value
    assert KEY not in text
    assert text.endswith(".")
    assert len(server.requests) == 1  # nowhere else, with the key, either


@pytest.mark.parametrize(
    "answer", [Answer(silent=True), Answer(body=b'{"data": {}}' + b" " * 400, trickle=True)]
)
def test_a_hung_connection_is_given_up(answer: Answer) -> None:
    """Neither silence nor an answer that trickles in is waited for longer than was said."""
    start = time.monotonic()
    with (
        serving(lambda path, number: answer) as server,
        pytest.raises(UserError, match=r"did not answer within 0.5 s"),
    ):
        ask_lambda(TODAY, base_url=server.url, timeout_seconds=0.5)
    assert time.monotonic() - start < 5


def test_nobody_there() -> None:
    """A port where nobody listens: the host and the reason, without a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(UserError, match=rf"127.0.0.1:{port} cannot be reached: .*refused"):
        ask_lambda(TODAY, base_url=f"http://127.0.0.1:{port}")


def test_the_key_is_found_where_skypilot_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The variable first, then SkyPilot's file; without either Lambda is not asked."""
    assert find_key() == KEY
    monkeypatch.delenv("LAMBDA_API_KEY")
    assert find_key() is None
    with pytest.raises(SourceNotSetUp, match=r"LAMBDA_API_KEY or ~/.lambda_cloud/lambda_keys"):
        ask_lambda(TODAY)
    keys = tmp_path / ".lambda_cloud" / "lambda_keys"
    keys.parent.mkdir()
    keys.write_text("ssh_key_name = me\napi_key = from-the-file\n", encoding="utf-8")
    assert find_key() == "from-the-file"


@pytest.mark.parametrize("key", ["two words", "line\nfeed", "caf\u00e9", "\x1b[31m"])
def test_what_is_no_key_is_not_sent_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """A header with it would fail in a library whose error quotes it."""
    monkeypatch.setenv("LAMBDA_API_KEY", key)
    with pytest.raises(UserError, match="variable LAMBDA_API_KEY holds no API key") as caught:
        ask_lambda(TODAY, base_url="http://127.0.0.1:1")
    assert key not in str(caught.value)


def test_a_key_file_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file is named, so that one knows which to mend."""
    monkeypatch.delenv("LAMBDA_API_KEY")
    keys = tmp_path / ".lambda_cloud" / "lambda_keys"
    keys.parent.mkdir()
    keys.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(UserError, match="lambda_keys holds no API key"):
        find_key()


FLAVORS = [
    flavor("t4-small", "T4", "16 GB", 0.4 / 60),
    flavor("t4-medium", "T4", "16 GB", 0.6 / 60),
    flavor("a100-large", "A100", "80 GB", 2.5 / 60),
    flavor("a100x4", "A100", "320 GB", 10 / 60, "4"),
    flavor("l40sx1", "L40S", "48 GB", 1.8 / 60),
    {
        "name": "cpu-basic",
        "prettyName": "CPU",
        "cpu": "2 vCPU",
        "ram": "16 GB",
        "accelerator": None,
        "unitCostMicroUSD": 167,
        "unitCostUSD": 0.000167,
        "unitLabel": "minute",
    },
]


def test_hugging_face_says_what_jobs_cost() -> None:
    """By the real huggingface_hub: per minute becomes per hour, the cheaper T4 counts."""
    body = json.dumps(FLAVORS).encode()
    with serving(lambda path, number: Answer(body=body)) as server:
        offers = ask_hf_jobs(TODAY, endpoint=server.url)
    assert server.requests[0][0] == "/api/jobs/hardware"
    assert facts(offers) == {
        "t4-small": ("hf-jobs", "t4", "pcie", 1, "on-demand", 0.4),
        "a100-large": ("hf-jobs", "a100-80", "sxm", 1, "on-demand", 2.5),
        "a100x4": ("hf-jobs", "a100-80", "sxm", 4, "on-demand", 2.5),
    }


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (Answer(body=b"not JSON"), "hf-jobs could not be asked: JSONDecodeError"),
        (Answer(body=b'[{"name": "t4"}]'), "hf-jobs could not be asked: KeyError"),
        (Answer(body=b"{}", status=500), "hf-jobs could not be asked: HfHubHTTPError"),
    ],
)
def test_the_hub_on_a_bad_day(answer: Answer, complaint: str) -> None:
    """A changed or broken answer is a sentence too."""
    with (
        serving(lambda path, number: answer) as server,
        pytest.raises(UserError, match=complaint),
    ):
        ask_hf_jobs(TODAY, endpoint=server.url)


def item(provider: str, name: str, gpu: str, gb: float, price: float, where: str, **rest: object):
    """One line of a list of gpuhunt's."""
    return {
        "provider": provider,
        "instance_name": name,
        "gpu_name": gpu,
        "gpu_memory": gb,
        "price": price,
        "location": where,
        **rest,
    }


GPUHUNT = [
    item("aws", "p4d.24xlarge", "A100", 40.0, 21.9576, "us-east-1", gpu_count=8),
    item("aws", "p4d.24xlarge", "A100", 40.0, 9.0, "eu-north-1", gpu_count=8),  # elsewhere
    item("azure", "Standard_NC24ads_A100_v4", "A100", 80.0, 3.673, "eastus"),
    item("azure", "Standard_NC6s_v3", "V100", 16.0, 3.06, "eastus"),  # on PCIe: no row
    item("gcp", "a2-highgpu-1g", "A100", 40.0, 3.67, "us-central1-a"),
    item("gcp", "a2-highgpu-1g", "A100", 40.0, 1.29, "us-central1-b", spot=True),
    item("gcp", "a2-highgpu-2g", "A100", 40.0, 7.34, "us-central1-a", gpu_count=2),
    item("gcp", "a3-highgpu-1g", "H100", 80.0, 700.0, "us-central1-a"),  # "ask us"
    item("gcp", "g2-standard-4", "L4", 24.0, 0.7, "us-central1-a"),
    item("gcp", "g2-standard-4", "L4", 24.0, 0.9, "us-central1-c", spot=True),  # above on-demand
    item("runpod", "NVIDIA A100 80GB PCIe", "A100", 80.0, 1.19, "DE"),
    item("runpod", "NVIDIA A100 80GB PCIe", "A100", 80.0, 1.79, "US-TX-3"),
    item("runpod", "NVIDIA GeForce RTX 4090", "RTX4090", 24.0, 0.0, "DE"),  # "no offer"
    item("verda", "1A100.22V", "A100", 80.0, 1.29, "FIN-01"),
    item("verda", "1B200.30V", "B200", 180.0, 3.99, "FIN-01"),  # not in the catalog
]


def serve_gpuhunt(files: dict[str, bytes]) -> Callable[[str, int], Answer]:
    """dstack's bucket, with these files."""
    return lambda path, number: Answer(body=files[path]) if path in files else Answer(status=404)


def test_gpuhunt_lists_what_others_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real gpuhunt: home regions, smallest machines, spot beside on-demand, no sentinels."""
    pytest.importorskip("gpuhunt")
    with serving(serve_gpuhunt(gpuhunt_list(GPUHUNT))) as server:
        monkeypatch.setenv("GPUHUNT_CATALOG_URL", server.url)
        offers = ask_gpuhunt(TODAY)
    found = {(x.provider, x.gpu, x.tier): x for x in offers}
    assert {
        key: (x.min_gpus, x.usd_per_gpu_hour, x.spot_usd_per_gpu_hour) for key, x in found.items()
    } == {
        ("aws", "a100-40", "on-demand"): (8, 2.7447, None),
        ("azure", "a100-80-pcie", "on-demand"): (1, 3.673, None),
        ("gcp", "a100-40", "on-demand"): (1, 3.67, 1.29),
        ("gcp", "l4", "on-demand"): (1, 0.7, None),
        ("runpod", "a100-80-pcie", "community"): (1, 1.19, None),
        ("runpod", "a100-80-pcie", "secure"): (1, 1.79, None),
        ("verda", "a100-80", "on-demand"): (1, 1.29, None),
    }


def test_gpuhunt_without_one_of_its_lists(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A provider whose list is not there is named; nothing is printed, no setting is left."""
    pytest.importorskip("gpuhunt")
    some = [row for row in GPUHUNT if row["provider"] != "azure"]
    with serving(serve_gpuhunt(gpuhunt_list(some))) as server:
        monkeypatch.setenv("GPUHUNT_CATALOG_URL", server.url)
        with pytest.raises(UserError, match="gpuhunt could not fetch the prices of azure"):
            ask_gpuhunt(TODAY)
    assert capfd.readouterr().err == ""
    assert socket.getdefaulttimeout() is None
    assert logging.getLogger("gpuhunt").level == logging.NOTSET


def test_a_gpu_is_told_from_its_variants() -> None:
    """SXM, PCIe or unknown where there are both; what is only alike is no GPU of the catalog."""
    assert find_rented_gpu("NVIDIA A100 80GB PCIe", 80) is None  # more than a model's name
    assert find_rented_gpu("A100", 80, hint="NVIDIA A100 80GB PCIe") == ("a100-80-pcie", "pcie")
    assert find_rented_gpu("RTX4070TiSUPER", 16) == ("rtx4070ti", "pcie")
    assert find_rented_gpu("H100NVL", 94) is None
    assert find_rented_gpu("A100", 41) is None


def made(**changes: object) -> GpuPrice:
    """Lambda's A100, changed."""
    (shipped,) = (x for x in shipped_prices().offers if x.sku == "gpu_1x_a100_sxm4")
    return dataclasses.replace(shipped, as_of=TODAY, **changes)


def giving(*offers: GpuPrice) -> Source:
    """A source with these offers."""
    return lambda today: offers


def failing(today: datetime.date) -> tuple[GpuPrice, ...]:
    """A source that cannot be reached."""
    raise UserError("other cannot be reached: no network.")


def not_set_up(today: datetime.date) -> tuple[GpuPrice, ...]:
    """A source without its key."""
    raise SourceNotSetUp("other needs a key.")


def price_now() -> float | None:
    """What Lambda's A100 costs, as `cost` would read it."""
    (found,) = (x for x in current_prices().offers if x.sku == "gpu_1x_a100_sxm4")
    return found.usd_per_gpu_hour


def test_a_refresh_is_kept_and_read() -> None:
    """The newer price is there afterwards, with all others as they were."""
    assert price_now() == 1.99
    done = refresh_prices(
        {"lambda": giving(made(usd_per_gpu_hour=1.89)), "b": not_set_up}, today=TODAY
    )
    assert price_now() == 1.89
    assert dict(done.num_offers) == {"lambda": 1}
    assert done.not_set_up == ("other needs a key.",)
    assert len(current_prices().offers) == len(shipped_prices().offers)
    assert [path.name for path in done.path.parent.iterdir()] == ["prices.csv"]


def test_all_of_it_or_nothing() -> None:
    """One failing source: the copy stays byte for byte as it was."""
    refresh_prices({"lambda": giving(made(usd_per_gpu_hour=1.89))}, today=TODAY)
    before = prices_path().read_bytes()
    with pytest.raises(UserError, match=r"other cannot be reached.*\nNo price was refreshed"):
        refresh_prices({"a": giving(made(usd_per_gpu_hour=1.79)), "b": failing}, today=TODAY)
    assert prices_path().read_bytes() == before
    with pytest.raises(UserError, match=r"other needs a key.\nNo price was refreshed"):
        refresh_prices({"b": not_set_up}, today=TODAY)
    with pytest.raises(UserError, match=r"other cannot be reached.*\nother needs a key.\nNo price"):
        refresh_prices({"b": not_set_up, "c": failing}, today=TODAY)
    with pytest.raises(UserError, match="and has no price of a GPU that the catalog knows"):
        refresh_prices({"a": giving()}, today=TODAY)
    with pytest.raises(UserError, match=r"\$700 an hour is no price of a GPU"):
        refresh_prices({"a": giving(made(usd_per_gpu_hour=700.0))}, today=TODAY, accept_jumps=True)
    assert prices_path().read_bytes() == before


@pytest.mark.parametrize("usd", [1.99 * 1.51, 1.99 * 0.49])
def test_a_jump_needs_a_yes(usd: float) -> None:
    """Over half more or less is refused with both prices, and taken when it is accepted."""
    sources = {"lambda": giving(made(usd_per_gpu_hour=usd))}
    with pytest.raises(UserError, match=r"lambda gpu_1x_a100_sxm4: .*and \$1.99 before") as caught:
        refresh_prices(sources, today=TODAY)
    assert "--accept" in str(caught.value)
    assert not prices_path().exists()
    refresh_prices(sources, today=TODAY, accept_jumps=True)
    assert price_now() == usd


def test_just_half_is_no_jump() -> None:
    """1.99 to 2.98 is 49.7% more, and goes through."""
    refresh_prices({"lambda": giving(made(usd_per_gpu_hour=2.98))}, today=TODAY)
    assert price_now() == 2.98


def test_a_source_that_hangs_is_given_up() -> None:
    """Whatever a library does, the refresh ends in time, and keeps what was there."""
    hung = functools.partial(time.sleep, 30)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"lambda did not answer within 0.2 s"):
        refresh_prices({"lambda": lambda today: hung()}, today=TODAY, patience_seconds=0.2)  # type: ignore[dict-item]
    assert time.monotonic() - start < 5
    assert not prices_path().exists()


def test_a_damaged_copy_is_named_and_mended() -> None:
    """Reading says which file; a refresh starts from the package's prices."""
    prices_path().parent.mkdir()
    prices_path().write_text("half a fi", encoding="utf-8")
    with pytest.raises(UserError, match=r"prices.csv is no price list"):
        current_prices()
    refresh_prices({"lambda": giving(made(usd_per_gpu_hour=1.89))}, today=TODAY)
    assert price_now() == 1.89


def test_a_new_version_of_the_package_is_not_hidden_by_an_old_copy() -> None:
    """Of two prices of one offer the newer counts, wherever it is."""
    old = made(usd_per_gpu_hour=1.5)
    prices_path().parent.mkdir()
    prices_path().write_text(
        write_prices([dataclasses.replace(old, as_of=datetime.date(2026, 1, 1))]), encoding="utf-8"
    )
    assert price_now() == 1.99
    again = dataclasses.replace(old, usd_per_gpu_hour=1.6)
    assert merged([old], [again]) == (again,)


def test_what_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that is a file: a sentence with its path."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"prices.csv could not be written|cannot be read"):
        refresh_prices({"lambda": giving(made(usd_per_gpu_hour=1.89))}, today=TODAY)


def test_sources_are_asked_in_an_order() -> None:
    """What providers say themselves goes over what somebody else collected."""
    assert list(SOURCES) == ["gpuhunt", "lambda", "hf-jobs"]
