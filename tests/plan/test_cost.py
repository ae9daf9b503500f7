"""Quotes: exact at billing increments, never below the time used, and honest about their age."""

import dataclasses
import datetime
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.catalog.prices import GpuPrice, shipped_prices
from accel_gpt2.catalog.providers import PROVIDERS
from accel_gpt2.plan.cost import (
    SETUP_SECONDS,
    CostQuote,
    LocalCost,
    Power,
    Rental,
    billed_seconds,
    break_even,
    freshness,
    local_cost,
    quote,
    quotes,
    recommend,
)

TODAY = datetime.date(2026, 11, 23)
PRICES = shipped_prices()
ON_DEMAND = [x for x in PRICES.prices if x.usd_per_gpu_hour is not None]


def offer(provider: str, sku: str) -> GpuPrice:
    """One shipped offer, by the provider's name of the machine."""
    (found,) = (x for x in PRICES.offers if (x.provider, x.sku) == (provider, sku))
    return found


def quoted(offer: GpuPrice, rental: Rental) -> CostQuote:
    """A quote at the on-demand price, which there is."""
    found = quote(offer, rental, today=TODAY)
    assert found is not None
    return found


def test_three_hours_on_lambda() -> None:
    """By hand: 3 h and 10 min of set-up are 190 whole minutes at $1.99 an hour, nothing else."""
    found = quoted(offer("lambda", "gpu_1x_a100_sxm4"), Rental(run_seconds=3 * 3600))
    assert found.billed_seconds == 190 * 60
    assert found.usd_total == pytest.approx(190 / 60 * 1.99)
    assert (found.usd_disk, found.usd_egress, found.spot_usd_total) == (0, 0, None)


def test_disk_and_egress_are_in_the_total() -> None:
    """By hand: 100 GB on RunPod at $0.10 a month of 730 hours, 10 GB from Google at $0.12."""
    rental = Rental(
        run_seconds=7300 * 3600, setup_seconds=0, disk_bytes=100 * 10**9, download_bytes=10 * 10**9
    )
    runpod = next(x for x in PRICES.offers if x.provider == "runpod")
    assert quoted(runpod, rental).usd_disk == pytest.approx(100 * 0.10 * 10)
    google = quoted(offer("gcp", "a2-highgpu-1g"), rental)
    assert google.usd_egress == pytest.approx(1.20)
    assert google.not_included == ("disk",)
    assert google.usd_total == pytest.approx(7300 * 3.673385 + 1.20)
    assert google.spot_usd_total == pytest.approx(7300 * 1.293355 + 1.20)


def test_eight_gpus_are_quoted_as_eight() -> None:
    """A machine with eight GPUs for one costs eight times one of them, and says eight."""
    found = quoted(offer("aws", "p4d.24xlarge"), Rental(run_seconds=3600, setup_seconds=0))
    assert found.num_gpus == 8
    assert found.usd_total == pytest.approx(8 * 2.7447)


def test_what_is_not_sold_is_not_quoted() -> None:
    """No quote where there is no such price; at spot the total is the spot total."""
    salad = offer("salad", "salad-rtx-4090")
    rental = Rental(run_seconds=3600)
    assert quote(salad, rental, today=TODAY) is None
    spot = quote(salad, rental, today=TODAY, pricing="spot")
    assert spot is not None
    assert spot.usd_total == spot.spot_usd_total == 2 * 0.25  # by the hour: 1 h 10 min are two
    assert quote(offer("modal", "modal-l4"), rental, today=TODAY, pricing="spot") is None


def test_cheapest_comes_first() -> None:
    """Quotes of two GPUs are one list by total, each for its own time."""
    rentals = {"l4": Rental(run_seconds=36_000), "h100-80": Rental(run_seconds=3_600)}
    found = quotes(PRICES.prices, rentals, today=TODAY)
    totals = [x.usd_total for x in found]
    assert totals == sorted(totals)
    assert {x.gpu: x.run_seconds for x in found} == {"l4": 36_000, "h100-80": 3_600}
    expected = [x for x in ON_DEMAND if x.gpu in rentals]
    assert len(found) == len(expected) == 15


