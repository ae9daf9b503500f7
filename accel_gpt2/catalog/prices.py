"""What GPUs cost: by the hour (`prices.csv` and its historical set), by the month, and to buy.

Each row has its date and its source. The figures of the project's original requirements, of 2025,
stay available as the set `seed-2025`; the default set is `current`.
"""

import csv
import dataclasses
import datetime
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.catalog.providers import PROVIDERS
from accel_gpt2.errors import UsageError, UserError, nearest

FormFactor = Literal["sxm", "pcie", "unknown"]
PriceSetName = Literal["current", "seed-2025"]

# Outside of this a price is a placeholder: catalogs have 0.00 for "no offer" and 700 for "ask us".
LOWEST_USD_PER_GPU_HOUR = 0.02
HIGHEST_USD_PER_GPU_HOUR = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPrice:
    """One offer: a GPU of one provider, by the hour of use.

    `gpu` names a catalog row; `form_factor` is "unknown" where the provider does not say which of
    two variants one gets, and `gpu` is then the SXM one. `sku` is the provider's own name of the
    machine, `tier` the class of service, such as "on-demand", "secure" or "community".

    `min_gpus` GPUs are the least that is sold; the prices are of one of them. `usd_per_gpu_hour` or
    `spot_usd_per_gpu_hour` is None where it is not sold so. Time is billed in whole
    `billing_increment_seconds`.
    """

    provider: str
    sku: str
    gpu: str
    form_factor: FormFactor
    min_gpus: int
    tier: str
    usd_per_gpu_hour: float | None
    spot_usd_per_gpu_hour: float | None
    billing_increment_seconds: int
    as_of: datetime.date
    source: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What a newer price of the same offer has in common with it."""
        return self.provider, self.gpu, self.min_gpus, self.tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """A monthly fee for so many compute units, which GPUs use up at different rates."""

    provider: str
    usd_per_month: float
    units_per_month: float
    units_per_gpu_hour: Mapping[str, float]
    as_of: datetime.date
    source: str

    def price(self, gpu: str) -> GpuPrice:
        """As an offer by the hour that is billed in whole months of use.

        >>> colab = COLAB_PRO_PLUS.price("a100-40")
        >>> round(colab.billing_increment_seconds / 3600), round(colab.usd_per_gpu_hour, 2)
        (42, 1.18)
        """
        seconds = int(self.units_per_month / self.units_per_gpu_hour[gpu] * 3600)
        return GpuPrice(
            provider=self.provider,
            sku=f"{self.usd_per_month:g} USD a month",
            gpu=gpu,
            form_factor="unknown",
            min_gpus=1,
            tier="subscription",
            usd_per_gpu_hour=self.usd_per_month / (seconds / 3600),
            spot_usd_per_gpu_hour=None,
            billing_increment_seconds=seconds,
            as_of=self.as_of,
            source=self.source,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PurchasePrice:
    """What a card costs to own, from `low_usd` to `high_usd`."""

    gpu: str
    condition: Literal["new", "used"]
    low_usd: float
    high_usd: float
    as_of: datetime.date
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceSet:
    """Prices that were true at one time."""

    name: PriceSetName
    offers: tuple[GpuPrice, ...]
    subscriptions: tuple[Subscription, ...]

    @property
    def prices(self) -> tuple[GpuPrice, ...]:
        """All offers, subscriptions as offers by the hour."""
        by_month = (x.price(gpu) for x in self.subscriptions for gpu in x.units_per_gpu_hour)
        return (*self.offers, *by_month)


_ORIGINAL = "the project's original requirements, 2025"
_ORIGINAL_DATE = datetime.date(2025, 1, 1)  # they name the year only

COLAB_PRO_PLUS = Subscription(
    provider="colab-pro-plus",
    usd_per_month=50,
    units_per_month=500,
    units_per_gpu_hour=MappingProxyType({"a100-40": 11.77, "l4": 4.82}),
    as_of=datetime.date(2024, 4, 1),
    source="colab.research.google.com/signup; units an hour as users measured them in 2024-04",
)

_SEED_COLAB_PRO_PLUS = Subscription(
    provider="colab-pro-plus",
    usd_per_month=50,
    units_per_month=500,
    units_per_gpu_hour=MappingProxyType({"a100-40": 5.0}),  # "about 100 hours"
    as_of=_ORIGINAL_DATE,
    source=_ORIGINAL,
)

_CARDS = (
    PurchasePrice(
        gpu="a100-40",
        condition="used",
        low_usd=8_000,
        high_usd=10_000,
        as_of=_ORIGINAL_DATE,
        source=_ORIGINAL,
    ),
    PurchasePrice(
        gpu="a100-80",
        condition="new",
        low_usd=15_000,
        high_usd=20_000,
        as_of=_ORIGINAL_DATE,
        source=_ORIGINAL,
    ),
    PurchasePrice(
        gpu="h100-80",
        condition="new",
        low_usd=30_000,
        high_usd=40_000,
        as_of=_ORIGINAL_DATE,
        source=_ORIGINAL,
    ),
)

PURCHASE_PRICES: Mapping[str, PurchasePrice] = MappingProxyType({row.gpu: row for row in _CARDS})

_FILES: Mapping[PriceSetName, str] = MappingProxyType(
    {"current": "prices.csv", "seed-2025": "prices_seed_2025.csv"}
)
_SUBSCRIPTIONS: Mapping[PriceSetName, Subscription] = MappingProxyType(
    {"current": COLAB_PRO_PLUS, "seed-2025": _SEED_COLAB_PRO_PLUS}
)

PRICE_SETS: tuple[PriceSetName, ...] = tuple(_FILES)


def shipped_prices(name: PriceSetName = "current") -> PriceSet:
    """The prices that came with the package."""
    path = Path(__file__).with_name(_FILES[name])
    return PriceSet(
        name=name,
        offers=read_prices(path.read_text(encoding="utf-8"), str(path)),
        subscriptions=(_SUBSCRIPTIONS[name],),
    )


_COLUMNS = tuple(field.name for field in dataclasses.fields(GpuPrice))


def read_prices(text: str, name: str) -> tuple[GpuPrice, ...]:
    """The offers of a CSV file's text; `name` is what to call the file in an error.

    Raises:
        UserError: when a line is no offer, with all that is wrong.
    """
    reader = csv.DictReader(io.StringIO(text), strict=True)
    offers: list[GpuPrice] = []
    problems: list[str] = []
    try:
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise UserError(f"{name} is no price list: its first line is not {','.join(_COLUMNS)}.")
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            try:
                offer = _offer(row)
            except (ValueError, TypeError, AttributeError):  # also of too many or too few cells
                problems.append(f"{where} is no price: {','.join(str(x) for x in row.values())}.")
                continue
            problems += [f"{where}: {problem}." for problem in price_problems(offer)]
            offers.append(offer)
    except csv.Error as error:
        problems.append(f"{name}, line {reader.line_num} is no CSV: {error}.")
    if len({offer.key for offer in offers}) < len(offers):
        keys = [offer.key for offer in offers]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        problems += [f"{name}: {' '.join(map(str, key))} is there twice." for key in twice]
    if problems:
        raise UserError("\n".join(problems))
    return tuple(offers)


def _offer(row: Mapping[str, str]) -> GpuPrice:
    form_factor = row["form_factor"]
    if form_factor not in {"sxm", "pcie", "unknown"} or None in row:
        raise ValueError(form_factor)
    return GpuPrice(
        provider=row["provider"],
        sku=row["sku"],
        gpu=row["gpu"],
        form_factor=form_factor,  # type: ignore[arg-type]  # checked above
        min_gpus=int(row["min_gpus"]),
        tier=row["tier"],
        usd_per_gpu_hour=float(row["usd_per_gpu_hour"]) if row["usd_per_gpu_hour"] else None,
        spot_usd_per_gpu_hour=float(row["spot_usd_per_gpu_hour"])
        if row["spot_usd_per_gpu_hour"]
        else None,
        billing_increment_seconds=int(row["billing_increment_seconds"]),
        as_of=datetime.date.fromisoformat(row["as_of"]),
        source=row["source"],
    )


def price_problems(offer: GpuPrice) -> list[str]:
    """What is wrong with an offer, a clause each; empty where nothing is."""
    problems = []
    if offer.provider not in PROVIDERS:
        problems.append(f"there is no provider {offer.provider!r}")
    if offer.gpu not in GPUS:
        problems.append(f"there is no GPU {offer.gpu!r}")
    if not (offer.sku and offer.tier and offer.source):
        problems.append("the machine, the tier or the source is missing")
    if offer.min_gpus < 1 or offer.billing_increment_seconds < 1:
        problems.append("the least GPUs and the billing increment are 1 or more")
    prices = [x for x in (offer.usd_per_gpu_hour, offer.spot_usd_per_gpu_hour) if x is not None]
    if not prices:
        problems.append("there is no price")
    problems += [
        f"${price:g} an hour is no price of a GPU"
        for price in prices
        if not LOWEST_USD_PER_GPU_HOUR <= price <= HIGHEST_USD_PER_GPU_HOUR or math.isnan(price)
    ]
    on_demand, spot = offer.usd_per_gpu_hour, offer.spot_usd_per_gpu_hour
    if on_demand is not None and spot is not None and spot > on_demand:
        problems.append(f"spot at ${spot:g} is above on-demand at ${on_demand:g}")
    return problems


def write_prices(offers: Iterable[GpuPrice]) -> str:
    """The text of a CSV file that `read_prices` reads, sorted by provider and GPU."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for offer in sorted(offers, key=lambda x: x.key):
        values = (getattr(offer, column) for column in _COLUMNS)
        writer.writerow("" if value is None else value for value in values)
    return text.getvalue()


def gpu_variants(gpu: str) -> tuple[str, ...]:
    """The catalog's rows that a person means by a GPU's name: `a100-40` is on SXM and on PCIe.

    Raises:
        UsageError: when the catalog has no GPU of this name.

    >>> gpu_variants("a100-40"), gpu_variants("a100-40-pcie"), gpu_variants("l4")
    (('a100-40', 'a100-40-pcie'), ('a100-40-pcie',), ('l4',))
    """
    if gpu not in GPUS:
        raise UsageError(
            f"There is no GPU {gpu!r}.{nearest(gpu, list(GPUS))} Known are {', '.join(GPUS)}."
        )
    return tuple(name for name in (gpu, f"{gpu}-pcie") if name in GPUS)
