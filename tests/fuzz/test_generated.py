"""Inputs that nobody thought of: generated ones, and good files with something changed.

Each is either good after all, or refused by the same rules as the hand-made ones. `--torture` takes
many more of them.
"""

import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from accel_gpt2.recipe import FIELDS
from tests.fuzz.harness import (
    Case,
    Ended,
    check_any_outcome,
    check_untouched,
    good_csv,
    good_rows,
    make_workshop,
    run_command,
    train_argv,
    tree_digest,
)

# Documents that a run reads before it trains; validation of one step on two classes is a second.
TRAIN = train_argv("data", output_dir="out")
DRY_RUN = ("accel-gpt2", "train", "--dry-run", "--recipe=my.yaml")

words = st.text(max_size=12)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | words
    | st.sampled_from(["fruit", "tools", "0", "1", "", " ", "\0", "\x1b[31m", "NaN", "1e999"])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
rows = st.lists(st.dictionaries(st.sampled_from(["text", "label", "x"]), values), max_size=6)
lines = st.lists(
    st.text(
        alphabet=st.sampled_from("ab, ;\t\"'\r\n\0\x1b\ufeff\u2028é{}[]:0123456789-"), max_size=40
    )
)


def workshop(folder: Path, run_template: Path | None = None) -> None:
    """An empty working directory with the model's shape and good data."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_workshop(folder, Case(id="", argv=(), said=""), run_template)


def check_generated(folder: Path, argv: tuple[str, ...]) -> Ended:
    """Run in a prepared folder; nothing that is there may change."""
    before = tree_digest(folder)
    ended = run_command(argv, cwd=folder)
    check_any_outcome(ended)
    check_untouched(before, tree_digest(folder))
    return ended


def many(examples: int) -> Callable[[Any], Any]:
    """Hypothesis, without a deadline: a training is among what may follow."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def test_generated_bytes_are_read_or_refused(tmp_path: Path, num_examples: int) -> None:
    """Any bytes as a data file of any kind."""
    seen: Counter[int] = Counter()

    @many(num_examples)
    @given(data=st.binary(max_size=400), suffix=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
    def check(data: bytes, suffix: str) -> None:
        workshop(tmp_path / "w")
        (tmp_path / "w" / "data").mkdir()
        (tmp_path / "w" / "data" / f"train.{suffix}").write_bytes(data)
        seen[check_generated(tmp_path / "w", TRAIN).exit_code] += 1

    check()
    assert seen[1] >= num_examples * 0.8


def test_generated_lines_are_read_or_refused(tmp_path: Path, num_examples: int) -> None:
    """Lines of the characters that CSV and JSON give a meaning, below a header or alone."""
    seen: Counter[int] = Counter()

    @many(num_examples)
    @given(
        lines=lines,
        suffix=st.sampled_from(["csv", "tsv", "jsonl"]),
        header=st.booleans(),
        good=st.booleans(),
    )
    def check(lines: list[str], suffix: str, header: bool, good: bool) -> None:
        workshop(tmp_path / "w")
        (tmp_path / "w" / "data").mkdir()
        text = "\n".join(lines)
        if good:
            text = good_csv() + text
        elif header:
            text = f"text,label\n{text}"
        path = tmp_path / "w" / "data" / f"train.{suffix}"
        path.write_text(text, encoding="utf-8", newline="")
        seen[check_generated(tmp_path / "w", TRAIN).exit_code] += 1

    check()
    assert sum(seen.values()) >= num_examples * 0.8


def test_generated_records_are_read_or_refused(tmp_path: Path, num_examples: int) -> None:
    """JSON lines of the right names and any values, after good ones or alone."""
    seen: Counter[int] = Counter()

    @many(num_examples)
    @given(rows=rows, good=st.booleans())
    def check(rows: list[dict[str, Any]], good: bool) -> None:
        workshop(tmp_path / "w")
        (tmp_path / "w" / "data").mkdir()
        before = [{"text": text, "label": label} for text, label in good_rows()] if good else []
        text = "".join(f"{json.dumps(row)}\n" for row in [*before, *rows])
        (tmp_path / "w" / "data" / "train.jsonl").write_text(text, encoding="utf-8")
        seen[check_generated(tmp_path / "w", TRAIN).exit_code] += 1

    check()
    assert seen[1] >= num_examples * 0.5


def test_generated_columns_are_read_or_refused(tmp_path: Path, num_examples: int) -> None:
    """Parquet columns of any type under the right names."""
    kinds = [
        pa.string(), pa.large_string(), pa.binary(), pa.int8(), pa.int64(), pa.uint64(),
        pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.null(), pa.date32(),
        pa.timestamp("ns"), pa.duration("s"), pa.decimal128(5, 2), pa.list_(pa.string()),
        pa.struct([("a", pa.int8())]), pa.map_(pa.string(), pa.int8()), pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int8(), pa.int64()),
    ]  # fmt: skip

    @many(num_examples)
    @given(text=st.sampled_from(kinds), label=st.sampled_from(kinds), rows=st.integers(0, 3))
    def check(text: pa.DataType, label: pa.DataType, rows: int) -> None:
        workshop(tmp_path / "w")
        (tmp_path / "w" / "data").mkdir()
        table = pa.table({"text": pa.nulls(rows, text), "label": pa.nulls(rows, label)})
        path = tmp_path / "w" / "data" / "train.parquet"
        try:
            pq.write_table(table, path)
        except pa.ArrowException:  # a type that Parquet has not got
            return
        assert check_generated(tmp_path / "w", TRAIN).exit_code != 0

    check()


