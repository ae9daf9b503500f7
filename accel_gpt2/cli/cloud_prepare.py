"""What `cloud launch` knows before anything is started: the plan, the price, files and words."""

import dataclasses
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accel_gpt2.cli.options import TrainOptions, given_layers, typed_words
from accel_gpt2.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from accel_gpt2.cloud.engine import Engine, Wish
    from accel_gpt2.plan.cost import CostQuote
    from accel_gpt2.plan.run_plan import Option
    from accel_gpt2.recipe import Layer, TrainRecipe
    from accel_gpt2.render.cloud_job import CloudJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that is known before anything is started. `option` is None where hours were given."""

    job: "CloudJob"
    quote: "CostQuote"
    recipe: "TrainRecipe"
    option: "Option | None"
    run_directory: Path
    files: dict[str, str]  # of the launch directory, by name
    shipped: dict[str, Path]  # local data and models, by their path in the upload
    sources: Path | None


def given_recipe(options: TrainOptions) -> "tuple[list[Layer], TrainRecipe]":
    from accel_gpt2.recipe.resolving import resolve

    layers = given_layers(options)
    recipe = resolve(layers).recipe
    for key in ("budget_usd", "price_usd_per_hour"):
        if getattr(recipe, key) is not None:
            raise UsageError(f"{key} is given in the recipe: give --budget and leave it out.")
    return layers, recipe


def planned_option(layers: "list[Layer]", provider: str, gpu: str, num_gpus: int) -> "Option":
    """What `train` will do there.

    Raises:
        DoesNotFitError: when nothing fits.
        UsageError: when its time cannot be known.
    """
    from accel_gpt2.cli.cost_plan import rented_profile
    from accel_gpt2.cli.hardware import detect_hardware, planned_profile
    from accel_gpt2.cli.planning import does_not_fit, plan_here

    if provider == "local":
        profile = planned_profile("auto", detect_hardware)
    else:
        profile = rented_profile(gpu, num_gpus)
    plan = plan_here(layers, profile, depth="none")
    if plan is None:
        raise UsageError("The shape of this model is not known here: give --hours.")
    if plan.recommended is None:
        raise DoesNotFitError(does_not_fit(plan))
    return plan.recommended


def run_seconds_of(hours: float | None, option: "Option | None") -> int:
    if hours is not None:
        if not hours > 0:
            raise UsageError(f"--hours {hours:g} is no time to train for: give hours, as in 3.")
        return max(1, round(hours * 3600))
    assert option is not None
    if option.seconds is None:
        raise UsageError(
            "How long it trains is not known before the data set has been read, or for a machine "
            "whose speed is unknown: give --hours."
        )
    return max(1, round(option.seconds.expected))


def prepare(
    options: TrainOptions,
    recipe: "TrainRecipe",
    option: "Option | None",
    engine: "Engine",
    wish: "Wish",
    budget: float,
    bucket: str | None,
    package: str | None,
) -> Prepared:
    from accel_gpt2.classify.spending import spent_usd
    from accel_gpt2.cli.run_directory import default_run_directory
    from accel_gpt2.cloud.engine import find_sources, upload_directory
    from accel_gpt2.cloud.ledger import NAME_PREFIX
    from accel_gpt2.render.cloud_job import CloudJob

    sources = find_sources() if package is None else None
    if package is None and sources is None:
        raise UsageError(
            "This is an installed accel-gpt2, and no package index has it: say what the machine is "
            "to install, for instance --package git+https://...@<commit>."
        )
    quote = engine.quote(wish)
    run_directory = (options.output_dir or default_run_directory(recipe)).absolute()
    words, shipped = _machine_words(options, recipe)
    slug = "".join(x if x.isalnum() else "-" for x in run_directory.name.lower())[:24].strip("-")
    name = f"{NAME_PREFIX}{slug}-{secrets.token_hex(2)}"
    job = CloudJob(
        name=name,
        cloud=wish.cloud,
        gpu=quote.gpu,
        num_gpus=wish.num_gpus,
        usd_per_hour=round(quote.usd_per_hour, 6),
        budget_usd=budget,
        words=tuple(words),
        run_directory=str(run_directory),
        uploaded=str(upload_directory(name)),
        package=package or "./package",
        bucket=str(Path(bucket).absolute()) if bucket and wish.cloud.engine == "local" else bucket,
        spot=wish.spot,
        spent_usd=round(spent_usd(run_directory), 4),
    )
    return Prepared(
        job=job,
        quote=quote,
        recipe=recipe,
        option=option,
        run_directory=run_directory,
        files=engine.render(job),
        shipped=shipped,
        sources=sources,
    )


def _machine_words(
    options: TrainOptions, recipe: "TrainRecipe"
) -> tuple[list[str], dict[str, Path]]:
    """What to type after `train` there, and the local files that it names, by their place there.

    What was set in the environment is typed: the machine has not got it.
    """
    from accel_gpt2.recipe import Layer
    from accel_gpt2.recipe.layers import environment_layer

    layers = list(options.layers)
    typed = {key for layer in layers for key in layer.values}
    layers += [
        Layer(origin="--set", values={key: value})
        for key, value in environment_layer().values.items()
        if key not in typed
    ]
    shipped: dict[str, Path] = {}
    for key, folder in (("dataset", "data"), ("model", "models"), ("tokenizer", "models")):
        path = Path(str(getattr(recipe, key))).expanduser()
        if os.path.exists(path):
            there = f"{folder}/{path.resolve().name}"
            shipped[there] = path
            layers = [_without(layer, key) for layer in layers]
            layers.append(Layer(origin="--set", values={key: f"./{there}"}))
    recipe_file = options.recipe_file
    if recipe_file is not None:
        shipped[recipe_file.name] = recipe_file
        recipe_file = Path(recipe_file.name)
    there_options = dataclasses.replace(
        options,
        layers=tuple(layer for layer in layers if layer.values),
        recipe_file=recipe_file,
        output_dir=None,
    )
    return typed_words(there_options), shipped


def _without(layer: "Layer", key: str) -> "Layer":
    values = {name: value for name, value in layer.values.items() if name != key}
    return dataclasses.replace(layer, values=values)
