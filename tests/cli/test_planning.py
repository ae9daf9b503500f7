"""How `train` follows a plan: this machine's memory, a begun run's recipe, and what has no plan."""

import dataclasses
from pathlib import Path

import pytest

from accel_gpt2.cli.hardware import DetectedGpu, DetectedHardware
from accel_gpt2.cli.options import TrainOptions, command_line_layers
from accel_gpt2.cli.train import TrainChoice, choose
from accel_gpt2.errors import DoesNotFitError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.recipe.layers import to_yaml
from accel_gpt2.units import MIB
from tests.cli.conftest import SUPER, CommandLine, machine

A100_80 = DetectedGpu(
    name="NVIDIA A100-SXM4-80GB", memory_bytes=81920 * MIB, compute_capability=(8, 0)
)


def chosen(
    hardware: DetectedHardware, *assignments: str, output_dir: Path | None = None, **values: object
) -> TrainChoice:
    layers = command_line_layers(values, list(assignments))
    return choose(TrainOptions(layers=layers, output_dir=output_dir), detect=lambda: hardware)


@pytest.mark.parametrize(("host_gib", "largest"), [(8, 2048), (128, 4096)])
def test_a_cpu_gets_the_micro_batch_that_its_memory_holds(host_gib: int, largest: int) -> None:
    """GPT-2 in 8 GiB of RAM: fewer tokens at once, the same global batch."""
    choice = chosen(machine(host_gib=host_gib), model="gpt2")
    recipe = choice.resolved.recipe
    assert recipe.micro_batch_tokens <= largest
    assert (recipe.finetuning, recipe.mixed_precision) == ("full", "no")
    assert recipe.global_batch_tokens == TrainRecipe().global_batch_tokens
    assert choice.plan is not None
    assert choice.plan.recommended is not None
    assert choice.plan.recommended.device.expected < host_gib * 2**30
    assert choice.plan.profile.host_memory_bytes == host_gib * 2**30


def test_small_models_keep_the_default_micro_batch() -> None:
    """What is far smaller than the memory is not cut."""
    recipe = chosen(machine(host_gib=4), model="gpt2-tiny").resolved.recipe
    assert (recipe.micro_batch_tokens, recipe.gradient_checkpointing) == (4096, False)


def test_a_begun_run_goes_on_with_what_it_was_planned_with(tmp_path: Path) -> None:
    """XL begun in pure bf16 on 16 GB stays that on 80 GB; how a step is cut is planned anew."""
    run = tmp_path / "run"
    first = chosen(machine(SUPER), model="gpt2-xl", output_dir=run).resolved.recipe
    assert (first.mixed_precision, first.optimizer) == ("pure_bf16", "adamw_8bit")
    (run / "class-0-negative").mkdir(parents=True)
    (run / "recipe.yaml").write_text(to_yaml(first), "utf-8")

    again = chosen(machine(A100_80), model="gpt2-xl", output_dir=run).resolved
    assert again.recipe.mixed_precision == "pure_bf16"
    assert again.recipe.optimizer == "adamw_8bit"
    assert again.origins["optimizer"] == str(run / "recipe.yaml")
    assert again.recipe.micro_batch_tokens > first.micro_batch_tokens

    anew = choose(
        TrainOptions(
            layers=command_line_layers({"model": "gpt2-xl"}, []), output_dir=run, resume="never"
        ),
        detect=lambda: machine(A100_80),
    )
    assert anew.resolved.recipe.optimizer == "adamw"


def test_a_gpus_run_goes_on_without_the_gpu_in_the_precision_of_the_cpu(tmp_path: Path) -> None:
    """bf16 is kept on every GPU, and is no precision for a CPU."""
    begun = dataclasses.replace(TrainRecipe(), mixed_precision="bf16")
    (tmp_path / "class-0-negative").mkdir()
    (tmp_path / "recipe.yaml").write_text(to_yaml(begun), "utf-8")
    recipe = chosen(machine(), output_dir=tmp_path).resolved.recipe
    assert recipe.mixed_precision == "no"


def test_the_run_directory_does_not_follow_the_plan() -> None:
    """On 12 GB the plan takes another recipe than on 80 GB, and the run is found again."""
    small = DetectedGpu(
        name="NVIDIA GeForce RTX 4070 Ti", memory_bytes=12282 * MIB, compute_capability=(8, 9)
    )
    here, there = chosen(machine(small), model="gpt2-xl"), chosen(machine(A100_80), model="gpt2-xl")
    assert here.resolved.recipe.optimizer != there.resolved.recipe.optimizer
    assert here.run_directory == there.run_directory == Path("runs/imdb-gpt2-xl")
    assert chosen(machine(A100_80), finetuning="lora").run_directory == Path("runs/imdb-gpt2-lora")


