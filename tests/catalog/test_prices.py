"""Price rows: dated, sourced, of GPUs and providers that exist, and without placeholders."""

import csv
import dataclasses
import datetime
import re
from pathlib import Path

import pytest

import accel_gpt2.catalog.prices as prices_module
from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.catalog.prices import (
    PRICE_SETS,
    PURCHASE_PRICES,
    GpuPrice,
    PriceSetName,
    gpu_variants,
    read_prices,
    shipped_prices,
    write_prices,
)
from accel_gpt2.catalog.providers import PROVIDERS
from accel_gpt2.errors import UsageError, UserError

FILES = {
    path.name: path for path in Path(prices_module.__file__).parent.glob("prices*.csv")
}  # as installed


def by_provider(name: PriceSetName, gpu: str, *, min_gpus: int = 1) -> dict[str, GpuPrice]:
    """The offers of a GPU; of a provider with several tiers one per tier."""
    return {
        x.provider if x.tier in {"on-demand", "subscription"} else f"{x.provider} {x.tier}": x
        for x in shipped_prices(name).prices
        if x.gpu == gpu and x.min_gpus == min_gpus
    }


@pytest.mark.parametrize(("name", "num_rows"), [("prices.csv", 63), ("prices_seed_2025.csv", 8)])
def test_every_row_has_what_the_schema_asks_for(name: str, num_rows: int) -> None:
    """Read as plain CSV: known names, a price of a GPU, a date, a source, and how it is billed."""
    with FILES[name].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == num_rows
    for row in rows:
        found = [
            float(row[x]) for x in ("usd_per_gpu_hour", "spot_usd_per_gpu_hour") if row[x] != ""
        ]
        assert found, row
        assert all(0.02 <= price <= 25 for price in found), row
        assert found == sorted(found, reverse=True), row  # spot is not above on-demand
        assert row["gpu"] in GPUS, row
        assert row["provider"] in PROVIDERS, row
        assert row["form_factor"] in {"sxm", "pcie", "unknown"}, row
        assert row["gpu"].endswith("-pcie") <= (row["form_factor"] == "pcie"), row
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", row["as_of"]), row
        assert datetime.date.fromisoformat(row["as_of"]) <= datetime.date.today(), row
        assert row["source"].strip(), row
        assert int(row["min_gpus"]) in {1, 8}, row
        provider = PROVIDERS[row["provider"]]
        assert int(row["billing_increment_seconds"]) == provider.billing_increment_seconds, row
    assert all(provider.source for provider in PROVIDERS.values())


def test_prices_are_those_of_the_sources() -> None:
    """One A100 of 40 GB by the hour, from each provider as it was read."""
    found = by_provider("current", "a100-40")
    assert {name: round(x.usd_per_gpu_hour or 0, 2) for name, x in found.items()} == {
        "lambda": 1.99,
        "gcp": 3.67,
        "modal": 2.10,
        "verda": 0.72,
        "jarvis-labs": 0.89,
        "colab-pro-plus": 1.18,
    }
    assert by_provider("current", "a100-40-pcie")["vast-ai"].usd_per_gpu_hour == 0.67
    assert found["gcp"].spot_usd_per_gpu_hour == 1.293355
    assert found["gcp"].as_of == datetime.date(2025, 3, 6)
    eight = by_provider("current", "a100-40", min_gpus=8)
    assert {x: eight[x].usd_per_gpu_hour for x in ("aws", "azure")} == {
        "aws": 2.7447,
        "azure": 3.3996,
    }


