"""What a rented GPU costs for so many hours, what one's own costs beside it, and which to use."""

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from accel_gpt2.catalog.gpus import GpuSpec
from accel_gpt2.catalog.prices import FormFactor, GpuPrice
from accel_gpt2.catalog.providers import PROVIDERS, ProviderSpec
from accel_gpt2.units import format_seconds

# Booting, installing torch and fetching weights, billed like the training: 3 to 10 minutes were
# seen. (Lambda's eight H100 boot for 25, but its bill starts when they are up.)
SETUP_SECONDS = 600

# What providers call a month, for disks: 365 x 24 / 12 hours.
HOURS_PER_MONTH = 730
_GB = 10**9  # as disks and traffic are sold

Pricing = Literal["on-demand", "spot"]
Freshness = Literal["fresh", "old", "stale"]

_OLD_DAYS, _STALE_DAYS, _STALE_MARKETPLACE_DAYS = 30, 90, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rental:
    """What is to be rented: `num_gpus` for `run_seconds` of training and the set-up before it.

    `disk_bytes` are held as long as the GPUs are, `download_bytes` fetched once at the end.
    """

    run_seconds: int
    num_gpus: int = 1
    setup_seconds: int = SETUP_SECONDS
    disk_bytes: int = 0
    download_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CostQuote:
    """One offer for one rental, in US dollars without tax.

    `num_gpus` are what is sold, which is more than was asked for where the offer is of whole
    machines; `usd_per_hour` is of all of them. `usd_total` is compute, disk and egress, at the
    on-demand or the spot price as `pricing` says; `not_included` names what has a price that is not
    known. `spot_usd_total` is None where there is no spot price.
    """

    provider: str
    sku: str
    gpu: str
    form_factor: FormFactor
    tier: str
    num_gpus: int
    pricing: Pricing
    usd_per_hour: float
    run_seconds: int
    setup_seconds: int
    billed_seconds: int
    usd_compute: float
    usd_disk: float
    usd_egress: float
    usd_total: float
    spot_usd_total: float | None
    not_included: tuple[str, ...]
    as_of: datetime.date
    age_days: int
    freshness: Freshness
    source: str

    @property
    def provider_name(self) -> str:
        """As the provider writes it."""
        return PROVIDERS[self.provider].display_name