def test_what_hardly_misses_is_tried_with_a_warning() -> None:
    """A plan may be a little wrong: training looks for itself before its first step."""
    choice = chosen(
        machine(SUPER, host_gib=8), model="gpt2-large", finetuning="full", optimizer="adamw",
        mixed_precision="bf16", gradient_checkpointing=False,
    )  # fmt: skip
    assert choice.resolved.recipe.micro_batch_tokens == 1024
    (warning,) = choice.warnings
    assert "gpt2-large does not fit on RTX 4070 Ti SUPER 16 GB as asked" in warning
    assert warning.endswith("Give --gradient-checkpointing. Trying it all the same.")


def test_what_cannot_fit_is_not_tried() -> None:
    """XL with fp32 weights needs far more than there is, on the card and on the host: exit code
    3, and what to give."""
    with pytest.raises(
        DoesNotFitError,
        match=r"gpt2-xl does not fit .* needs 25\.\d GiB .*Give --mixed-precision pure_bf16",
    ) as caught:
        chosen(
            machine(SUPER, host_gib=16),
            model="gpt2-xl",
            finetuning="full",
            mixed_precision="bf16",
            optimizer="adamw",
        )
    assert caught.value.exit_code == 3


def test_what_fits_with_the_host_alone_steps_there() -> None:
    """XL with fp32 weights, as it was asked, on 16 GB and a host that holds its states."""
    choice = chosen(
        machine(SUPER, host_gib=64), model="gpt2-xl", finetuning="full", mixed_precision="bf16"
    )
    assert choice.strategy.name == "zero2_offload"
    assert choice.plan is not None
    assert choice.plan.recommended is not None


@pytest.mark.parametrize(
    ("model", "objective"),
    [("roberta-base", "classification"), ("roberta-base", "masked_lm"), ("gpt2", "hybrid"),
     ("gpt2", "classification")],
)  # fmt: skip
@pytest.mark.parametrize("hardware", [machine(SUPER), machine(host_gib=4)], ids=["gpu", "cpu"])
def test_what_no_formula_covers_is_trained_as_it_was_asked(
    hardware: DetectedHardware, model: str, objective: str
) -> None:
    """A guess may cut a step; the weights, the optimizer and the precision are the defaults."""
    recipe = chosen(hardware, f"objective={objective}", model=model).resolved.recipe
    assert (recipe.finetuning, recipe.optimizer) == ("full", "adamw")
    assert recipe.mixed_precision == ("bf16" if hardware.gpus else "no")


def test_an_encoder_that_could_not_fit_is_tried_all_the_same() -> None:
    """The margin of a guess refuses nothing."""
    choice = chosen(machine(host_gib=1), "objective=masked_lm", model="roberta-large")
    assert choice.resolved.recipe.finetuning == "full"
    assert any("Trying it all the same" in warning for warning in choice.warnings)


def test_a_model_of_unknown_shape_gets_careful_values() -> None:
    """A hub id: a small micro batch with checkpointing on a GPU, and nothing else is changed."""
    choice = chosen(machine(SUPER), model="someone/something")
    recipe = choice.resolved.recipe
    assert choice.plan is None
    assert (recipe.micro_batch_tokens, recipe.gradient_checkpointing) == (1024, True)
    assert (recipe.mixed_precision, recipe.optimizer) == ("bf16", "adamw")
    assert not chosen(machine(), model="someone/something").resolved.recipe.gradient_checkpointing


@pytest.mark.parametrize("content", ["{", '{"model_type": "gpt2"}', '{"n_layer": "x"}', "[]"])
def test_a_config_that_says_nothing_is_a_model_of_unknown_shape(
    tmp_path: Path, content: str
) -> None:
    """A damaged config.json is for the training to complain about."""
    (tmp_path / "config.json").write_text(content, "utf-8")
    assert chosen(machine(), model=str(tmp_path)).plan is None


def test_training_begins_with_its_memory_and_its_time(
    accel_gpt2: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what the plan expects."""
    ended = accel_gpt2("train", "--dry-run", "--model", "gpt2", "--dataset", "ag_news")
    (line,) = [x for x in ended.stderr.splitlines() if x.startswith("Plan: ")]
    assert "full fine-tuning, fp32, AdamW; " in line or "bf16" in line
    assert " GiB (fits); " in line
