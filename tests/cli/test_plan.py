"""`plan`: what is printed, at which width, for which machine, and that nothing heavy is loaded."""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from accel_gpt2.cli.options import TrainOptions, command_line_layers
from accel_gpt2.cli.plan import make_plan
from accel_gpt2.cli.train import choose
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.recipe.resolving import resolve
from tests.cli.conftest import SUPER, CommandLine, machine

LARGE = ("plan", "--model", "gpt2-large", "--profile", "rtx4070ti")


def document(accel_gpt2: CommandLine, *arguments: str) -> dict[str, Any]:
    ended = accel_gpt2("plan", "--json", *arguments)
    assert ended.returncode == 0, ended.stderr
    content: dict[str, Any] = json.loads(ended.stdout)
    return content


def test_the_plan_is_planned_without_torch_and_at_once() -> None:
    """A fresh process loads no torch, transformers or numpy, and takes well under a second."""
    code = (
        "import sys; sys.argv = ['accel-gpt2', *sys.argv[1:]]\n"
        "from accel_gpt2.cli.app import main\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'numpy', 'matplotlib'}\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run(
        [sys.executable, "-c", code, *LARGE], capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.stderr.splitlines()[-1] == "[]"
    assert "Recommended" in ended.stdout
    # CPU seconds, since another test may have the cores; half of one on a desktop.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2.0


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_recommendation_is_shown_with_its_memory_time_and_command(
    accel_gpt2: CommandLine, columns: str
) -> None:
    """At every width: the recipe, a bar that ends at the limit, why not others, what to type."""
    ended = accel_gpt2(*LARGE, "--set", "price_usd_per_hour=0.5", COLUMNS=columns)
    assert ended.returncode == 0
    text = ended.stdout
    assert "Recommended: full fine-tuning, bf16, AdamW, 31 blocks checkpointed\n" in text
    bar = next(line for line in text.splitlines() if line.startswith("  █") and "|" in line)
    assert len(bar) <= int(columns)
    assert "15.7 GiB  can be used" in text
    assert "tokens/s, MFU" in text
    assert ", at $0.5 an hour" in text
    assert "Next best:" in text
    assert "accel-gpt2 train --model gpt2-large --profile rtx4070ti --set price_usd_" in text
    assert "\x1b" not in text  # plain where stdout is no terminal


def test_what_does_not_fit_has_a_reason(accel_gpt2: CommandLine) -> None:
    """GPT-2 XL: fp32 weights need more than the card has, and the line says how much."""
    ended = accel_gpt2("plan", "--model", "gpt2-xl", "--profile", "rtx4070ti", COLUMNS="200")
    rejected = ended.stdout.split("Rejected:")[1]
    assert "full fine-tuning, bf16, 8-bit AdamW, checkpointing, 8,192 tokens" in rejected
    assert "GiB of GPU memory, and 15.7 GiB can be used" in rejected


def test_json_holds_the_whole_plan(accel_gpt2: CommandLine) -> None:
    """The keys of the documentation; terms sum up to the peak, which is the largest phase."""
    plan = document(accel_gpt2, "--model", "gpt2", "--profile", "rtx4070ti")
    assert plan["fits"] is True
    memory, time = plan["memory"], plan["time"]
    assert memory["allocated_bytes"] == sum(term["bytes"] for term in memory["terms"])
    assert memory["allocated_bytes"] == max(phase["bytes"] for phase in memory["phases"])
    (peak,) = [x for x in memory["phases"] if x["name"] == memory["peak_phase"]]
    assert peak["bytes"] == memory["allocated_bytes"]
    assert memory["allocated_bytes"] <= memory["reserved_bytes"] <= memory["device_bytes"]
    assert memory["device_bytes"] <= memory["usable_bytes"]
    assert time["low_seconds"] < time["seconds"] < time["high_seconds"]
    assert set(plan["recipe"]) == {field.name for field in dataclasses.fields(TrainRecipe)}
    assert plan["alternatives"]
    assert all(x["reason"] for x in plan["rejected"] + plan["alternatives"])
    everything = document(accel_gpt2, "--model", "gpt2", "--profile", "rtx4070ti", "--all")
    assert len(everything["rejected"]) > len(plan["rejected"]) + len(plan["alternatives"])


def test_nothing_that_fits_is_exit_code_3_with_the_nearest_change(accel_gpt2: CommandLine) -> None:
    """What was pinned is named with what it needs, and the change fits when it is typed."""
    pinned = ("--model", "gpt2-xl", "--profile", "rtx4070ti", "--finetuning", "full")
    pinned += ("--mixed-precision", "bf16", "--strategy", "single")
    ended = accel_gpt2("plan", "--json", *pinned)
    assert ended.returncode == 3
    assert json.loads(ended.stdout)["fits"] is False
    assert "gpt2-xl does not fit on RTX 4070 Ti SUPER 16 GB as asked" in ended.stderr
    change = ended.stderr.split("Give ")[1].strip().rstrip(".").split()
    assert change == ["--mixed-precision", "pure_bf16"]
    assert accel_gpt2("plan", *pinned, *change).returncode == 0


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        ("gradients", "gradients\n  embedding backward: "),
        ("OPTIMIZER ST", "optimizer state\n  forward: "),
    ],
)
def test_a_term_is_explained(accel_gpt2: CommandLine, term: str, expected: str) -> None:
    """By name or a part of it: the bytes in each phase, and the sentence with the formula."""
    ended = accel_gpt2(*LARGE, "--explain", term)
    assert ended.returncode == 0
    assert expected in ended.stdout
    assert " bytes). " in ended.stdout