def test_generated_recipes_are_read_or_refused(tmp_path: Path, num_examples: int) -> None:
    """Any values under the names of recipe keys, as YAML and as JSON."""
    seen: Counter[int] = Counter()

    @many(num_examples * 4)
    @given(
        recipe=st.dictionaries(st.sampled_from(FIELDS) | words, values, max_size=4),
        suffix=st.sampled_from(["yaml", "json"]),
    )
    def check(recipe: dict[str, Any], suffix: str) -> None:
        workshop(tmp_path / "w")
        text = yaml.safe_dump(recipe) if suffix == "yaml" else json.dumps(recipe)
        (tmp_path / "w" / f"my.{suffix}").write_text(text, encoding="utf-8")
        argv = (*DRY_RUN[:-1], f"--recipe=my.{suffix}")
        seen[check_generated(tmp_path / "w", argv).exit_code] += 1

    check()
    assert seen[2] >= num_examples


def test_generated_yaml_is_read_or_refused(tmp_path: Path, num_examples: int) -> None:
    """Text of the characters that YAML gives a meaning."""
    pieces = st.sampled_from(
        ["seed", "model", ": ", ":", "- ", "\n", "  ", "\t", "&a ", "*a", "!!int ", "!x ", "[", "]",
         "{", "}", ",", "'", '"', "#", "|", ">", "?", "<<", "---", "...", "%", "@", "`", "1", "0x1",
         "1:2", "2026-01-01", "~", ".nan", "\\", "\x85", "\ufeff", "=", "yes"]
    )  # fmt: skip

    @many(num_examples * 4)
    @given(text=st.lists(pieces, max_size=14).map("".join))
    def check(text: str) -> None:
        workshop(tmp_path / "w")
        (tmp_path / "w" / "my.yaml").write_text(text, encoding="utf-8", newline="")
        check_generated(tmp_path / "w", DRY_RUN)

    check()


def test_generated_arguments_are_taken_or_refused(tmp_path: Path, num_examples: int) -> None:
    """Real options with any values, in any order."""
    argument = st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=15
    )
    options = st.sampled_from(
        ["--model", "--epochs", "--seed", "--set", "--profile", "--max-time", "--resume", "--init",
         "--dataset", "--quiet", "--learning-rate", "--max-length", "--output-dir", "--help", "-x"]
    )  # fmt: skip

    @many(num_examples * 4)
    @given(typed=st.lists(options | argument, max_size=5))
    def check(typed: list[str]) -> None:
        workshop(tmp_path / "w")
        check_generated(tmp_path / "w", ("accel-gpt2", "train", "--dry-run", *typed))

    check()


