"""`cost`: what is printed and how wide, where the hours come from, and that no key is shown."""

import datetime
import functools
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from accel_gpt2.catalog.models import MODELS
from accel_gpt2.cloud import price_sources
from accel_gpt2.cloud.price_sources import ask_lambda
from tests.cli.conftest import CommandLine
from tests.cloud.price_servers import Answer, instance_type, lambda_answer, serving

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "cost.md"
THREE_HOURS = ("cost", "--gpu", "a100-40", "--hours", "3")
XL = ("cost", "--model", "gpt2-xl", "--dataset", "imdb", "--epochs", "3")


@pytest.fixture(autouse=True)
def _a_day(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Prices are so old as on this day, and nobody has refreshed them."""
    monkeypatch.setattr("accel_gpt2.cli.cost._today", lambda: datetime.date(2026, 11, 23))
    monkeypatch.setenv("ACCEL_GPT2_CACHE", str(tmp_path / "cache"))


def document(accel_gpt2: CommandLine, *arguments: str) -> dict[str, Any]:
    """The answer of `--json`, which the documented schema allows."""
    ended = accel_gpt2(*arguments, "--json")
    assert ended.returncode == 0, ended.stderr
    content: dict[str, Any] = json.loads(ended.stdout)
    (block,) = re.findall(
        r"```json\n(.*?)```", DOCUMENTATION.read_text(encoding="utf-8"), re.DOTALL
    )
    jsonschema.validate(
        content, json.loads(block), format_checker=jsonschema.FormatChecker(formats=["date"])
    )
    return content


@pytest.mark.parametrize("arguments", [THREE_HOURS, (*XL, "--profile", "a100-40")])
def test_it_answers_at_once_and_without_torch(arguments: tuple[str, ...], tmp_path: Path) -> None:
    """A fresh process loads no torch, nothing that speaks HTTP, and takes well under a second."""
    code = (
        "import sys\n"
        "from accel_gpt2.cli.app import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'gpuhunt', 'http.client'}\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.stderr.splitlines()[-1] == "[]"
    assert "lambda" in ended.stdout
    # CPU seconds, since another test may have the cores; under half of one on a desktop.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


@pytest.mark.parametrize("columns", ["80", "120", "200"])
def test_offers_are_shown_with_their_date_and_source(accel_gpt2: CommandLine, columns: str) -> None:
    """Cheapest first, each with hours, total, spot total and a marked date; sources below."""
    ended = accel_gpt2(*THREE_HOURS, COLUMNS=columns)
    assert ended.returncode == 0
    text = ended.stdout
    found = re.findall(
        r"^([\w-]+) +(pcie|sxm|\?) +([\d.]+) +([\d.]+) +\$([\d.]+) +(?:\$([\d.]+) +)?(\S+) *$",
        text.split("Not sold")[0],
        re.MULTILINE,
    )
    assert found == [
        ("vast-ai", "pcie", "0.67", "3.17", "2.12", "", "2026-05-24!"),
        ("verda", "sxm", "0.72", "3.17", "2.28", "0.79", "2026-05-24!"),
        ("jarvis-labs", "?", "0.89", "3.17", "2.82", "1.23", "2026-05-24!"),
        ("lambda", "sxm", "1.99", "3.17", "6.30", "", "2026-09-25~"),
        ("modal", "?", "2.10", "3.17", "6.65", "", "2026-05-24!"),
        ("gcp", "sxm", "3.67", "3.17", "11.63", "4.10", "2025-03-06!"),
        ("colab-pro-plus", "?", "1.18", "42.48", "50.00", "", "2024-04-01!"),
    ]
    assert "gcp: Cyclenerd pricing.yml @0166a59e us-central1" in text
    assert "Rent from Lambda: $6.30" in text
    assert max(map(len, text.splitlines())) <= int(columns)
    assert "\x1b" not in text  # plain where stdout is no terminal


def test_eight_gpus_never_answer_for_one(accel_gpt2: CommandLine) -> None:
    """AWS and Azure are apart, with the price of all eight; Lambda, which sells one, is not."""
    text = accel_gpt2(*THREE_HOURS).stdout.split("Not sold one by one")[1]
    assert re.search(r"^aws +8 x +sxm +21\.96 +3\.17 +\$69\.53 ", text, re.MULTILINE)
    plan = document(accel_gpt2, *THREE_HOURS)
    assert {x["num_gpus"] for x in plan["quotes"]} == {1}
    assert {(x["provider"], x["num_gpus"]) for x in plan["larger"]} == {("aws", 8), ("azure", 8)}
    eight = document(accel_gpt2, *THREE_HOURS, "--num-gpus", "8")
    assert {"aws", "azure", "lambda"} <= {x["provider"] for x in eight["quotes"]}
    assert {x["num_gpus"] for x in eight["quotes"]} == {8}
    assert [x["sku"] for x in eight["quotes"] if x["provider"] == "lambda"] == ["gpu_8x_a100"]
    assert "colab-pro-plus" not in {x["provider"] for x in eight["quotes"]}


def test_json_has_what_the_documentation_says(accel_gpt2: CommandLine) -> None:
    """The schema, and Lambda's quote by hand: 190 minutes at $1.99 an hour."""
    found = document(accel_gpt2, *THREE_HOURS)
    (quote,) = (x for x in found["quotes"] if x["provider"] == "lambda")
    assert quote["usd_total"] == pytest.approx(190 / 60 * 1.99)
    assert quote["usd_per_hour"] == 1.99
    assert quote["as_of"] == "2026-09-25"
    assert "skypilot-catalog" in quote["source"]
    assert found["date"] == "2026-11-23"
    assert found["local"] is None


def test_one_provider_spot_and_the_original_prices(accel_gpt2: CommandLine) -> None:
    """--provider leaves the others out; --spot totals are spot; seed-2025 has Lambda at 1.10."""
    one = document(accel_gpt2, *THREE_HOURS, "--provider", "gcp")
    assert [x["provider"] for x in one["quotes"]] == ["gcp"]
    spot = document(accel_gpt2, *THREE_HOURS, "--spot")
    assert [x["provider"] for x in spot["quotes"]] == ["verda", "jarvis-labs", "gcp"]
    assert all(x["usd_total"] == x["spot_usd_total"] for x in spot["quotes"])
    seed = document(accel_gpt2, *THREE_HOURS, "--prices", "seed-2025")
    assert seed["quotes"][0]["usd_per_hour"] == 1.10
    assert len(seed["quotes"]) == 8


def test_what_is_sold_as_spot_only_is_named(accel_gpt2: CommandLine) -> None:
    """Salad has no on-demand price: without --spot it is no offer, and is not forgotten."""
    text = accel_gpt2("cost", "--gpu", "rtx3090", "--hours", "3").stdout
    assert "At spot prices only, which --spot shows: salad." in text
    assert not re.search(r"^salad +0", text, re.MULTILINE)


def test_the_hours_are_those_of_the_plan(accel_gpt2: CommandLine) -> None:
    """`cost` and `plan` say the same time; disk and download are of both classes' models."""
    found = document(accel_gpt2, *XL, "--profile", "a100-40", "--local", "rtx4070ti")
    planned = json.loads(accel_gpt2("plan", *XL[1:], "--profile", "a100-40", "--json").stdout)
    (rental,) = (x for x in found["rentals"] if x["gpu"] == "a100-40")
    assert 0 <= rental["run_seconds"] - planned["time"]["seconds"] < 1
    assert rental["recipe"] == planned["label"]
    assert rental["download_bytes"] == 2 * 4 * MODELS["gpt2-xl"].num_parameters
    assert rental["disk_bytes"] > rental["download_bytes"]
    (google,) = (x for x in found["quotes"] if x["provider"] == "gcp")
    assert google["usd_egress"] == pytest.approx(rental["download_bytes"] / 1e9 * 0.12)


def test_the_own_card_is_beside_the_clouds(accel_gpt2: CommandLine) -> None:
    """Time as planned for it, electricity at the options' price, and a line that recommends."""
    options = ("--host-watts", "115", "--usd-per-kwh", "0.36")
    found = document(accel_gpt2, *XL, "--profile", "a100-40", "--local", "rtx4070ti", *options)
    planned = json.loads(accel_gpt2("plan", *XL[1:], "--profile", "rtx4070ti", "--json").stdout)
    local = found["local"]
    assert 0 <= local["run_seconds"] - planned["time"]["seconds"] < 1
    assert local["usd_total"] == pytest.approx(local["run_seconds"] / 3600 * 0.4 / 0.9 * 0.36)
    assert found["recommendation"].startswith("Train here, on the RTX 4070 Ti SUPER 16 GB: $0.")
    text = accel_gpt2(*XL, "--profile", "a100-40", "--local", "rtx4070ti").stdout
    assert "Here, on the RTX 4070 Ti SUPER 16 GB:" in text
    assert "each hour that renting" in text.replace("\n", " ")


def test_all_rented_gpus_are_compared(accel_gpt2: CommandLine) -> None:
    """Without --gpu each GPU has its own time, and the table is short."""
    found = document(accel_gpt2, *XL)
    times = {x["gpu"]: x["run_seconds"] for x in found["rentals"]}
    assert {"rtx4090", "a100-40", "h100-80", "t4"} <= set(times)
    assert times["h100-80"] < times["a100-40"] < times["t4"]
    assert all(x["run_seconds"] == times[x["gpu"]] for x in found["quotes"])
    text = accel_gpt2(*XL).stdout
    assert "dearer ones: --json has them all." in text
    assert "LoRA, fp16, AdamW: t4" in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_fits_on_no_rented_gpu_is_said(accel_gpt2: CommandLine) -> None:
    """Exit code 3, with what would fit."""
    ended = accel_gpt2(*XL, "--finetuning", "full", "--mixed-precision", "no", "--gpu", "t4")
    assert ended.returncode == 3
    assert "gpt2-xl does not fit on T4 16 GB as asked" in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ("--gpu a100-4 --hours 3", 2, "no GPU 'a100-4'. Did you mean 'a100-40'?"),
        ("--gpu l4 --hours 3 --provider lamda", 2, "no provider 'lamda'. Did you mean 'lambda'?"),
        ("--gpu rtx3090 --hours 3 --provider lambda", 1, "give --provider vast-ai or novita."),
        ("--gpu rtx4070ti --hours 3", 1, "it is rented at spot prices, which --spot shows."),
        ("--gpu v100-32 --hours 3", 1, "No price of anybody is known for v100-32"),
        ("--gpu l4", 2, "How long does it train? Give --hours"),
        ("", 2, "How long does it train? Give --hours"),
        ("--hours 3", 2, "--hours of which GPU? Give --gpu"),
        ("--gpu l4 --hours 0", 2, "--hours 0.0 is no time to rent for"),
        ("--gpu l4 --hours nan", 2, "--hours nan is no time to rent for"),
        ("--gpu l4 --hours 1e9", 2, "is no time to rent for"),
        ("--gpu l4 --hours 3 --num-gpus 0", 2, "--num-gpus"),
        ("--gpu l4 --profile l4 --hours 3", 2, "--gpu and --profile both name what to rent"),
        ("--profile cpu --hours 3", 2, "--profile cpu is no machine that can be rented."),
        ("--profile a100_40 --hours 3", 2, "Did you mean 'a100-40'?"),
        ("--gpu l4 --hours 3 --local rtx4090", 2, "--local compares a training by plan"),
        ("--gpu l4 --dataset nobody/knows", 2, "nobody/knows has been read: give --gpu and"),
        (
            "--gpu t4 --model gpt2 --mixed-precision pure_bf16",
            2,
            "How fast t4 computes pure_bf16 is not known: give --hours.",
        ),
        ("--gpu l4 --model some/model", 2, "The shape of this model is not known here"),
        ("--gpu l4 breakeven --gpu l4", 2, "Options of `breakeven` are given after its name."),
        ("breakeven --gpu l4", 2, "What does the l4 cost? Give --price-usd"),
        ("breakeven --gpu v100-32 --price-usd 1", 1, "No price of anybody is known for v100-32"),
        ("refresh --source lamda", 2, "no such source. Did you mean 'lambda'?"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    accel_gpt2: CommandLine, arguments: str, code: int, sentence: str
) -> None:
    """What was seen, what was needed, what to type; nothing on stdout."""
    ended = accel_gpt2("cost", *arguments.split())
    assert sentence in ended.stderr
    assert ended.returncode == code
    assert ended.stdout == ""


def test_given_hours_are_not_planned(accel_gpt2: CommandLine) -> None:
    """What then does not count is said."""
    ended = accel_gpt2(*THREE_HOURS, "--model", "gpt2-xl")
    assert ended.returncode == 0
    assert "nothing is planned and --model does not count" in ended.stderr


def test_break_even(accel_gpt2: CommandLine) -> None:
    """$9,000 against $1.99 an hour, less the electricity of a PCIe card; never is null."""
    buy = ("cost", "breakeven", "--gpu", "a100-40", "--price-usd", "9000")
    found = json.loads(accel_gpt2(*buy, "--json").stdout)
    (quote,) = (x for x in found["against"] if x["provider"] == "lambda")
    hours = 9000 / (1.99 - 0.37 / 0.9 * 0.18)
    assert quote["hours"] == pytest.approx(hours)
    assert quote["hours_after_resale"] == pytest.approx(hours / 2)
    assert quote["months"] == pytest.approx(hours / (365 / 12 * 8))
    assert "aws" not in {x["provider"] for x in found["against"]}
    text = accel_gpt2(*buy).stdout
    assert re.search(r"^lambda +sxm +1\.99 +4,697 h, 19 mo +2,349 h, 10 mo +2026", text, re.M)
    assert max(map(len, text.splitlines())) <= 80
    dear = json.loads(accel_gpt2(*buy, "--usd-per-kwh", "5", "--json").stdout)
    assert {x["hours"] for x in dear["against"] if x["usd_per_hour"] < 2} == {None}
    assert "never" in accel_gpt2(*buy, "--usd-per-kwh", "5").stdout


def test_the_original_prices_of_cards_are_the_default(accel_gpt2: CommandLine) -> None:
    """The middle of the range, which is said with where it comes from."""
    ended = accel_gpt2("cost", "breakeven", "--gpu", "h100-80")
    assert ended.returncode == 0
    assert "the middle of $30,000 to $40,000 for a new one" in ended.stderr
    assert "H100 PCIe 80 GB for $35,000" in ended.stdout


KEY = "secret_lambda_0123456789.abcdef"


def test_a_refreshed_price_is_used(
    accel_gpt2: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From a server to the next quote, with today's date, and the key is nowhere."""
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    listed = lambda_answer(instance_type("gpu_1x_a100_sxm4", "A100 (40 GB SXM4)", 189, 1))
    with serving(lambda path, number: listed) as server:
        source = functools.partial(ask_lambda, base_url=server.url)
        monkeypatch.setattr(price_sources, "SOURCES", {"lambda": source})
        ended = accel_gpt2("cost", "refresh", "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["num_offers"] == {"lambda": 1}
    quote = document(accel_gpt2, *THREE_HOURS, "--provider", "lambda")["quotes"][0]
    assert (quote["usd_per_hour"], quote["as_of"]) == (1.89, "2026-11-23")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written == [tmp_path / "cache" / "prices.csv"]
    assert KEY not in written[0].read_text(encoding="utf-8") + ended.stdout + ended.stderr


def test_a_refresh_that_fails_says_so(
    accel_gpt2: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A refused key: a sentence without it, exit code 1, nothing written, the old price stays."""
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    with serving(lambda path, number: Answer(status=401, body=b"{}")) as server:
        source = functools.partial(ask_lambda, base_url=server.url)
        monkeypatch.setattr(price_sources, "SOURCES", {"lambda": source})
        ended = accel_gpt2("cost", "refresh")
    assert ended.returncode == 1
    assert "refuses the API key of LAMBDA_API_KEY" in ended.stderr
    assert "No price was refreshed; what was known stays." in ended.stderr
    assert KEY not in ended.stdout + ended.stderr
    assert not (tmp_path / "cache").exists()
    quote = document(accel_gpt2, *THREE_HOURS, "--provider", "lambda")["quotes"][0]
    assert quote["usd_per_hour"] == 1.99


def test_a_damaged_copy_does_not_stop_anybody(accel_gpt2: CommandLine, tmp_path: Path) -> None:
    """The package's prices are used, with a warning that names the file."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "prices.csv").write_bytes(b"\xff\xfe\x00")
    ended = accel_gpt2(*THREE_HOURS)
    assert ended.returncode == 0
    assert "prices.csv cannot be read" in ended.stderr
    assert "lambda" in ended.stdout