@pytest.mark.parametrize(
    ("term", "options", "expected"),
    [
        ("16-bit copies", ("--mixed-precision", "no"), "there under autocast: fp32 weights"),
        ("adapters", (), "there with LoRA and QLoRA"),
    ],
)
def test_a_term_that_is_absent_says_when_it_is_there(
    accel_gpt2: CommandLine, term: str, options: tuple[str, ...], expected: str
) -> None:
    """No bytes, no formula: the one phrase."""
    ended = accel_gpt2(
        "plan", "--model", "gpt2", "--profile", "a100-80", *options, "--explain", term
    )
    assert ended.returncode == 0
    assert f"none with this recipe: it is {expected}" in ended.stdout
    assert "bytes)" not in ended.stdout


def test_an_unknown_term_lists_all(accel_gpt2: CommandLine) -> None:
    """A slip is a usage error that names the nearest."""
    ended = accel_gpt2(*LARGE, "--explain", "gradiens")
    assert ended.returncode == 2
    assert "no term is called so. Did you mean 'gradients'?" in ended.stderr
    assert "optimizer state" in ended.stderr


def test_a_preference_is_carried_into_the_command(accel_gpt2: CommandLine) -> None:
    """`train` has no --prefer, so the command holds what it chose; and chooses the same."""
    plan = document(accel_gpt2, "--model", "gpt2", "--profile", "rtx4070ti", "--prefer", "memory")
    words = plan["command"].split()
    assert words[:2] == ["accel-gpt2", "train"]
    again = document(accel_gpt2, *words[2:])
    assert again["recipe"] == plan["recipe"]
    assert plan["recipe"]["gradient_checkpointing"] is True


def test_the_picture_is_a_png(accel_gpt2: CommandLine, tmp_path: Path) -> None:
    """--plot writes a file beside the text."""
    ended = accel_gpt2(*LARGE, "--plot", "memory.png")
    assert ended.returncode == 0
    assert "Recommended" in ended.stdout
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_every_cell_and_what_became_of_the_crosses(accel_gpt2: CommandLine) -> None:
    """Eight tables of seven machines, four crosses, and a sentence for each."""
    text = accel_gpt2("plan", "--table", COLUMNS="120").stdout
    assert text.count("\n4x-rtx3090") == 8
    assert text.count("✗") == 4 + 1  # and the legend
    for title in ("two mediums in parallel", "four smalls in parallel", "large", "XL"):
        assert f"On 16 GB, {title}: fits with " in text
    ended = accel_gpt2("plan", "--table", "--model", "gpt2")
    assert ended.returncode == 2
    assert "leave out --model" in ended.stderr


def test_a_model_of_unknown_shape_is_said(accel_gpt2: CommandLine) -> None:
    """A hub id has no shape here."""
    ended = accel_gpt2("plan", "--model", "someone/something", "--profile", "rtx4070ti")
    assert ended.returncode == 2
    assert "The shape of 'someone/something' is not known here" in ended.stderr


def test_a_folder_with_a_gpt2_is_planned_by_its_config(
    accel_gpt2: CommandLine, tmp_path: Path
) -> None:
    """The same shape in a folder is the same plan as the catalog's row."""
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    arguments = ("--profile", "rtx4070ti", "--dataset", "ag_news")
    mine = document(accel_gpt2, "--model", "./mine", *arguments)
    assert mine["memory"] == document(accel_gpt2, "--model", "gpt2", *arguments)["memory"]


@pytest.mark.parametrize("name", ["rtx4070ti", "auto"])
def test_train_does_what_the_plan_says(name: str) -> None:
    """On the machine that a plan was made for, `train` resolves to the recommended recipe."""
    options = TrainOptions(layers=command_line_layers({"model": "gpt2-large", "profile": name}, []))

    def detect() -> Any:
        return machine(SUPER, host_gib=32)

    plan = make_plan(options, detect=detect)
    assert plan.recommended is not None
    assert choose(options, detect=detect).resolved == plan.recommended.resolved
    assert resolve(options.layers).recipe != plan.recommended.recipe


@pytest.mark.slow
def test_what_no_formula_covers_is_traced(accel_gpt2: CommandLine) -> None:
    """An encoder with a head: the bytes of its own step, in place of a guess."""
    arguments = ("--model", "roberta-tiny", "--set", "objective=classification")
    ended = accel_gpt2("plan", "--json", "--profile", "rtx4070ti", *arguments)
    assert ended.returncode == 0, ended.stderr
    memory = json.loads(ended.stdout)["memory"]
    assert memory["source"] == "trace"
    assert "margin" not in {term["name"] for term in memory["terms"]}
    assert "tracing a step" in ended.stderr
