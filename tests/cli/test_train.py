"""`train` and `launch/train.py`: what is decided, written and launched, and when it stops."""

import dataclasses
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest
import yaml

from accel_gpt2.catalog.strategies import STRATEGIES
from accel_gpt2.cli.hardware import DetectedHardware
from accel_gpt2.cli.launcher import Launch
from accel_gpt2.cli.options import StrategyChoice, TrainOptions, command_line_layers
from accel_gpt2.cli.train import (
    choose,
    launch_training,
    planned_launch,
    show_recipe,
    train_here,
)
from accel_gpt2.errors import DoesNotFitError, UsageError, UserError
from accel_gpt2.recipe import Layer, PlacementChoice, TrainRecipe
from accel_gpt2.recipe.layers import read_layer, to_yaml
from accel_gpt2.recipe.resolving import resolve
from tests.cli.conftest import SUPER, CommandLine, machine


def options(
    *assignments: str,
    recipe_file: Path | None = None,
    output_dir: Path | None = None,
    resume: str = "auto",
    dry_run: bool = False,
    **values: object,
) -> TrainOptions:
    """Options as the command line hands them on."""
    return TrainOptions(
        layers=command_line_layers(values, list(assignments)),
        recipe_file=recipe_file,
        output_dir=output_dir,
        resume=resume,
        dry_run=dry_run,
        quiet=True,
    )


def on(hardware: DetectedHardware) -> Callable[[], DetectedHardware]:
    """Detection that finds this machine."""
    return lambda: hardware


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A data set of two classes in a folder with train.csv and test.csv."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for split, count in (("train", 60), ("test", 20)):
        rows = [
            f"{word} number {i} of {split},{label}"
            for i in range(count)
            for word, label in (("apples and pears", "fruit"), ("hammer and nails", "tools"))
        ]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n", "utf-8")
    return folder


class Recorder:
    """A launcher that starts nothing: it keeps what would run, and ends with a given code."""

    def __init__(self, code: int = 0) -> None:
        self.launches: list[Launch] = []
        self.code = code

    def __call__(self, launch: Launch) -> int:
        self.launches.append(launch)
        return self.code


def test_the_defaults_are_gpt2_on_imdb_on_this_machine() -> None:
    """Without any option: the person's own experiment, with the detected card's settings."""
    choice = choose(options(), detect=on(machine(SUPER)))
    recipe = choice.resolved.recipe
    assert (recipe.model, recipe.dataset, recipe.init) == ("gpt2", "imdb", "pretrained")
    assert choice.profile.name == "rtx4070ti"
    assert choice.run_directory == Path("runs/imdb-gpt2")
    assert choice.resolved.origins["mixed_precision"] == "plan for rtx4070ti"
    assert recipe.mixed_precision == "bf16"
    assert choice.warnings == ()


def test_layers_come_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """defaults < model < plan < file < environment < options, each named as the origin."""
    file = tmp_path / "mine.yaml"
    file.write_text("micro_batch_tokens: 111\nepochs: 9.0\nseed: 1\n", "utf-8")
    monkeypatch.setenv("ACCEL_GPT2_SEED", "2")
    monkeypatch.setenv("ACCEL_GPT2_EPOCHS", "8")
    choice = choose(
        options(recipe_file=file, model="gpt2-tiny", epochs=7.0), detect=on(machine(SUPER))
    )
    recipe, origins = choice.resolved.recipe, choice.resolved.origins
    assert (recipe.micro_batch_tokens, origins["micro_batch_tokens"]) == (111, str(file))
    assert (recipe.seed, origins["seed"]) == (2, "the environment (ACCEL_GPT2_...)")
    assert (recipe.epochs, origins["epochs"]) == (7.0, "--epochs")
    assert (recipe.mixed_precision, origins["mixed_precision"]) == ("bf16", "plan for rtx4070ti")
    assert (recipe.init, origins["init"]) == ("scratch", "model gpt2-tiny")
    assert origins["lora_rank"] == "default"


