"""Recipes that are not what they should be: files, options and variables."""

import json
import os
from pathlib import Path

import pytest

from accel_gpt2.recipe import FIELDS, TrainRecipe
from accel_gpt2.recipe.layers import to_yaml
from tests.fuzz.harness import Case, Content, check_case, run_command, train_argv

DRY_RUN = ("accel-gpt2", "train", "--dry-run")


def recipe_file(content: Content, said: str, id: str, *, name: str = "my.yaml") -> Case:
    """`train --recipe FILE`; a recipe is read before anything else, so a dry run is enough."""
    return Case(
        id=f"{id}-{name.rpartition('.')[2]}",
        argv=(*DRY_RUN, f"--recipe={name}"),
        files={name: content},
        said=said,
        exit_codes=(2,),
    )


def value(key: str, content: str, said: str, id: str) -> Case:
    """One value of a YAML recipe."""
    return recipe_file(f"{key}: {content}\n", said, f"{key}-{id}")


BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)

NUMBERS = ("learning_rate", "epochs", "dropout", "weight_decay", "lora_alpha", "max_grad_norm")
COUNTS = ("max_length", "max_steps", "lora_rank", "global_batch_tokens", "tokenizer_vocab_size")
NAMES = ("model", "dataset", "tokenizer", "profile", "train_split", "text_field")

# Each a letter or a word away from a real key, and the key that is meant.
NEAR_MISSES = {
    "learning_rat": "learning_rate",
    "learningrate": "learning_rate",
    "learning-rate": "learning_rate",
    "Learning_Rate": "learning_rate",
    "sed": "seed",
    "epoch": "epochs",
    "max_lenght": "max_length",
    "globl_batch_tokens": "global_batch_tokens",
    "mixed_precison": "mixed_precision",
    "drop_out": "dropout",
    "datasets": "dataset",
    "classnames": "class_names",
    "lora_rnak": "lora_rank",
    "optimiser": "optimizer",
    "warmup_fractoin": "warmup_fraction",
    "keep_checkpoint": "keep_checkpoints",
}

