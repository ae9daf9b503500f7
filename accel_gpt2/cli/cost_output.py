"""What `cost` prints: offers as a table, the own machine beside them, and which one to take."""

import dataclasses
import math
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from accel_gpt2.catalog.gpus import GPUS, GpuSpec
from accel_gpt2.cli.output import print_line, print_table
from accel_gpt2.plan.cost import HOURS_PER_MONTH, BreakEven, CostQuote, recommend
from accel_gpt2.terminal import printable
from accel_gpt2.units import format_seconds

if TYPE_CHECKING:
    from accel_gpt2.cli.cost import Priced

_GB = 10**9
_MOST_ROWS = 15  # where all GPUs are compared
_MARKS = {"fresh": "", "old": "~", "stale": "!"}


def show_cost(priced: "Priced") -> None:
    """Data: what everything costs, as wide as the terminal."""
    for line in _title(priced):
        _print(line)
    shown, larger = priced.quotes, priced.larger
    if len({x.gpu.removesuffix("-pcie") for x in shown}) > 1:  # all GPUs are compared
        shown, larger = shown[:_MOST_ROWS], ()
    if shown:
        print_line("")
        print_table(*_table(shown))
        if len(shown) < len(priced.quotes):
            _print(f"And {len(priced.quotes) - len(shown)} dearer ones: --json has them all.")
    if larger:
        print_line("")
        asked = "one by one" if priced.num_gpus == 1 else f"by {priced.num_gpus}"
        _print(f"Not sold {asked}; whole machines for the same time:")
        print_table(*_table(larger))
    print_line("")
    if priced.spot_only:
        _print(f"At spot prices only, which --spot shows: {', '.join(priced.spot_only)}.")
    _print(_legend((*shown, *larger)))
    for line in _sources((*shown, *larger)):
        _print(line, indent="  ")
    print_line("")
    if priced.local is not None:
        local = priced.local
        _print(
            f"Here, on the {local.name}: {format_seconds(local.run_seconds)} with "
            f"{priced.local_recipe}; {local.watts:.0f} W make ${local.usd_total:.2f} of "
            f"electricity, without the machine itself."
        )
    elif priced.local_note is not None:
        _print(f"Nothing here to compare with: {priced.local_note}.")
    if priced.quotes:
        _print(recommend(priced.quotes, priced.local))


def _title(priced: "Priced") -> list[str]:
    """What is priced: a GPU for some hours, or how each GPU would train."""
    rental = next(iter(priced.rentals.values()))
    setup = f"{format_seconds(rental.setup_seconds)} of set-up"
    count = "" if priced.num_gpus == 1 else f"{priced.num_gpus} x "
    if not priced.recipes:
        names = " or ".join(GPUS[x].display_name for x in priced.rentals)
        disk = f"{rental.disk_bytes / _GB:.0f} GB of disk"
        return [f"{count}{names} for {format_seconds(rental.run_seconds)}, {setup} and {disk}"]
    ways: dict[str, list[str]] = {}
    for gpu, recipe in priced.recipes.items():
        seconds = format_seconds(priced.rentals[gpu].run_seconds)
        ways.setdefault(recipe, []).append(f"{count}{gpu} {seconds}")
    planned = [f"{recipe}: {', '.join(gpus)}" for recipe, gpus in ways.items()]
    return [*planned, f"To each of these times come {setup}."]


_Columns = dict[str, Literal["left", "right"]]


def _table(quotes: Sequence[CostQuote]) -> tuple[_Columns, list[list[str]]]:
    """Columns that would be empty for all are left out."""
    one_family = len({x.gpu.removesuffix("-pcie") for x in quotes}) == 1
    cells = {
        "offer": [_offer_name(x.provider, x.tier) for x in quotes],
        "GPUs": [f"{x.num_gpus} x" if x.num_gpus > 1 else "" for x in quotes],
        "form" if one_family else "GPU": [_form(x) if one_family else _gpu(x) for x in quotes],
        "$/h": [f"{x.usd_per_hour:.2f}" for x in quotes],
        "hours": [f"{x.billed_seconds / 3600:.2f}" for x in quotes],
        "disk": [_cents(x.usd_disk) for x in quotes],
        "egress": [_cents(x.usd_egress) for x in quotes],
        "total": [f"${x.usd_total:.2f}" for x in quotes],
        "spot": [_spot(x) for x in quotes],
        "price of": [f"{x.as_of}{_MARKS[x.freshness]}" for x in quotes],
    }
    kept = {name: column for name, column in cells.items() if any(column)}
    words = {"offer", "GPU", "form", "price of"}
    sides: _Columns = {name: "left" if name in words else "right" for name in kept}
    return sides, [list(row) for row in zip(*kept.values(), strict=True)]


def _offer_name(provider: str, tier: str) -> str:
    return provider if tier in {"on-demand", "subscription"} else f"{provider} {tier}"


def _form(x: CostQuote | BreakEven) -> str:
    has_variants = x.gpu.endswith("-pcie") or f"{x.gpu}-pcie" in GPUS
    return x.form_factor.replace("unknown", "?") if has_variants else ""


def _gpu(x: CostQuote) -> str:
    return f"{x.gpu} ?" if _form(x) == "?" else x.gpu


