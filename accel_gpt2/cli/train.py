"""`train`: choose, check and launch; and what the launched process does, which ends in `fit`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from accel_gpt2.catalog.profiles import HardwareProfile
from accel_gpt2.catalog.strategies import STRATEGIES, ShardingStrategy
from accel_gpt2.classify.lock import claim
from accel_gpt2.cli.errors import plain_app, report, run
from accel_gpt2.cli.hardware import (
    DetectedHardware,
    check_profile,
    choose_profile,
    describe_profile,
    detect_hardware,
    profile_here,
)
from accel_gpt2.cli.launcher import (
    COMMAND_FILE,
    Launch,
    Launcher,
    Trainer,
    recorded_outcome,
    run_launch,
    starter,
    training_launch,
    use_expandable_segments,
    use_nvidia_smi_order,
)
from accel_gpt2.cli.options import TrainOptions, given_layers, is_own_recipe, train_command
from accel_gpt2.cli.output import is_main_process, print_line, say, warn
from accel_gpt2.cli.run_directory import (
    check_run_directory,
    default_run_directory,
    prepare_run_directory,
)
from accel_gpt2.durable import write_text
from accel_gpt2.errors import DoesNotFitError, ExitCode, StoppedEarly, UsageError, UserError
from accel_gpt2.parent import stop_with_parent
from accel_gpt2.plan.placement import Placement
from accel_gpt2.recipe import FIELDS, Layer, ResolvedRecipe
from accel_gpt2.recipe.resolving import resolve
from accel_gpt2.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from accel_gpt2.plan.search import RunPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainChoice:
    """Everything that is decided before anything is loaded.

    `strategy` is how one model is spread over the processes of a launch, `placement` how the models
    of the classes share the machine. `plan` is None where a launched process reads its run's own
    recipe, and for a model of unknown shape.
    """

    resolved: ResolvedRecipe
    profile: HardwareProfile
    strategy: ShardingStrategy
    placement: Placement
    hardware: DetectedHardware
    run_directory: Path
    plan: "RunPlan | None"
    warnings: tuple[str, ...]


def choose(
    options: TrainOptions,
    *,
    detect: Callable[[], DetectedHardware] = detect_hardware,
    launched: ShardingStrategy | None = None,
) -> TrainChoice:
    """Resolve the recipe here: defaults < model < plan < file < environment < options.

    Args:
        launched: the strategy that a launcher started this process with; it is no longer a choice.

    Raises:
        UserError: for a wrong recipe, an unknown profile, a machine that has not got what the
            profile promises, or what cannot be trained or fit in any way.
    """
    from accel_gpt2.cli.planning import asked_strategy, kept_choices, plan_here
    from accel_gpt2.plan.support import check_supported

    given = given_layers(options)
    asked = resolve(given)  # all complaints about what was typed, before looking around
    hardware = detect()
    profile = choose_profile(asked.recipe.profile, hardware)
    # By what was asked for: what a plan chooses may be another choice tomorrow.
    run_directory = options.output_dir or default_run_directory(asked.recipe)
    strategy = launched or asked_strategy(
        options.strategy, profile, profile_name=asked.recipe.profile
    )
    resolved, plan = asked, None
    warnings: list[str] = []
    if not is_own_recipe(options.recipe_file, options.output_dir):
        given = [*kept_choices(run_directory, profile, resume=options.resume), *given]
        plan = plan_here(given, profile_here(profile, hardware), depth="none", strategy=strategy)
        resolved, warnings = _planned(plan, given, profile)
    elif strategy is None:  # which is all that a run's own recipe leaves open
        plan = plan_here(given, profile_here(profile, hardware), depth="none")
    placement = resolved.recipe.placement
    placement = "sequential" if placement == "auto" else placement
    option = None if plan is None else plan.recommended or plan.smallest
    if option is not None:
        strategy = option.strategy
    elif strategy is None:
        spread = profile.num_gpus > 1 and placement == "sequential"
        strategy = STRATEGIES["ddp" if spread else "single"]
    check_supported(resolved.recipe, strategy, placement)
    precision = resolved.recipe.mixed_precision
    return TrainChoice(
        resolved=resolved,
        profile=profile,
        strategy=strategy,
        placement=placement,
        hardware=hardware,
        run_directory=run_directory,
        plan=plan,
        warnings=(*check_profile(asked.recipe.profile, profile, hardware, precision), *warnings),
    )


# The others are launched as one process too, which starts one of its own for each model.
_IN_ONE_LAUNCH: tuple[Placement, ...] = ("sequential", "shared-base")


def _planned(
    plan: "RunPlan | None", given: list[Layer], profile: HardwareProfile
) -> tuple[ResolvedRecipe, list[str]]:
    """The recipe that a plan leads to, and what is to be said about it.

    A plan can be wrong by a little, so what hardly misses is tried, with a warning: training looks
    for itself before its first step. What could not even hold its own lowest estimate is not.

    Raises:
        DoesNotFitError: with the nearest change that fits.
    """
    from accel_gpt2.cli.planning import does_not_fit, unknown_model_layer
    from accel_gpt2.plan.memory import covers

    if plan is None:
        return resolve([unknown_model_layer(profile), *given]), []
    if plan.recommended is not None:
        return plan.recommended.resolved, []
    smallest, model = plan.smallest, plan.model
    sentence = does_not_fit(plan)
    there = plan.profile.host_memory_bytes if profile.gpu is None else profile.gpu.memory_bytes
    if covers(smallest.recipe, model) and smallest.device.low > there:
        raise DoesNotFitError(sentence)
    return smallest.resolved, [f"{sentence} Trying it all the same."]


def start_training(options: TrainOptions, launcher: Launcher = run_launch) -> None:
    """Train one language model per class.

    Chooses the machine's settings, prints the `accelerate launch` command that it runs, and stays
    with it. Started again, it goes on where it was.
    """
    code = launch_training(options, launcher)
    if code != ExitCode.DONE:
        raise typer.Exit(code)


def launch_training(options: TrainOptions, launcher: Launcher = run_launch) -> int:
    """What `train` does; returns the exit code of the trainer.

    Raises:
        UserError: for all that can be known to be wrong before anything is loaded.
    """
    choice = choose(options)
    _announce(choice, quiet=options.quiet)
    check_run_directory(choice.run_directory, choice.resolved.recipe, resume=options.resume)
    launch = planned_launch(choice, options)
    if options.dry_run:
        show_recipe(choice.resolved)
        say(f"$ {launch.line}", style="bold")
        return ExitCode.DONE
    _preflight(choice)
    recipe = choice.resolved.recipe
    with claim(choice.run_directory):
        prepare_run_directory(choice.run_directory, recipe, resume=options.resume)
        write_text(choice.run_directory / COMMAND_FILE, launch.line + "\n")
        say(f"$ {launch.line}", style="bold")
        return launcher(launch)


def planned_launch(choice: TrainChoice, options: TrainOptions) -> Launch:
    """The command that trains what was chosen."""
    passed_on = [f"--resume={options.resume}"] if options.resume != "auto" else []
    passed_on += ["--quiet"] if options.quiet else []
    passed_on += ["--debug"] if options.debug else []
    return training_launch(
        choice.run_directory,
        strategy=choice.strategy,
        num_cores=choice.hardware.num_cores,
        num_processes=1 if choice.strategy.backend == "none" else max(1, choice.profile.num_gpus),
        options=passed_on,
    )


def train_here(options: TrainOptions) -> None:
    """Train one language model per class, in this process.

    This is what a launcher starts: `accelerate launch launch/train.py --profile rtx4070ti`.
    """
    from accel_gpt2.train.startup import launched_strategy

    stop_with_parent()
    launched = launched_strategy(os.environ)
    if options.strategy not in {"auto", launched.name}:
        raise UsageError(
            f"--strategy {options.strategy} is asked for, and this was launched as {launched.name}:"
            f" give `accelerate launch --config_file accelerate_configs/{options.strategy}.yaml`."
        )
    choice = choose(options, launched=launched)
    use_expandable_segments(choice.profile)
    use_nvidia_smi_order()
    if options.dry_run:
        if is_main_process():
            show_recipe(choice.resolved)
        return
    try:
        with recorded_outcome(choice.run_directory) as trainer, _watching_peers(trainer):
            _check_and_take(choice, options, trainer)
            _train(choice, options, trainer)
    except StoppedEarly:
        # A launcher adds a traceback to any exit code but 0; who waits reads status.json instead.
        if starter() is None:
            raise


@contextlib.contextmanager
def _watching_peers(trainer: Trainer) -> Iterator[None]:
    """Have one launched process's failure end all of them, recorded and reported like any other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from accel_gpt2.train.peers import watching_peers

    def last_words(error: Exception) -> None:
        trainer.record(error)
        report(error)
        trainer.leave_run_directory()

    with watching_peers(last_words):
        yield