CASES: list[Case] = [
    *(
        recipe_file(
            f"{wrong}: 1\n", rf"'{wrong}' is not a recipe key\. Did you mean '{meant}'\?", wrong
        )
        for wrong, meant in NEAR_MISSES.items()
    ),
    recipe_file("zzzz: 1\n", r"'zzzz' is not a recipe key\.\n", "a-key-from-nowhere"),
    recipe_file("seed: 1\nzzz: 1\nlearning_rat: 1\n", r"'zzz'.*\n.*'learning_rat'", "two-keys"),
    recipe_file(json.dumps({"sedd": 1}), r"Did you mean 'seed'\?", "near-miss", name="my.json"),
    recipe_file("true: 1\n2: 2\nnull: 3\n", r"'True' is not a recipe key", "keys-of-other-types"),
    recipe_file("? [a, b]\n: 1\n", r"not a recipe key|is not YAML", "a-list-as-key"),
    recipe_file("? {a: b}\n: 1\n", r"is not YAML", "a-mapping-as-key"),
    recipe_file("".join(f"k{i}: {i}\n" for i in range(2000)), r"more lines", "two-thousand-keys"),
    recipe_file("k" * 70_000 + ": 1\n", r"not a recipe key|is not YAML", "an-endless-key"),
    recipe_file('"\\e[31mred": 1\n', r"\\x1b\[31mred", "escapes-in-a-key"),
    # The file as a whole.
    recipe_file(b"\xff\xfe\x00\x01", r"is not UTF-8 text", "binary"),
    recipe_file("seed: 1\n".encode("utf-16"), r"is not UTF-8 text", "utf-16"),
    recipe_file(b"seed: \x00\n", r"is not YAML", "nul"),
    recipe_file(b"PK\x03\x04" + bytes(300), r"is not YAML|UTF-8", "a-zip"),
    recipe_file("\tseed: 1\n", r"is not YAML", "a-tab"),
    recipe_file("seed: 1\n\tepochs: 2\n", r"is not YAML", "a-tab-below"),
    recipe_file("[seed, 1]\n", r"holds a list; it should hold lines", "a-list"),
    recipe_file("seed\n", r"holds a str", "a-word"),
    recipe_file("3\n", r"holds a int", "a-number"),
    recipe_file("- seed: 1\n", r"holds a list", "a-list-of-mappings"),
    recipe_file("seed: 1\n---\nseed: 2\n", r"is not YAML", "two-documents"),
    recipe_file("seed: [1\n", r"is not YAML", "bracket-not-closed"),
    recipe_file('model: "gpt2\n', r"is not YAML", "quote-not-closed"),
    recipe_file("seed: 1\nseed: 2\n", r"the key 'seed' stands there twice", "a-key-twice"),
    recipe_file('{"seed": 1, "seed": 2}', r"'seed' stands there twice", "twice", name="my.json"),
    recipe_file("{seed: 1}", r"is not JSON", "yaml-inside", name="my.json"),
    recipe_file("", r"is not JSON", "empty", name="my.json"),
    recipe_file("[1]", r"holds a list", "a-list", name="my.json"),
    recipe_file("[" * 50_000, r"nested too deep", "deep", name="my.json"),
    recipe_file('{"seed": ' + "9" * 9000 + "}", r"is not JSON", "digits", name="my.json"),
    recipe_file("a: " + "[" * 5000, r"nested too deep|is not YAML", "deep"),
    recipe_file("a: " + "{b: " * 5000, r"nested too deep|is not YAML", "deep-mappings"),
    recipe_file("# " + "x" * 2**21, r"a recipe is some lines", "two-megabytes"),
    recipe_file(None, r"is not a file", "a-folder"),
    recipe_file(os.mkfifo, r"is not a file", "a-fifo"),
    recipe_file(lambda path: path.symlink_to("nowhere"), r"does not exist", "a-dangling-link"),
    Case(id="none", argv=(*DRY_RUN, "--recipe=no.yaml"), said=r"does not exist", exit_codes=(2,)),
    Case(id="device", argv=(*DRY_RUN, "--recipe=/dev/zero"), said=r"not a file", exit_codes=(2,)),
    Case(id="long", argv=(*DRY_RUN, "--recipe=" + "r" * 9000), said=r"exist", exit_codes=(2,)),
    Case(id="no-file", argv=(*DRY_RUN, "--recipe="), said=r"is not a file|exist", exit_codes=(2,)),
    # What YAML can do besides values.
    recipe_file(BOMB, r"refers to another value", "an-alias-bomb"),
    recipe_file("model: &m gpt2\ndataset: *m\n", r"\*m refers to another", "an-alias"),
    recipe_file("seed: *nothing\n", r"is not YAML", "an-alias-of-nothing"),
    recipe_file("a: &a [*a]\n", r"refers to another", "an-alias-of-itself"),
    recipe_file("<<: {seed: 1}\n", r"is not YAML|not a recipe key", "a-merge"),
    *(
        recipe_file(f"model: {tag}\n", r"is not YAML", f"tag-{number}")
        for number, tag in enumerate(
            (
                "!!python/object/apply:os.system ['touch planted']",
                "!!python/object/new:os.system ['touch planted']",
                "!!python/name:os.system",
                "!!python/module:os",
                "!!python/object:accel_gpt2.recipe.TrainRecipe {}",
                "!!python/tuple [a, b]",
                "!include other.yaml",
                "!!binary aGVsbG8=",
                "!!set {a, b}",
                "!!omap [a: 1]",
                "!!timestamp 2026-01-01",
                "!!float gpt2",
                "!!int gpt2",
            )
        )
    ),
    # Values of a wrong type or range.
    *(
        value(key, text, rf"{key} = .*(should|must|need)", id)
        for key in NUMBERS
        for id, text in {
            "word": "much",
            "nan": ".nan",
            "infinite": ".inf",
            "negative": "-1.0",
            "list": "[1]",
            "mapping": "{a: 1}",
            "null": "null",
            "huge": "1e400",
        }.items()
    ),
    *(
        value(key, text, rf"{key} = .*should", id)
        for key in COUNTS
        for id, text in {
            "word": "many",
            "zero": "0",
            "negative": "-3",
            "broken": "2.5",
            "true": "true",
            "gigantic": "9" * 40,
            "list": "[1, 2]",
            "nan": ".nan",
        }.items()
    ),
    *(
        value(key, text, rf"{key} = .*(should|character|needed)", id)
        for key in NAMES
        for id, text in {
            "number": "3",
            "null": "null",
            "list": "[gpt2]",
            "mapping": "{a: b}",
            "true": "yes",
            "nul": '"a\\0b"',
        }.items()
    ),
    recipe_file('{"model": "\\ud800"}', r"not UTF-8", "a-surrogate", name="my.json"),
    *(
        value(key, "sometimes", rf"{key} = 'sometimes'.*should be", "other")
        for key in ("init", "finetuning", "optimizer", "mixed_precision", "priors", "lr_schedule")
    ),
    *(
        value(key, text, rf"{key} = .*should be a valid boolean", id)
        for key in ("fused_gelu", "gradient_checkpointing")
        for id, text in {"word": "maybe", "number": "1", "null": "~"}.items()
    ),
    *(
        value(key, text, rf"{key} = .*(should|character)", id)
        for key in ("class_names", "trackers", "lora_target_modules")
        for id, text in {
            "word": "a",
            "numbers": "[1, 2]",
            "nul": '["a\\0"]',
            "deep": "[[a]]",
        }.items()
    ),
    value("seed", "2147483648", r"seed = 2147483648 .*less than", "too-large"),
    value("seed", "9" * 6000, r"is not YAML|seed", "of-six-thousand-digits"),
    value("seed", "2026-01-01", r"seed = '2026-01-01' .*valid integer", "a-date"),
    value("seed", "x" * 100_000, r"seed = 'xxx.* \.\.\. .*valid integer", "endless"),
    value("seed", '"\\e]0;owned\\a\\e[2J"', r"\\x1b\]0;owned", "escapes"),
    value("max_length", "2000", r"gpt2 has 1024 positions", "beyond-the-positions"),
    value("max_length", "2", r"max_length = 2 ", "below-bos-token-eos"),
    value("tokenizer_vocab_size", "257", r"tokenizer_vocab_size = 257 ", "below-the-bytes"),
    value("validation_fraction", "0.9", r"validation_fraction = 0\.9 ", "most-of-it"),
    value("epochs", "1e300", r"epochs = 1e\+300 .*less than or equal to 100000", "for-ever"),
    value("lora_rank", "2000000000", r"lora_rank = 2000000000 ", "beyond-memory"),
    recipe_file(
        "global_batch_tokens: 1\nglobal_batch_size: 1\n", r"are both given; give one", "two-batches"
    ),
    recipe_file("global_batch_tokens: null\nglobal_batch_size: null\n", r"both empty", "no-batch"),
    recipe_file("model: gpt2-tiny\ninit: pretrained\n", r"has no pretrained weights", "tiny"),
    recipe_file("finetuning: lora\ninit: scratch\n", r"learns next to nothing", "lora-scratch"),
    recipe_file("tokenizer: train\n", r"know only their own tokens", "train-pretrained"),
    recipe_file("budget_usd: 5\n", r"a budget is reached at a price", "budget-without-price"),
    recipe_file(
        "\n".join(f"{key}: {{}}" for key in FIELDS), r"model = \{\}", "every-key-a-mapping"
    ),
    # Names that climb; they are read as they stand, and nothing is there.
    *(
        Case(
            id=f"climbing-{option}",
            argv=train_argv("good", f"--{option}=../../../../../etc"),
            said=r"etc",
        )
        for option in ("model", "dataset")
    ),
    Case(
        id="climbing-tokenizer",
        argv=tuple(
            "--set=tokenizer=../../../etc" if word == "--set=tokenizer=train" else word
            for word in train_argv("good")
        ),
        said=r"etc",
    ),
    Case(
        id="climbing-class-names",
        argv=train_argv("good", "--set=class_names=../../x,/etc/passwd"),
        said=r"none of the 2 classes",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_bad_recipe_is_refused_in_a_sentence(
    case: Case, tmp_path: Path, run_template: Path
) -> None:
    """Each gives exit code 2 and a line for each problem, and changes no file."""
    check_case(case, tmp_path, run_template)
    assert not list(tmp_path.rglob("planted"))


def test_there_are_as_many_as_promised() -> None:
    """No case is written twice."""
    assert len({case.id for case in CASES}) == len(CASES) >= 200


@pytest.mark.parametrize("key", FIELDS)
def test_every_key_has_a_near_miss_that_is_named(
    key: str, tmp_path: Path, run_template: Path
) -> None:
    """A letter too many, whatever the key: the message names the key that is meant."""
    said = rf"'{key}x' is not a recipe key\. Did you mean '{key}'\?"
    check_case(recipe_file(f"{key}x: 1\n", said, key), tmp_path, run_template)


def test_a_written_recipe_is_no_malformed_one(tmp_path: Path) -> None:
    """What we write passes the strict reader: the cases above fail for what they say."""
    (tmp_path / "my.yaml").write_text(to_yaml(TrainRecipe()), encoding="utf-8")
    ended = run_command((*DRY_RUN, "--recipe=my.yaml"), cwd=tmp_path)
    assert ended.exit_code == 0, ended.stderr