def test_the_original_figures_are_a_set_of_their_own() -> None:
    """`seed-2025` has what the original requirements say, and nothing newer."""
    found = by_provider("seed-2025", "a100-40")
    assert found["lambda"].usd_per_gpu_hour == 1.10
    assert by_provider("seed-2025", "a100-80")["lambda"].usd_per_gpu_hour == 1.29
    for provider in ("gcp", "aws", "azure"):
        assert found[f"{provider} low end"].usd_per_gpu_hour == 2
        assert found[f"{provider} high end"].usd_per_gpu_hour == 4
    assert {x.as_of.year for x in shipped_prices("seed-2025").prices} == {2025}
    ranges = {x.gpu: (x.low_usd, x.high_usd, x.condition) for x in PURCHASE_PRICES.values()}
    assert ranges == {
        "a100-40": (8_000, 10_000, "used"),
        "a100-80": (15_000, 20_000, "new"),
        "h100-80": (30_000, 40_000, "new"),
    }


@pytest.mark.parametrize(
    ("name", "gpu", "hours"),
    [("current", "a100-40", 42), ("current", "l4", 104), ("seed-2025", "a100-40", 100)],
)
def test_a_subscription_holds_so_many_hours(name: PriceSetName, gpu: str, hours: int) -> None:
    """Colab Pro+ is $50 for its compute units, which a GPU uses up in a known time."""
    month = by_provider(name, gpu)["colab-pro-plus"]
    assert round(month.billing_increment_seconds / 3600) == hours
    assert month.usd_per_gpu_hour is not None
    total = month.usd_per_gpu_hour * month.billing_increment_seconds / 3600
    assert total == pytest.approx(50, abs=1e-9)


def test_what_is_written_is_read_again() -> None:
    """The file is the same after a round through memory, and so is each offer."""
    assert set(PRICE_SETS) == {"current", "seed-2025"}
    for name, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        offers = read_prices(text, name)
        assert read_prices(write_prices(reversed(offers)), name) == offers
        assert write_prices(offers) == text


GOOD = write_prices(shipped_prices().offers[:1])
HEADER, ROW = GOOD.splitlines()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("2.7447", "0.0", "line 2: \\$0 an hour is no price of a GPU"),
        ("2.7447", "700.0", "line 2: \\$700 an hour is no price of a GPU"),
        ("2.7447", "nan", "no price of a GPU"),
        ("2.7447", "cheap", "line 2 is no price: aws,p4d"),
        ("2.7447,,", "2.7447,3.5,", "spot at \\$3.5 is above on-demand at \\$2.7447"),
        ("2.7447,,", ",,", "there is no price"),
        ("a100-40", "a100-45", "there is no GPU 'a100-45'"),
        ("aws,", "asw,", "there is no provider 'asw'"),
        (",8,", ",0,", "are 1 or more"),
        (",sxm,", ",round,", "line 2 is no price"),
        ("2026-11-09", "9 November", "line 2 is no price"),
        ("us-east-1", "us-east-1,more", "line 2 is no price"),
        (ROW, ROW.rsplit(",", 1)[0], "the source is missing|line 2 is no price"),
        (ROW, f"{ROW}\n{ROW}", "aws a100-40 8 on-demand is there twice"),
        (HEADER, "a,b", "is no price list"),
        (GOOD, "", "is no price list"),
        (ROW, f'"{ROW}', "is no CSV|no price"),
    ],
)
def test_a_wrong_line_is_named(old: str, new: str, complaint: str) -> None:
    """What is no price of a GPU does not come in, and the sentence says which line it is."""
    assert old in GOOD
    with pytest.raises(UserError, match=complaint):
        read_prices(GOOD.replace(old, new), "prices.csv")


def test_gpus_are_found_by_the_name_that_people_use() -> None:
    """A name means both of its variants, and a slip of the pen gets the nearest name."""
    assert gpu_variants("h100-80") == ("h100-80", "h100-80-pcie")
    with pytest.raises(UsageError, match=r"no GPU 'a100_40'. Did you mean 'a100-40'\?"):
        gpu_variants("a100_40")


def test_rows_are_frozen() -> None:
    """A price cannot be changed by who reads it."""
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign"):
        shipped_prices().offers[0].tier = "mine"  # type: ignore[misc]