def billed_seconds(used_seconds: int, *, increment_seconds: int, minimum_seconds: int = 0) -> int:
    """The time that is paid for: whole increments, and the minimum at least.

    >>> billed_seconds(3601, increment_seconds=60), billed_seconds(3600, increment_seconds=60)
    (3660, 3600)
    >>> billed_seconds(5, increment_seconds=1, minimum_seconds=60)
    60
    """
    return -(-max(used_seconds, minimum_seconds) // increment_seconds) * increment_seconds


def gpus_sold(num_gpus: int, min_gpus: int) -> int:
    """The GPUs that one has to rent for `num_gpus`, where they come by `min_gpus`.

    >>> gpus_sold(1, 8), gpus_sold(8, 8), gpus_sold(2, 1)
    (8, 8, 2)
    """
    return -(-num_gpus // min_gpus) * min_gpus


def quote(
    offer: GpuPrice, rental: Rental, *, today: datetime.date, pricing: Pricing = "on-demand"
) -> CostQuote | None:
    """What an offer costs for a rental; None where it is not sold at this pricing.

    A subscription is to one GPU.
    """
    per_gpu = offer.usd_per_gpu_hour if pricing == "on-demand" else offer.spot_usd_per_gpu_hour
    provider = PROVIDERS[offer.provider]
    if per_gpu is None or (provider.market == "subscription" and rental.num_gpus > 1):
        return None
    num_gpus = _sold(offer, rental)
    billed = billed_seconds(
        rental.run_seconds + rental.setup_seconds,
        increment_seconds=offer.billing_increment_seconds,
        minimum_seconds=provider.minimum_billed_seconds,
    )
    hours = billed / 3600
    usd_compute = per_gpu * num_gpus * hours
    disk_usd_per_month = (provider.disk_usd_per_gb_month or 0.0) * rental.disk_bytes / _GB
    usd_disk = disk_usd_per_month * hours / HOURS_PER_MONTH
    usd_egress = (provider.egress_usd_per_gb or 0.0) * rental.download_bytes / _GB
    beside = usd_disk + usd_egress
    spot = offer.spot_usd_per_gpu_hour
    age_days = (today - offer.as_of).days
    return CostQuote(
        provider=offer.provider,
        sku=offer.sku,
        gpu=offer.gpu,
        form_factor=offer.form_factor,
        tier=offer.tier,
        num_gpus=num_gpus,
        pricing=pricing,
        usd_per_hour=per_gpu * num_gpus,
        run_seconds=rental.run_seconds,
        setup_seconds=rental.setup_seconds,
        billed_seconds=billed,
        usd_compute=usd_compute,
        usd_disk=usd_disk,
        usd_egress=usd_egress,
        usd_total=usd_compute + beside,
        spot_usd_total=None if spot is None else spot * num_gpus * hours + beside,
        not_included=_not_included(provider, rental),
        as_of=offer.as_of,
        age_days=age_days,
        freshness=freshness(age_days, provider),
        source=offer.source,
    )


def _not_included(provider: ProviderSpec, rental: Rental) -> tuple[str, ...]:
    unknown = []
    if rental.disk_bytes and provider.disk_usd_per_gb_month is None:
        unknown.append("disk")
    if rental.download_bytes and provider.egress_usd_per_gb is None:
        unknown.append("egress")
    return tuple(unknown)


def freshness(age_days: int, provider: ProviderSpec) -> Freshness:
    """Whether a price of this age can be relied upon; hosts of a marketplace change theirs daily.

    >>> [freshness(days, PROVIDERS["lambda"]) for days in (30, 31, 91)]
    ['fresh', 'old', 'stale']
    >>> freshness(3, PROVIDERS["vast-ai"])
    'stale'
    """
    if age_days > (_STALE_MARKETPLACE_DAYS if provider.market == "marketplace" else _STALE_DAYS):
        return "stale"
    return "old" if age_days > _OLD_DAYS else "fresh"


def quotes(
    offers: Iterable[GpuPrice],
    rentals: Mapping[str, Rental],
    *,
    today: datetime.date,
    pricing: Pricing = "on-demand",
) -> tuple[CostQuote, ...]:
    """What all offers of the GPUs in `rentals` cost, cheapest first.

    Of a provider's machines with one and with eight of a GPU, the one counts that has no more GPUs
    than it has to; and for eight the machine with eight, not eight times the one.
    """
    best: dict[object, GpuPrice] = {}
    for offer in sorted(offers, key=lambda x: x.min_gpus):
        kind = offer.provider, offer.gpu, offer.tier
        rental = rentals.get(offer.gpu)
        if rental is not None and _sold(offer, rental) <= _sold(best.get(kind, offer), rental):
            best[kind] = offer
    made = (quote(x, rentals[x.gpu], today=today, pricing=pricing) for x in best.values())
    return tuple(sorted((x for x in made if x is not None), key=lambda x: x.usd_total))


def _sold(offer: GpuPrice, rental: Rental) -> int:
    return gpus_sold(rental.num_gpus, offer.min_gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """What a kilowatt-hour costs, and what draws current beside the GPUs.

    US homes pay 18 cents (EIA, 2026); 120 W are a desktop without its GPU; a good power supply
    passes on 90% of what it draws.
    """

    host_watts: float = 120.0
    usd_per_kwh: float = 0.18
    supply_efficiency: float = 0.9

    def usd_per_hour(self, gpu_watts: float) -> float:
        """Of a machine whose GPUs draw `gpu_watts` together.

        >>> round(Power().usd_per_hour(285), 3)  # RTX 4070 Ti SUPER
        0.081
        """
        return (gpu_watts + self.host_watts) / self.supply_efficiency / 1000 * self.usd_per_kwh


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalCost:
    """The same training on one's own machine: electricity alone, at the GPUs' full power."""

    name: str
    run_seconds: int
    watts: float  # of GPUs and host, behind the power supply
    usd_per_hour: float
    usd_total: float


def local_cost(
    name: str, gpu: GpuSpec, *, num_gpus: int, run_seconds: int, power: Power
) -> LocalCost | None:
    """None where the GPU's power is not known."""
    if gpu.tdp_watts is None:
        return None
    gpu_watts = gpu.tdp_watts * num_gpus
    usd_per_hour = power.usd_per_hour(gpu_watts)
    return LocalCost(
        name=name,
        run_seconds=run_seconds,
        watts=gpu_watts + power.host_watts,
        usd_per_hour=usd_per_hour,
        usd_total=usd_per_hour * run_seconds / 3600,
    )


def recommend(ranked: Sequence[CostQuote], local: LocalCost | None) -> str:
    """Where to train and why, in a sentence or two: for the least money at a price that is valid.

    `ranked` are offers for what was asked, cheapest first, at least one; `local` is None where
    there is no GPU here or the training does not fit.
    """
    best = next((x for x in ranked if x.freshness != "stale"), ranked[0])
    rented_seconds = best.run_seconds + best.setup_seconds
    rent = f"{_money(best.usd_total)} for {_machine(best)} in {format_seconds(rented_seconds)}"
    if local is None:
        kind = "that are not stale" if best.freshness != "stale" else "that are known"
        return f"Rent from {best.provider_name}: {rent}, the least of the prices {kind}." + _doubt(
            best, ranked
        )
    here = f"{_money(local.usd_total)} of electricity in {format_seconds(local.run_seconds)}"
    saved_seconds = local.run_seconds - rented_seconds
    if local.usd_total > best.usd_total:
        other = "sooner" if saved_seconds > 0 else "later"
        return (
            f"Rent from {best.provider_name}: {rent} is cheaper, and done {other}, than {here} on "
            f"the {local.name} here.{_doubt(best, ranked)}"
        )
    verdict = f"Train here, on the {local.name}: {here}, against {rent} from {best.provider_name}"
    if saved_seconds <= 0:
        return f"{verdict}."
    usd_per_hour = (best.usd_total - local.usd_total) / (saved_seconds / 3600)
    return f"{verdict}; each hour that renting saves costs {_money(usd_per_hour)}."


def _doubt(best: CostQuote, ranked: Sequence[CostQuote]) -> str:
    """What to look up first: this price if it is stale, or a cheaper one that was passed over."""
    if best.freshness == "stale":
        return f" That price is {best.age_days} days old: look it up first."
    if best is not ranked[0]:
        cheaper = ranked[0]
        return (
            f" {cheaper.provider_name} asked {_money(cheaper.usd_total)}, {cheaper.age_days} days "
            "ago."
        )
    return ""


def _machine(x: CostQuote) -> str:
    count = f"{x.num_gpus} x " if x.num_gpus > 1 else "a spot " if x.pricing == "spot" else "one "
    return f"{count}{x.gpu}"


def _money(usd: float) -> str:
    """
    >>> _money(5.974), _money(0.0042)
    ('$5.97', '$0.004')
    """
    return f"${usd:.2f}" if usd >= 0.01 else f"${usd:.3f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakEven:
    """When a card that costs `price_usd` has paid for itself against one offer.

    Hours are of training, and infinite where the card's electricity costs as much as renting does.
    After resale, at `resale_fraction` of that price (below 1), it has cost what it lost in value.
    """

    provider: str
    gpu: str
    form_factor: FormFactor
    tier: str
    usd_per_hour: float
    hours: float
    hours_after_resale: float
    as_of: datetime.date
    source: str


def break_even(
    offer: GpuPrice, *, price_usd: float, own_usd_per_hour: float, resale_fraction: float
) -> BreakEven | None:
    """Hours until buying is cheaper than renting one GPU; None where it is sold as spot only.

    >>> from accel_gpt2.catalog.prices import shipped_prices
    >>> (h100,) = (x for x in shipped_prices().offers if x.sku == "gpu_1x_h100_pcie")
    >>> own = Power().usd_per_hour(350)
    >>> found = break_even(h100, price_usd=30_000, own_usd_per_hour=own, resale_fraction=0.5)
    >>> round(found.hours), round(found.hours_after_resale)
    (9387, 4693)
    """
    if offer.usd_per_gpu_hour is None:
        return None
    saved = offer.usd_per_gpu_hour - own_usd_per_hour
    hours = price_usd / saved if saved > 0 else math.inf
    return BreakEven(
        provider=offer.provider,
        gpu=offer.gpu,
        form_factor=offer.form_factor,
        tier=offer.tier,
        usd_per_hour=offer.usd_per_gpu_hour,
        hours=hours,
        hours_after_resale=hours * (1 - resale_fraction),
        as_of=offer.as_of,
        source=offer.source,
    )