def _check_and_take(choice: TrainChoice, options: TrainOptions, trainer: Trainer) -> None:
    """A directory that is not there yet is taken when it is made, once nothing else is wrong."""
    directory, recipe = choice.run_directory, choice.resolved.recipe
    if is_main_process():
        check_run_directory(directory, recipe, resume=options.resume, heir_of=starter())
        if directory.is_dir():
            trainer.take_run_directory()


def _train(choice: TrainChoice, options: TrainOptions, trainer: Trainer) -> None:
    if not is_own_recipe(options.recipe_file, options.output_dir):  # else `train` has said it
        _announce(choice, quiet=options.quiet)
    _use_device(choice)
    _preflight(choice)
    recipe = choice.resolved.recipe
    if is_main_process():
        trainer.take_run_directory()
        prepare_run_directory(choice.run_directory, recipe, resume=options.resume)
    from accel_gpt2.classify.fit import fit

    fit(choice.resolved, choice.run_directory, resume=options.resume, quiet=options.quiet)


def _use_device(choice: TrainChoice) -> None:
    """Have accelerate use what the profile says, and check that this torch can."""
    if choice.profile.gpu is None:
        if choice.strategy.is_sharded:  # accelerate would make DDP of it
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        else:
            os.environ["ACCELERATE_USE_CPU"] = "true"
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"This machine has a GPU ({choice.hardware.gpus[0].name}), but torch "
            f"{torch.__version__} cannot use it: install the CUDA build of torch, or give "
            "--profile cpu."
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        from accel_gpt2.train.startup import avoid_broken_links

        said = avoid_broken_links(os.environ)
        if said is not None:
            warn(said)
    num_gpus = choice.profile.num_gpus
    if world_size < num_gpus and choice.placement in _IN_ONE_LAUNCH:
        more = "--placement per-gpu"
        if choice.placement == "sequential":
            more = (
                "accelerate launch --config_file accelerate_configs/ddp.yaml "
                f"--num_processes {num_gpus}"
            )
        warn(
            f"Profile {choice.profile.name} has {num_gpus} GPUs, and {world_size} is used: give "
            f"`{more}` to use them all."
        )