@given(used=st.integers(0, 10**7), increment=st.integers(1, 10**6), minimum=st.integers(0, 10**5))
def test_billed_time_is_whole_increments_and_no_less_than_used(
    used: int, increment: int, minimum: int
) -> None:
    """Never below what was used or the minimum, less than one increment above, exact at one."""
    billed = billed_seconds(used, increment_seconds=increment, minimum_seconds=minimum)
    assert billed % increment == 0
    assert max(used, minimum) <= billed < max(used, minimum) + increment
    assert billed_seconds(billed, increment_seconds=increment) == billed
    assert billed_seconds(billed + 1, increment_seconds=increment) == billed + increment


RENTALS = st.builds(
    Rental,
    run_seconds=st.integers(1, 10**7),
    num_gpus=st.integers(1, 64),
    setup_seconds=st.integers(0, 3600),
    disk_bytes=st.integers(0, 10**13),
    download_bytes=st.integers(0, 10**12),
)


@given(
    offer=st.sampled_from([x for x in ON_DEMAND if x.tier != "subscription"]),
    rental=RENTALS,
    more_seconds=st.integers(0, 10**6),
    more_gpus=st.integers(0, 16),
)
def test_more_hours_or_gpus_never_cost_less(
    offer: GpuPrice, rental: Rental, more_seconds: int, more_gpus: int
) -> None:
    """The total is monotone in hours and in GPUs, and billed time never below the time used."""
    less = quoted(offer, rental)
    longer = dataclasses.replace(rental, run_seconds=rental.run_seconds + more_seconds)
    wider = dataclasses.replace(rental, num_gpus=rental.num_gpus + more_gpus)
    assert quoted(offer, longer).usd_total >= less.usd_total
    assert quoted(offer, wider).usd_total >= less.usd_total
    assert less.billed_seconds >= rental.run_seconds + rental.setup_seconds
    assert less.num_gpus >= rental.num_gpus
    assert less.num_gpus % offer.min_gpus == 0
    assert less.usd_total == pytest.approx(less.usd_compute + less.usd_disk + less.usd_egress)


@given(
    offer=st.sampled_from(ON_DEMAND),
    rental=RENTALS,
    factor=st.floats(1, 1000),
)
def test_a_higher_price_never_costs_less(offer: GpuPrice, rental: Rental, factor: float) -> None:
    """The total is monotone in the price, on demand and at spot, and grows by the compute alone."""
    rental = dataclasses.replace(rental, num_gpus=1)
    on_demand = offer.usd_per_gpu_hour
    assert on_demand is not None
    listed = dataclasses.replace(offer, spot_usd_per_gpu_hour=on_demand)
    dearer = dataclasses.replace(
        listed, usd_per_gpu_hour=on_demand * factor, spot_usd_per_gpu_hour=on_demand * factor
    )
    less, more = quoted(listed, rental), quoted(dearer, rental)
    assert more.usd_total >= less.usd_total
    assert more.usd_total - less.usd_total == pytest.approx(less.usd_compute * (factor - 1))
    assert more.spot_usd_total == pytest.approx(more.usd_total)


@given(offer=st.sampled_from(ON_DEMAND), increments=st.integers(1, 1000))
def test_whole_increments_are_paid_exactly(offer: GpuPrice, increments: int) -> None:
    """A rental of whole increments is billed for just these; one second more is one more."""
    seconds = increments * offer.billing_increment_seconds
    minimum = PROVIDERS[offer.provider].minimum_billed_seconds
    exact = quoted(offer, Rental(run_seconds=seconds, setup_seconds=0))
    more = quoted(offer, Rental(run_seconds=seconds, setup_seconds=1))
    assert exact.billed_seconds == max(seconds, minimum)
    if seconds >= minimum:
        assert more.billed_seconds == seconds + offer.billing_increment_seconds


@pytest.mark.parametrize(
    ("provider", "days", "expected"),
    [
        ("lambda", 0, "fresh"),
        ("lambda", 30, "fresh"),
        ("lambda", 31, "old"),
        ("lambda", 90, "old"),
        ("lambda", 91, "stale"),
        ("vast-ai", 2, "fresh"),
        ("vast-ai", 3, "stale"),
        ("salad", 3, "stale"),
    ],
)
def test_prices_grow_stale(provider: str, days: int, expected: str) -> None:
    """Over 30 days is old, over 90 stale; at a marketplace over 2."""
    assert freshness(days, PROVIDERS[provider]) == expected