# Mutations of a good run: byte flips, cuts, insertions, deleted and exchanged fields.

PREDICT = ("accel-gpt2", "predict", "run", "--json", "a ripe apple")
EVALUATE = ("accel-gpt2", "evaluate", "run", "--quiet", "--json")
GO_ON = train_argv("good", "--set=keep_checkpoints=1", output_dir="run")
REPORT = ("accel-gpt2", "report", "run")

# What says nothing about the answers, or is guarded by no second copy: it may change them, by
# another value of the same form, and must never change anything else.
_UNGUARDED = {"plan.json", "recipe.yaml", "calibration.json"}

READ_BY: dict[str, tuple[tuple[str, ...], ...]] = {
    "recipe.yaml": (PREDICT, GO_ON),
    "plan.json": (PREDICT, EVALUATE),
    "calibration.json": (PREDICT,),
    "class-0-fruit/final/manifest.json": (PREDICT,),
    "class-0-fruit/final/config.json": (PREDICT,),
    "class-0-fruit/final/tokenizer.json": (PREDICT,),
    "class-0-fruit/final/model.safetensors": (PREDICT,),
    "class-1-tools/final/training.json": (PREDICT,),
    "evaluation/scores.parquet": (EVALUATE, REPORT),
    "evaluation/metrics.json": (REPORT,),
    "log.jsonl": (REPORT,),
}

# Of an unfinished run: what a start goes on from.
RESUMED = (
    "recipe.yaml",
    "class-0-fruit/checkpoint-1/manifest.json",
    "class-0-fruit/checkpoint-1/state.json",
    "class-0-fruit/checkpoint-1/model.safetensors",
    "class-0-fruit/checkpoint-1/optimizer.pt",
    "class-0-fruit/checkpoint-1/random-0.safetensors",
    "class-1-tools/final/manifest.json",
    "class-1-tools/final/training.json",
    "class-1-tools/validation_scores/1.npy",
    "log.jsonl",
    "status.json",
    "environment.json",
)


def mutated(data: bytes, random_: random.Random) -> bytes:
    """A file with one thing changed; never the file itself."""
    while True:
        changed = _mutated_once(data, random_)
        if changed != data:
            return changed


def _mutated_once(data: bytes, random_: random.Random) -> bytes:
    at = random_.randrange(max(1, len(data)))
    kind = random_.choice(["flip", "cut", "delete", "insert", "double", "zero", "field", "value"])
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (1 << random_.randrange(8))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at]
    if kind == "delete":
        return data[:at] + data[at + random_.randint(1, 20) :]
    if kind == "insert":
        return data[:at] + random_.randbytes(random_.randint(1, 8)) + data[at:]
    if kind == "double":
        return data[:at] + data[at : at + 30] + data[at:]
    if kind == "zero":
        return data[:at] + bytes(min(64, len(data) - at)) + data[at + 64 :]
    try:
        content = json.loads(data)
    except ValueError:
        return data
    _change_field(content, random_, delete=kind == "field")
    return json.dumps(content).encode()


def _change_field(content: Any, random_: random.Random, *, delete: bool) -> None:
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        if not keys:
            return
        key = random_.choice(keys)
        if isinstance(content[key], dict | list) and content[key] and random_.random() < 0.7:
            content = content[key]
            continue
        if delete:
            del content[key]
        else:
            content[key] = random_.choice(
                [
                    None,
                    True,
                    -1,
                    0,
                    1.5,
                    10**30,
                    float("nan"),
                    "",
                    "../../x",
                    "\x1b[2J",
                    [],
                    {},
                    [[]],
                ]
            )
        return


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    """How long one file is changed again and again."""
    return 20.0 if request.config.getoption("--torture", default=False) else 0.0