def test_without_a_gpu_the_profile_gives_the_values_of_the_cpu() -> None:
    """`--profile rtx4070ti` on a laptop: fp32 on the CPU, with a sentence."""
    choice = choose(options(profile="rtx4070ti"), detect=on(machine()))
    assert choice.resolved.recipe.mixed_precision == "no"
    assert choice.resolved.recipe.profile == "rtx4070ti"
    assert choice.resolved.origins["mixed_precision"] == "plan for cpu"
    (warning,) = choice.warnings
    assert "no GPU was found: running on the CPU" in warning


@pytest.mark.parametrize("name", ["auto", "cpu", "rtx4070ti"])
def test_no_profile_changes_the_global_batch(name: str) -> None:
    """Every machine trains the same model."""
    choice = choose(options(profile=name), detect=on(machine(SUPER)))
    assert choice.resolved.recipe.global_batch_tokens == TrainRecipe().global_batch_tokens
    assert choice.resolved.origins["global_batch_tokens"] == "default"


def test_a_machine_that_is_too_small_stops_before_anything() -> None:
    """Two cards promised, one there: exit code 3."""
    with pytest.raises(DoesNotFitError, match="Give --profile rtx4070ti"):
        choose(options(profile="2x-rtx4070ti"), detect=on(machine(SUPER)))