def test_electricity() -> None:
    """By hand: (285 + 120) W from a supply of 90% at 18 cents a kilowatt-hour, for ten hours."""
    gpu = GPUS["rtx4070ti"]
    found = local_cost("here", gpu, num_gpus=1, run_seconds=36_000, power=Power())
    assert found is not None
    assert found.usd_total == pytest.approx(10 * 0.405 / 0.9 * 0.18)
    two = local_cost("here", gpu, num_gpus=2, run_seconds=36_000, power=Power())
    assert two is not None
    assert two.watts == 2 * 285 + 120
    unknown = dataclasses.replace(gpu, tdp_watts=None)
    assert local_cost("here", unknown, num_gpus=1, run_seconds=1, power=Power()) is None


@pytest.mark.parametrize(
    ("sku", "card", "price_usd", "hours"),
    [
        ("gpu_1x_a100_sxm4", "a100-40-pcie", 8_000, 4_175),
        ("gpu_1x_a100_sxm4", "a100-40-pcie", 10_000, 5_219),
        ("gpu_1x_h100_pcie", "h100-80-pcie", 30_000, 9_387),
        ("gpu_1x_h100_pcie", "h100-80-pcie", 40_000, 12_516),
    ],
)
def test_break_even_against_lambda(sku: str, card: str, price_usd: float, hours: int) -> None:
    """Figures that were computed elsewhere, with the card's electricity; half after resale."""
    own = Power().usd_per_hour(GPUS[card].tdp_watts or 0)
    found = break_even(
        offer("lambda", sku), price_usd=price_usd, own_usd_per_hour=own, resale_fraction=0.5
    )
    assert found is not None
    assert round(found.hours) == hours
    assert found.hours_after_resale == pytest.approx(found.hours / 2)


def test_a_card_never_pays_for_itself_against_cheaper_than_electricity() -> None:
    """Where renting costs no more than the current, buying never wins."""
    cheap = offer("vast-ai", "vast-ai-l4")
    found = break_even(cheap, price_usd=1, own_usd_per_hour=0.13, resale_fraction=0.5)
    assert found is not None
    assert math.isinf(found.hours)


def here(usd_total: float, run_seconds: int) -> LocalCost:
    """The own machine at a made-up price."""
    return LocalCost(
        name="RTX 4070 Ti SUPER 16 GB",
        run_seconds=run_seconds,
        watts=405,
        usd_per_hour=0.081,
        usd_total=usd_total,
    )


LAMBDA = quoted(offer("lambda", "gpu_1x_a100_sxm4"), Rental(run_seconds=3600))
VERDA = quoted(offer("verda", "verda-a100-sxm-40gb"), Rental(run_seconds=3600))


@pytest.mark.parametrize(
    ("ranked", "local", "expected"),
    [
        (
            (VERDA, LAMBDA),
            None,
            "Rent from Lambda: $2.32 for one a100-40 in 1 h 10 min, the least of the prices that "
            "are not stale. Verda asked $0.84, 183 days ago.",
        ),
        (
            (VERDA,),
            None,
            "Rent from Verda: $0.84 for one a100-40 in 1 h 10 min, the least of the prices that "
            "are known. That price is 183 days old: look it up first.",
        ),
        (
            (LAMBDA,),
            here(0.41, 5 * 3600),
            "Train here, on the RTX 4070 Ti SUPER 16 GB: $0.41 of electricity in 5 h 00 min, "
            "against $2.32 for one a100-40 in 1 h 10 min from Lambda; each hour that renting "
            "saves costs $0.50.",
        ),
        (
            (LAMBDA,),
            here(0.08, 3600),
            "Train here, on the RTX 4070 Ti SUPER 16 GB: $0.08 of electricity in 1 h 00 min, "
            "against $2.32 for one a100-40 in 1 h 10 min from Lambda.",
        ),
        (
            (LAMBDA,),
            here(4.05, 50 * 3600),
            "Rent from Lambda: $2.32 for one a100-40 in 1 h 10 min is cheaper, and done sooner, "
            "than $4.05 of electricity in 2 d 02 h on the RTX 4070 Ti SUPER 16 GB here.",
        ),
    ],
)
def test_the_recommendation_has_its_reason(
    ranked: tuple[CostQuote, ...], local: LocalCost | None, expected: str
) -> None:
    """The least money at a price that is not stale; what renting would buy is said."""
    assert SETUP_SECONDS == 600
    assert recommend(ranked, local) == expected