def _cents(usd: float) -> str:
    return f"{usd:.2f}" if usd >= 0.05 else ""  # less is in the total, and needs no column


def _spot(x: CostQuote) -> str:
    if x.pricing == "spot" or x.spot_usd_total is None:
        return ""
    return f"${x.spot_usd_total:.2f}"


def _legend(quotes: Sequence[CostQuote]) -> str:
    said = ["US dollars without tax; hours as they are billed."]
    if any(x.freshness == "old" for x in quotes):
        said.append("~ is over 30 days old.")
    if any(x.freshness == "stale" for x in quotes):
        said.append("! is stale, over 90 days, or 2 at a marketplace: look it up before you rent.")
    for what in ("disk", "egress"):
        names = dict.fromkeys(x.provider for x in quotes if what in x.not_included)
        if names:
            said.append(f"Not included, because not known: {what} of {', '.join(names)}.")
    if any(_form(x) == "?" for x in quotes):
        said.append("? is SXM or PCIe, which is slower: the provider does not say.")
    if any(x.tier == "subscription" for x in quotes):
        said.append("A subscription is paid by the month, for the hours that it holds.")
    if any(x.num_gpus > 1 for x in quotes):
        said.append("Several GPUs cost so many times the price of one.")
    return " ".join(said)


def _sources(quotes: Sequence[CostQuote]) -> list[str]:
    """Where the prices come from, each place once."""
    places: dict[str, list[str]] = {}
    for x in quotes:
        names = places.setdefault(x.source, [])
        if x.provider not in names:
            names.append(x.provider)
    return [f"{', '.join(names)}: {source}" for source, names in places.items()]


def _print(text: str, *, indent: str = "") -> None:
    """As wide as the terminal; addresses are left whole, so that they can be copied."""
    print_line(
        textwrap.fill(
            printable(text),
            width=max(20, shutil.get_terminal_size().columns),
            initial_indent=indent,
            subsequent_indent=f"{indent}  " if indent else "",
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def cost_document(priced: "Priced") -> dict[str, object]:
    """The answer of `--json`; docs/cost.md has its schema."""
    return {
        "num_gpus": priced.num_gpus,
        "pricing": priced.pricing,
        "prices": priced.prices,
        "date": priced.today.isoformat(),
        "rentals": [
            {"gpu": gpu, "recipe": priced.recipes.get(gpu), **dataclasses.asdict(rental)}
            for gpu, rental in priced.rentals.items()
        ],
        "quotes": [_quote_document(x) for x in priced.quotes],
        "larger": [_quote_document(x) for x in priced.larger],
        "local": None
        if priced.local is None
        else {**dataclasses.asdict(priced.local), "recipe": priced.local_recipe},
        "recommendation": recommend(priced.quotes, priced.local) if priced.quotes else None,
    }


def _quote_document(x: CostQuote) -> dict[str, object]:
    return {**dataclasses.asdict(x), "as_of": x.as_of.isoformat()}


def show_break_even(
    found: Sequence[BreakEven],
    *,
    own: GpuSpec,
    price_usd: float,
    resale: float,
    hours_per_day: float,
    own_usd_per_hour: float,
) -> None:
    """Data: after how many hours of training one's own card is the cheaper one."""
    _print(
        f"{own.display_name} for ${price_usd:,.0f}, whose electricity costs "
        f"${own_usd_per_hour:.3f} an hour, has paid for itself after so many hours of training, "
        f"and months of {hours_per_day:g} hours a day, if it is kept, or resold for {resale:.0%}:"
    )
    print_line("")
    columns: _Columns = {
        "against": "left",
        "form": "left",
        "$/h": "right",
        "kept": "right",
        "resold": "right",
        "price of": "left",
    }
    rows = [
        [
            _offer_name(x.provider, x.tier),
            _form(x),
            f"{x.usd_per_hour:.2f}",
            _time(x.hours, hours_per_day),
            _time(x.hours_after_resale, hours_per_day),
            str(x.as_of),
        ]
        for x in found
    ]
    print_table(columns, rows)


def _time(hours: float, hours_per_day: float) -> str:
    months = months_of(hours, hours_per_day)
    return "never" if months is None else f"{hours:,.0f} h, {months:,.0f} mo"


def months_of(hours: float, hours_per_day: float) -> float | None:
    """Months of so much training a day; None for ever.

    >>> round(months_of(730, 24), 3), months_of(math.inf, 8)
    (1.0, None)
    """
    return hours / (HOURS_PER_MONTH / 24 * hours_per_day) if math.isfinite(hours) else None


def break_even_document(
    found: Sequence[BreakEven], *, hours_per_day: float, asked: dict[str, object]
) -> dict[str, object]:
    """The answer of `cost breakeven --json`; never is null."""
    return {
        **asked,
        "against": [
            {
                **dataclasses.asdict(x),
                "as_of": x.as_of.isoformat(),
                "hours": x.hours if math.isfinite(x.hours) else None,
                "hours_after_resale": x.hours_after_resale
                if math.isfinite(x.hours_after_resale)
                else None,
                "months": months_of(x.hours, hours_per_day),
                "months_after_resale": months_of(x.hours_after_resale, hours_per_day),
            }
            for x in found
        ],
    }
