"""`cost`: what a training costs on rented GPUs and here, before anyone pays."""

import datetime
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from accel_gpt2.catalog.gpus import GPUS
from accel_gpt2.catalog.prices import (
    PURCHASE_PRICES,
    PriceSet,
    PriceSetName,
    gpu_variants,
    shipped_prices,
)
from accel_gpt2.catalog.providers import PROVIDERS
from accel_gpt2.cli.cost_plan import (
    DEFAULT_DISK_GB,
    given_need,
    own_machine,
    planned_needs,
    rented_gpus,
    training_layers,
)
from accel_gpt2.cli.errors import plain_app
from accel_gpt2.cli.options import (
    DebugOption,
    JsonOption,
    TrainOptions,
    with_train_options,
)
from accel_gpt2.cli.output import print_json, say, warn
from accel_gpt2.errors import UsageError, UserError, nearest
from accel_gpt2.plan.cost import (
    CostQuote,
    LocalCost,
    Power,
    Pricing,
    Rental,
    break_even,
    quotes,
)

if TYPE_CHECKING:
    pass

app = plain_app()

_GB = 10**9

_DEFAULT_POWER = Power()

ProviderOption = Annotated[
    str | None, typer.Option(help=f"Only this one: {', '.join(PROVIDERS)}.", show_default=False)
]
PricesOption = Annotated[
    PriceSetName,
    typer.Option(help="The dated current prices, or those of the original requirements."),
]
HostWattsOption = Annotated[float, typer.Option(help="Of the own machine, without its GPUs.")]
ElectricityOption = Annotated[float, typer.Option(help="What electricity costs.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """Everything that `cost` found out.

    `quotes` are for what was asked, cheapest first; `larger` are those of providers that sell the
    GPU only as a machine with more of them, and `spot_only` names those that sell it in no other
    way. `recipes` says how each GPU would train, where that was planned; `local_note` why there is
    nothing about the own machine.
    """

    num_gpus: int
    pricing: Pricing
    prices: PriceSetName
    today: datetime.date
    rentals: Mapping[str, Rental]
    recipes: Mapping[str, str]
    quotes: tuple[CostQuote, ...]
    larger: tuple[CostQuote, ...]
    spot_only: tuple[str, ...]
    local: LocalCost | None
    local_recipe: str | None
    local_note: str | None


def cost(
    options: TrainOptions,
    gpu: Annotated[
        str | None, typer.Option(help=f"What to rent: {', '.join(GPUS)}.", show_default=False)
    ] = None,
    hours: Annotated[
        float | None, typer.Option(help="How long it trains. [default: by plan]")
    ] = None,
    num_gpus: Annotated[
        int | None, typer.Option(help="In one machine. [default: the profile's, or 1]", min=1)
    ] = None,
    provider: ProviderOption = None,
    spot: Annotated[
        bool, typer.Option("--spot", help="At spot prices: the machine can be taken away.")
    ] = False,
    disk_gb: Annotated[
        float | None,
        typer.Option(help=f"Rented with it. [default: by plan, or {DEFAULT_DISK_GB:g}]", min=0),
    ] = None,
    download_gb: Annotated[
        float | None,
        typer.Option(help="Fetched at the end. [default: the final models, or 0]", min=0),
    ] = None,
    local: Annotated[
        str | None,
        typer.Option(help="The own machine, a profile, to compare with. [default: this one]"),
    ] = None,
    host_watts: HostWattsOption = _DEFAULT_POWER.host_watts,
    usd_per_kwh: ElectricityOption = _DEFAULT_POWER.usd_per_kwh,
    prices: PricesOption = "current",
    json: JsonOption = False,
    ctx: typer.Context = None,  # type: ignore[assignment]  # Typer fills it in
) -> None:
    """Say what a training costs on rented GPUs, and on the own one.

    Offers come cheapest first, with set-up time. Give --gpu and --hours, or what to train: the
    hours are then those of the plan, and without --gpu or --profile every rented GPU is compared.
    """
    from accel_gpt2.cli.cost_output import cost_document, show_cost

    if ctx.invoked_subcommand is not None:
        if options.layers or gpu or hours:
            raise UsageError(f"Options of `{ctx.invoked_subcommand}` are given after its name.")
        return
    price_set = _price_set(prices)
    targets, num_gpus = rented_gpus(options, gpu, num_gpus, price_set, planned=hours is None)
    layers = training_layers(options, planned=hours is None)
    plans = {} if layers is None else planned_needs(layers, targets, num_gpus)
    needs = plans or {x: given_need(hours) for x in targets}
    rentals = {
        name: Rental(
            run_seconds=need.run_seconds,
            num_gpus=num_gpus,
            disk_bytes=need.disk_bytes if disk_gb is None else int(disk_gb * _GB),
            download_bytes=need.download_bytes if download_gb is None else int(download_gb * _GB),
        )
        for name, need in needs.items()
    }
    pricing: Pricing = "spot" if spot else "on-demand"
    today = _today()
    exact, larger = _quotes(price_set, rentals, provider, today=today, pricing=pricing)
    here, here_recipe, here_note = None, None, None
    if layers is not None:
        power = Power(host_watts=host_watts, usd_per_kwh=usd_per_kwh)
        here, here_recipe, here_note = own_machine(layers, local, power)
    elif local is not None:
        raise UsageError("--local compares a training by plan: give --model in place of --hours.")
    priced = Priced(
        num_gpus=num_gpus,
        pricing=pricing,
        prices=prices,
        today=today,
        rentals=rentals,
        recipes={name: need.recipe for name, need in plans.items()},
        quotes=exact,
        larger=larger,
        spot_only=() if spot or provider else _spot_only(price_set, rentals),
        local=here,
        local_recipe=here_recipe,
        local_note=here_note,
    )
    if json:
        print_json(cost_document(priced))
    else:
        show_cost(priced)


# Options of `train` that do not change how long it trains; which strategy is the plan's choice.
_UNUSED = {
    "output_dir",
    "resume",
    "dry_run",
    "quiet",
    "max_time",
    "budget_usd",
    "strategy",
}

app.callback(invoke_without_command=True)(with_train_options(cost, without=_UNUSED))


def _today() -> datetime.date:
    return datetime.date.today()


def _price_set(name: PriceSetName) -> PriceSet:
    from accel_gpt2.cloud.prices import current_prices

    if name != "current":
        return shipped_prices(name)
    try:
        return current_prices()
    except UserError as error:
        warn(f"{error} The package's own prices are used; `accel-gpt2 cost refresh` mends it.")
        return shipped_prices()


def _quotes(
    prices: PriceSet,
    rentals: Mapping[str, Rental],
    provider: str | None,
    *,
    today: datetime.date,
    pricing: Pricing,
) -> tuple[tuple[CostQuote, ...], tuple[CostQuote, ...]]:
    """Offers for what was asked; and of providers without one, machines with more GPUs.

    Raises:
        UsageError: when there is no such provider.
        UserError: when nobody has a price.
    """
    if provider is not None and provider not in PROVIDERS:
        raise UsageError(
            f"There is no provider {provider!r}.{nearest(provider, list(PROVIDERS))} Known are "
            f"{', '.join(PROVIDERS)}."
        )
    made = quotes(prices.prices, rentals, today=today, pricing=pricing)
    mine = [x for x in made if provider in {None, x.provider}]
    exact = tuple(x for x in mine if x.num_gpus == rentals[x.gpu].num_gpus)
    sold = {(x.provider, x.gpu) for x in exact}
    larger = tuple(x for x in mine if x not in exact and (x.provider, x.gpu) not in sold)
    if not mine:
        raise UserError(_nobody(prices, rentals, made, provider, pricing))
    return exact, larger


def _nobody(
    prices: PriceSet,
    gpus: Collection[str],
    made: Iterable[CostQuote],
    provider: str | None,
    pricing: Pricing,
) -> str:
    """Why there is nothing to show, and what to type next."""
    what = "spot price" if pricing == "spot" else "price"
    who = "anybody" if provider is None else PROVIDERS[provider].display_name
    others = dict.fromkeys(x.provider for x in made)
    if others:
        advice = f"give --provider {' or '.join(others)}"
    elif pricing == "on-demand" and _spot_only(prices, gpus):
        advice = "it is rented at spot prices, which --spot shows"
    else:
        advice = "give another --gpu"
    return f"No {what} of {who} is known for {' or '.join(gpus)}: {advice}."


def _spot_only(prices: PriceSet, gpus: Collection[str]) -> tuple[str, ...]:
    offers = [x for x in prices.offers if x.gpu in gpus and x.usd_per_gpu_hour is None]
    return tuple(dict.fromkeys(x.provider for x in offers))


@app.command()
def breakeven(
    gpu: Annotated[str, typer.Option(help="The card to buy.")],
    price_usd: Annotated[
        float | None,
        typer.Option(help="What it costs. [default: the middle of a known range]", min=1),
    ] = None,
    resale: Annotated[
        float,
        typer.Option(help="The part of the price that it is sold for later.", min=0, max=0.99),
    ] = 0.5,
    hours_per_day: Annotated[
        float, typer.Option(help="How much it would train.", min=0.1, max=24)
    ] = 8.0,
    provider: ProviderOption = None,
    host_watts: HostWattsOption = _DEFAULT_POWER.host_watts,
    usd_per_kwh: ElectricityOption = _DEFAULT_POWER.usd_per_kwh,
    prices: PricesOption = "current",
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say after how many hours a card pays for itself."""
    from accel_gpt2.cli.cost_output import break_even_document, show_break_even

    variants = gpu_variants(gpu)
    if price_usd is None:
        row = PURCHASE_PRICES.get(gpu)
        if row is None:
            raise UsageError(f"What does the {gpu} cost? Give --price-usd, as in --price-usd 9000.")
        price_usd = (row.low_usd + row.high_usd) / 2
        say(
            f"--price-usd {price_usd:,.0f}: the middle of ${row.low_usd:,.0f} to "
            f"${row.high_usd:,.0f} for a {row.condition} one ({row.source})."
        )
    # SXM modules need a server's board: what one buys for a desktop is the PCIe card.
    own = GPUS[variants[-1]]
    if own.tdp_watts is None:
        raise UserError(f"The power of a {own.display_name} is not known, so neither is its cost.")
    own_usd_per_hour = Power(host_watts=host_watts, usd_per_kwh=usd_per_kwh).usd_per_hour(
        own.tdp_watts
    )
    one_gpu = {name: Rental(run_seconds=3600) for name in variants}
    price_set = _price_set(prices)
    today = _today()
    exact, _ = _quotes(price_set, one_gpu, provider, today=today, pricing="on-demand")
    keys = {(x.provider, x.gpu, 1, x.tier) for x in exact}
    found = [
        made
        for offer in price_set.prices
        if offer.key in keys
        and (
            made := break_even(
                offer,
                price_usd=price_usd,
                own_usd_per_hour=own_usd_per_hour,
                resale_fraction=resale,
            )
        )
    ]
    if not found:
        raise UserError(f"Nobody rents a single {gpu}, as far as is known: there is no comparison.")
    found.sort(key=lambda x: x.hours)
    asked = {
        "gpu": own.name,
        "price_usd": price_usd,
        "resale_fraction": resale,
        "hours_per_day": hours_per_day,
        "own_usd_per_hour": own_usd_per_hour,
    }
    if json:
        print_json(break_even_document(found, hours_per_day=hours_per_day, asked=asked))
    else:
        show_break_even(
            found,
            own=own,
            price_usd=price_usd,
            resale=resale,
            hours_per_day=hours_per_day,
            own_usd_per_hour=own_usd_per_hour,
        )


@app.command()
def refresh(
    source: Annotated[
        list[str] | None,
        typer.Option(help="gpuhunt, lambda or hf-jobs. Repeatable. [default: all]"),
    ] = None,
    accept: Annotated[
        bool, typer.Option("--accept", help="Take prices that changed by more than half.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask for today's prices, and keep all of them or none.

    They go to the user's cache. Lambda is asked with the key of LAMBDA_API_KEY or
    ~/.lambda_cloud/lambda_keys, Hugging Face with its own token if there is one, and five other
    providers by the package gpuhunt.
    """
    from accel_gpt2.cloud.price_sources import SOURCES
    from accel_gpt2.cloud.prices import refresh_prices

    chosen = source or list(SOURCES)
    for name in chosen:
        if name not in SOURCES:
            known = list(SOURCES)
            raise UsageError(
                f"--source {name}: there is no such source.{nearest(name, known)} There are "
                f"{', '.join(known)}."
            )
    say(f"Asking {', '.join(chosen)} ...")
    done = refresh_prices(
        {name: SOURCES[name] for name in chosen},
        today=_today(),
        accept_jumps=accept,
    )
    for reason in done.not_set_up:
        say(f"Not asked: {reason}")
    if json:
        print_json({"path": str(done.path), "num_offers": dict(done.num_offers)})
    else:
        for name, count in done.num_offers.items():
            say(f"{name}: {count} prices.")
        say(f"Written to {done.path}.")