def test_a_runs_own_recipe_is_not_changed_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option beat the environment when the recipe was resolved; the launched process must see
    the same."""
    monkeypatch.setenv("ACCEL_GPT2_SEED", "3")
    recipe = dataclasses.replace(TrainRecipe(), seed=5, micro_batch_tokens=77)
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe), "utf-8")
    own = options(recipe_file=tmp_path / "recipe.yaml", output_dir=tmp_path)
    assert choose(own, detect=on(machine(SUPER))).resolved.recipe == recipe
    elsewhere = options(recipe_file=tmp_path / "recipe.yaml", output_dir=tmp_path / "other")
    assert choose(elsewhere, detect=on(machine(SUPER))).resolved.recipe.seed == 3


@pytest.mark.parametrize(("placement", "is_spread"), [("per-gpu", False), ("sequential", True)])
def test_a_runs_own_recipe_leaves_the_strategy_open(
    tmp_path: Path, placement: PlacementChoice, is_spread: bool
) -> None:
    """It belongs to the launch: another machine goes on with the run in its own way."""
    recipe = dataclasses.replace(TrainRecipe(), placement=placement, mixed_precision="bf16")
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe), "utf-8")
    own = options(recipe_file=tmp_path / "recipe.yaml", output_dir=tmp_path)
    choice = choose(own, detect=on(machine(SUPER, SUPER)))
    assert choice.resolved.recipe == recipe
    assert choice.placement == placement
    assert (choice.strategy.backend != "none") == is_spread


def test_training_is_launched_with_the_one_file_that_it_reads(texts: Path, tmp_path: Path) -> None:
    """The run directory holds the resolved recipe, the launch config and the command that ran."""
    run_directory = tmp_path / "run"
    recorder = Recorder()
    given = options(model="gpt2-tiny", dataset=str(texts), seed=4, output_dir=run_directory)
    assert launch_training(given, recorder) == 0

    (launch,) = recorder.launches
    written = resolve([read_layer(run_directory / "recipe.yaml")]).recipe
    assert (written.seed, written.model, written.dataset) == (4, "gpt2-tiny", str(texts))
    assert (run_directory / "command.txt").read_text("utf-8") == launch.line + "\n"
    assert f"--recipe={run_directory / 'recipe.yaml'}" in launch.argv
    (config,) = [x for x in launch.argv if x.startswith("--config_file=")]
    assert config.endswith("accelerate_configs/single.yaml")
    assert {"--num_processes=1", "--strategy=single"} <= set(launch.argv)
    # The launched process, reading that file, arrives at the very same recipe.
    own = options(recipe_file=run_directory / "recipe.yaml", output_dir=run_directory)
    assert choose(own).resolved.recipe == written


@pytest.mark.parametrize(("strategy", "num_processes"), [("ddp", 2), ("single", 1)], ids=str)
def test_the_strategy_that_is_asked_for_is_launched(
    strategy: StrategyChoice, num_processes: int
) -> None:
    """With its file, and as many processes as the profile has GPUs, or one."""
    given = dataclasses.replace(options(model="gpt2"), strategy=strategy)
    choice = choose(given, detect=on(machine(SUPER, SUPER)))
    assert (choice.strategy.name, choice.plan is not None) == (strategy, True)
    argv = planned_launch(choice, given).argv
    assert f"--strategy={strategy}" in argv
    assert f"--num_processes={num_processes}" in argv
    assert any(x.endswith(f"accelerate_configs/{strategy}.yaml") for x in argv)


def test_a_strategy_for_several_gpus_needs_them() -> None:
    """It is refused before anything is planned, with what to type."""
    given = dataclasses.replace(options(model="gpt2"), strategy="ddp")
    with pytest.raises(UsageError, match=r"--strategy ddp .* over 2 GPUs or more, and .* has 1: "):
        choose(given, detect=on(machine(SUPER)))
    given = dataclasses.replace(options(model="gpt2", profile="2x-rtx4070ti"), strategy="zero3")
    with pytest.raises(UsageError, match="GPUs of profile 2x-rtx4070ti none can be used here: "):
        choose(given, detect=on(machine()))


@pytest.mark.parametrize("launched", ["ddp", "single"])
def test_a_launched_process_plans_for_what_it_was_launched_as(launched: str) -> None:
    """Whatever would be better on this machine, it is no longer a choice."""
    choice = choose(
        options(model="gpt2", profile="2x-rtx4070ti", placement="sequential"),
        detect=on(machine(SUPER, SUPER)),
        launched=STRATEGIES[launched],
    )
    assert choice.strategy.name == launched
    assert choice.plan is not None
    assert choice.plan.recommended is not None
    assert choice.plan.recommended.strategy.name == launched


def test_a_launcher_that_started_something_else_is_found_out() -> None:
    """What `accel-gpt2 train` passes on is held against what its launcher started."""
    with pytest.raises(UsageError, match="zero3 is asked for, and this was launched as single: "):
        train_here(dataclasses.replace(options(model="gpt2-tiny"), strategy="zero3"))


def test_what_excludes_each_other_is_refused_before_loading() -> None:
    """The reason, and the nearest that works."""
    given = options(model="gpt2", placement="per-gpu", mixed_precision="bf16")
    with pytest.raises(
        UsageError,
        match=r"as asked: each model has one process there.*; give --placement sequential or",
    ):
        choose(
            dataclasses.replace(given, strategy="ddp"),
            detect=on(machine(SUPER, SUPER)),
        )


def test_the_trainers_code_is_the_commands_code(texts: Path, tmp_path: Path) -> None:
    """75 and 4 are passed on as they are."""
    given = options(model="gpt2-tiny", dataset=str(texts), output_dir=tmp_path / "run")
    assert launch_training(given, Recorder(75)) == 75
    assert launch_training(given, Recorder(4)) == 4


def test_a_dry_run_writes_and_starts_nothing(tmp_path: Path) -> None:
    """--dry-run leaves no trace."""
    recorder = Recorder()
    assert launch_training(options(output_dir=tmp_path / "run", dry_run=True), recorder) == 0
    assert recorder.launches == []
    assert list(tmp_path.iterdir()) == []


def test_missing_data_stops_before_the_run_directory(tmp_path: Path) -> None:
    """What is not to be had is said at once, and no folder is left behind."""
    given = options(
        model="gpt2-tiny", dataset=str(tmp_path / "none.csv"), output_dir=tmp_path / "run"
    )
    recorder = Recorder()
    with pytest.raises(UserError, match=r"none\.csv"):
        launch_training(given, recorder)
    assert recorder.launches == []
    assert not (tmp_path / "run").exists()


@pytest.fixture
def begun(texts: Path, tmp_path: Path) -> Path:
    """A run directory in which a class has been begun."""
    run_directory = tmp_path / "run"
    given = options(model="gpt2-tiny", dataset=str(texts), output_dir=run_directory)
    launch_training(given, Recorder())
    (run_directory / "class-0-fruit").mkdir()
    return run_directory


def test_a_begun_run_goes_on_with_the_same_recipe(texts: Path, begun: Path) -> None:
    """The same command again is a resume; how the run goes may differ."""
    given = options("log_every_steps=1", model="gpt2-tiny", dataset=str(texts), output_dir=begun)
    assert launch_training(given, Recorder()) == 0


def test_a_begun_run_does_not_go_on_with_another_recipe(texts: Path, begun: Path) -> None:
    """Another learning rate would mix two experiments: all differences are named, with ways out."""
    given = options(
        model="gpt2-tiny", dataset=str(texts), learning_rate=1.0, seed=9, output_dir=begun
    )
    before = (begun / "recipe.yaml").read_text("utf-8")
    with pytest.raises(UsageError, match=r"learning_rate: 0\.002 there, 1\.0 here") as caught:
        launch_training(given, Recorder())
    assert "seed: 0 there, 9 here" in str(caught.value)
    assert "--resume never" in str(caught.value)
    assert (begun / "recipe.yaml").read_text("utf-8") == before
    anew = dataclasses.replace(given, resume="never")
    recorder = Recorder()
    assert launch_training(anew, recorder) == 0
    assert "--resume=never" in recorder.launches[0].argv


def test_a_run_that_has_trained_nothing_may_change(texts: Path, begun: Path) -> None:
    """A start that failed early does not tie anybody to its recipe."""
    (begun / "class-0-fruit").rmdir()
    given = options(model="gpt2-tiny", dataset=str(texts), seed=9, output_dir=begun)
    assert launch_training(given, Recorder()) == 0
    assert resolve([read_layer(begun / "recipe.yaml")]).recipe.seed == 9


def test_a_folder_of_other_things_is_not_written_into(tmp_path: Path) -> None:
    """`--output-dir .` in a home directory is refused."""
    (tmp_path / "holiday.jpg").touch()
    given = options(output_dir=tmp_path, dry_run=True)
    with pytest.raises(UsageError, match=r"holds files and no recipe\.yaml"):
        launch_training(given, Recorder())
    with pytest.raises(UsageError, match=r"holiday\.jpg is a file"):
        launch_training(dataclasses.replace(given, output_dir=tmp_path / "holiday.jpg"), Recorder())


def test_two_trainers_do_not_share_a_run_directory(texts: Path, begun: Path) -> None:
    """While a trainer is at work, a second one is told which process that is."""
    import psutil

    with subprocess.Popen(["sleep", "60"]) as other:
        created = psutil.Process(other.pid).create_time()
        record = {"pid": other.pid, "create_time": created, "host": socket.gethostname()}
        record |= {"command": "accel-gpt2 train", "started_at": "2026-11-23T08:00:00+00:00"}
        (begun / "owner.json").write_text(json.dumps(record))
        given = options(model="gpt2-tiny", dataset=str(texts), output_dir=begun)
        with pytest.raises(UserError, match=rf"Process {other.pid} on .* is at work in"):
            launch_training(given, Recorder())
        other.kill()
    assert launch_training(given, Recorder()) == 0


def test_of_two_starts_at_the_same_moment_one_prepares_and_launches(
    texts: Path, tmp_path: Path
) -> None:
    """The recipe that the trainer will read is not that of the start that lost."""
    # The lengths of the texts are read here and kept: a fork has none of the threads that read.
    choose(options(model="gpt2-tiny", dataset=str(texts)))
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def start(run: Path, seed: int, together: Barrier, refused: Event) -> None:
        given = options(model="gpt2-tiny", dataset=str(texts), seed=seed, output_dir=run)

        def launcher(launch: Launch) -> int:
            results.put((seed, "launched"))
            refused.wait(timeout=20)
            seeds.append(resolve([read_layer(run / "recipe.yaml")]).recipe.seed)
            return 0

        seeds: list[int] = []
        together.wait()
        try:
            launch_training(given, launcher)
            results.put((seed, f"read {seeds}"))
        except UserError as error:
            results.put((seed, str(error)))
            refused.set()

    for number in range(4):
        together, refused = context.Barrier(2), context.Event()
        run = tmp_path / f"run-{number}"
        starts = [
            context.Process(target=start, args=(run, seed, together, refused)) for seed in (1, 2)
        ]
        for process in starts:
            process.start()
        answers = [results.get(timeout=60) for _ in range(3)]
        for process in starts:
            process.join()
        (winner,) = [seed for seed, answer in answers if answer == "launched"]
        said = {answer for _, answer in answers} - {"launched"}
        (refusal,) = said - {f"read [{winner}]"}
        assert "is at work in" in refusal


def test_a_shown_recipe_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    """--dry-run prints YAML: the same recipe again, with origins as comments on what is chosen."""
    resolved = resolve(
        [
            Layer(origin="--model", values={"model": "gpt2-tiny"}),
            Layer(origin="--set", values={"class_names": ("no", "é: #1"), "dataset": "a b"}),
        ]
    )
    show_recipe(resolved)
    text = capsys.readouterr().out
    assert resolve([Layer(origin="", values=yaml.safe_load(text))]).recipe == resolved.recipe
    commented = {line.partition(":")[0]: line for line in text.splitlines() if "  # " in line}
    assert commented["model"].endswith("# --model")
    assert commented["learning_rate"].endswith("# model gpt2-tiny")
    assert set(commented) == {k for k, origin in resolved.origins.items() if origin != "default"}


def test_dry_run_prints_the_recipe_to_stdout_and_the_command_to_stderr(
    accel_gpt2: CommandLine,
) -> None:
    """`train --dry-run > recipe.yaml` gives a recipe file, and the command is there to read."""
    ended = accel_gpt2("train", "--dry-run", "--model", "gpt2-tiny", "--dataset", "docstrings")
    assert ended.returncode == 0
    assert yaml.safe_load(ended.stdout)["model"] == "gpt2-tiny"
    assert "$ " in ended.stderr
    assert "accelerate launch --quiet --config_file=" in ended.stderr


def test_the_launched_script_has_the_same_options(accel_gpt2: CommandLine) -> None:
    """launch/train.py and `train` take the same options, word for word."""
    repository = Path(__file__).parents[2]
    script = subprocess.run(
        [sys.executable, str(repository / "launch" / "train.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    verb = accel_gpt2("train", "--help").stdout
    assert script.split("Options:")[1] == verb.split("Options:")[1]
    assert "--gradient-checkpointing / --no-gradient-checkpointing" in script


_WHAT_TORCH_FINDS = """
import os, runpy, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("torch."):  # torch itself is also looked for without being imported
            print(os.environ.get("PYTORCH_ALLOC_CONF"))
            sys.stdout.flush()
            os._exit(0)

sys.meta_path.insert(0, Finder())
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("mine", [None, "max_split_size_mb:64"])
def test_torch_finds_its_allocators_setting(texts: Path, tmp_path: Path, mine: str | None) -> None:
    """launch/train.py, however it was started, sets it before torch is imported by anything."""
    card = "GPU-aaaa1111, NVIDIA GeForce RTX 4070 Ti SUPER, 16376, 8.9"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{card}'\n", "utf-8")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {} if mine is None else {"PYTORCH_ALLOC_CONF": mine}
    script = str(Path(__file__).parents[2] / "launch" / "train.py")
    given = ["--model=gpt2-tiny", "--profile=rtx4070ti", f"--dataset={texts}"]
    ended = subprocess.run(
        [sys.executable, "-c", _WHAT_TORCH_FINDS, script, *given, f"--output-dir={tmp_path}/run"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.strip() == (mine or "expandable_segments:True")