def rounds(name: str, seconds: float, at_least: int = 1) -> Iterator[random.Random]:
    """Random numbers for one mutation after another, until the time is over."""
    started = time.monotonic()
    number = 0
    while number < at_least or time.monotonic() - started < seconds:
        yield random.Random(f"{name} {number}")
        number += 1


@pytest.mark.parametrize("name", READ_BY)
def test_a_changed_file_of_a_run_gives_the_same_answer_or_none(
    name: str, tmp_path: Path, run_template: Path, seconds: float
) -> None:
    """Every mutation is found, or does not matter: an answer is the undamaged run's answer."""
    folder = tmp_path / "w"
    answers = {}
    for argv in READ_BY[name]:
        workshop(folder, run_template)
        ended = run_command(argv, cwd=folder)
        assert ended.exit_code == 0, ended.stderr
        answers[argv] = _answer(ended)
    original = (run_template / name).read_bytes()
    for random_ in rounds(name, seconds):
        workshop(folder, run_template)
        data = mutated(original, random_)
        (folder / "run" / name).write_bytes(data)
        argv = random_.choice(READ_BY[name])
        ended = run_command(argv, cwd=folder)
        check_any_outcome(ended)
        if ended.exit_code == 0 and name not in _UNGUARDED and argv != REPORT:
            assert _answer(ended) == answers[argv], data[:2000]


def _answer(ended: Ended) -> Any:
    """What a command says, without the times that it took."""
    try:
        content = json.loads(ended.stdout)
    except ValueError:
        return ended.stdout
    for key in ("scoring_seconds", "documents_per_second"):
        content.pop(key, None)
    content.get("baseline", {}).pop("seconds", None)
    return content


@pytest.mark.parametrize("name", RESUMED)
def test_a_changed_file_of_a_half_run_is_gone_on_from_or_refused(
    name: str, tmp_path: Path, run_template: Path, seconds: float
) -> None:
    """A start ends with the models of the undamaged run, or refuses and leaves all as it was."""
    folder = tmp_path / "w"
    finals = [f"class-{slug}/final/model.safetensors" for slug in ("0-fruit", "1-tools")]
    weights = [(run_template / final).read_bytes() for final in finals]
    original = (run_template / name).read_bytes()
    for random_ in rounds(name, seconds):
        workshop(folder, run_template)
        shutil.rmtree(folder / "run" / "class-0-fruit" / "final")
        (folder / "run" / "calibration.json").unlink()
        (folder / "run" / name).write_bytes(mutated(original, random_))
        before = tree_digest(folder / "run")
        ended = run_command(GO_ON, cwd=folder)
        check_any_outcome(ended)
        if ended.exit_code == 0:
            assert [(folder / "run" / final).read_bytes() for final in finals] == weights
        else:
            kept = {key: value for key, value in before.items() if key not in _REWRITTEN}
            check_untouched(kept, tree_digest(folder / "run"))


# A start writes these from what it has resolved and read, before it looks at checkpoints.
_REWRITTEN = ("recipe.yaml", "tokenizer", "log.jsonl", "README.md", "plan.json")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_changed_data_file_is_read_or_refused(kind: str, tmp_path: Path, seconds: float) -> None:
    """Truncated, flipped and spliced data files, read through a training of one step."""
    original = tmp_path / f"train.{kind}"
    pairs = good_rows()
    if kind == "csv":
        original.write_text(good_csv(), encoding="utf-8")
    elif kind == "jsonl":
        text = "".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in pairs)
        original.write_text(text, encoding="utf-8")
    else:
        texts, labels = zip(*pairs, strict=True)
        pq.write_table(pa.table({"text": texts, "label": labels}), original)
    seen: Counter[int] = Counter()
    for random_ in rounds(kind, seconds * 4, at_least=4):
        workshop(tmp_path / "w")
        (tmp_path / "w" / "data").mkdir()
        data = mutated(original.read_bytes(), random_)
        (tmp_path / "w" / "data" / f"train.{kind}").write_bytes(data)
        seen[check_generated(tmp_path / "w", TRAIN).exit_code] += 1
    assert seen[1] >= 1