def _preflight(choice: TrainChoice) -> None:
    from accel_gpt2.train.preflight import check_available

    check_available(choice.resolved.recipe)


def _announce(choice: TrainChoice, *, quiet: bool) -> None:
    for text in choice.warnings:
        warn(text)
    if not quiet:
        recipe = choice.resolved.recipe
        say(
            f"{recipe.model} ({recipe.init}, {recipe.finetuning}) on {recipe.dataset} with "
            f"{_machine(choice)}, into {choice.run_directory}"
        )
        if choice.plan is not None:
            say(f"Plan: {_outlook(choice.plan)}")


def _machine(choice: TrainChoice) -> str:
    if choice.profile.gpu is None:
        return f"the CPU ({choice.hardware.num_cores} cores)"
    return describe_profile(choice.profile)


def _outlook(plan: "RunPlan") -> str:
    """Memory and time in one line, and what did not fit where the recipe is a lesser one."""
    option = plan.recommended or plan.smallest
    usable = option.memory.usable_bytes
    there = "" if usable is None else f" of {format_bytes(usable)}"
    parts = [option.label, f"{format_bytes(option.device.expected)}{there} ({option.verdict})"]
    if option.seconds is not None:
        low, high = format_seconds(option.seconds.low), format_seconds(option.seconds.high)
        parts.append(f"{low} to {high}")
    lesser = [
        x.label for x in plan.failures if x.option is not None and option.level > x.option.level
    ]
    said = "; ".join(parts)
    return f"{said}. Does not fit: {'; '.join(lesser)}." if lesser else f"{said}."


_DOCUMENT_END = "...\n"  # PyYAML writes it after a plain scalar


def show_recipe(resolved: ResolvedRecipe) -> None:
    """Data: the recipe as YAML that can be read back; a comment says where a value comes from."""
    import yaml

    lines = []
    for key in FIELDS:
        value = getattr(resolved.recipe, key)
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10**6)
        line = f"{key}: {text.removesuffix(_DOCUMENT_END).strip()}"
        origin = resolved.origins[key]
        lines.append(line if origin == "default" else f"{line:<40}  # {origin}")
    print_line("\n".join(lines))


def launched_main() -> None:
    """The whole of `launch/train.py`."""
    app = plain_app()
    app.command()(train_command(train_here))
    run(app)
