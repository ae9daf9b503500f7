"""What is typed and what the environment says, when it is not what it should be."""

import os
from pathlib import Path

import pytest

from accel_gpt2.recipe import FIELDS, TrainRecipe
from accel_gpt2.recipe.layers import ENVIRONMENT_PREFIX, parse_value
from tests.fuzz.harness import Case, check_case, train_argv

USAGE = (2,)
DRY_RUN = ("accel-gpt2", "train", "--dry-run")


def typed(id: str, said: str, *words: str, program: str = "accel-gpt2", **more: object) -> Case:
    """One command line that is wrong as it was typed."""
    options: dict[str, object] = {"exit_codes": USAGE, **more}
    return Case(id=id, argv=(program, *words), said=said, **options)  # type: ignore[arg-type]


def variable(name: str, value: str, said: str, id: str, **more: object) -> Case:
    """A dry run under one variable."""
    options: dict[str, object] = {"exit_codes": USAGE, **more}
    return Case(id=id, argv=DRY_RUN, environment={name: value}, said=said, **options)  # type: ignore[arg-type]


VERBS = {
    "trian": "train",
    "tran": "train",
    "evalute": "evaluate",
    "predit": "predict",
    "profile": "profiles",
    "docter": "doctor",
    "dmeo": "demo",
}

OPTIONS = {
    "--epoch": "--epochs",
    "--learning_rate": "--learning-rate",
    "--learning-rat": "--learning-rate",
    "--max-lenght": "--max-length",
    "--datset": "--dataset",
    "--modell": "--model",
    "--outpt-dir": "--output-dir",
    "--resum": "--resume",
    "--globl-batch-tokens": "--global-batch-tokens",
}

WRONG_VALUES = {
    "--epochs": ("many", "1,5", "", "0x10", "--seed"),
    "--max-steps": ("1.5", "ten", "", "1e3"),
    "--seed": ("x", "1.5", ""),
    "--max-length": ("long", "10k"),
    "--learning-rate": ("fast", "5e", ""),
    "--global-batch-tokens": ("8k", "8_1x"),
    "--init": ("pretrain", "", "SCRATCH"),
    "--finetuning": ("none", "adapter"),
    "--optimizer": ("sgd", "adam"),
    "--mixed-precision": ("fp32", "bf-16"),
}

OUT_OF_RANGE = {
    "--epochs": ("0", "-1", "nan", "inf", "-inf", "1e9"),
    "--max-steps": ("0", "-5", "99999999999"),
    "--seed": ("-1", "2147483648", "9" * 300),
    "--max-length": ("0", "2", "-4", "5000"),
    "--learning-rate": ("0", "-1e-4", "nan", "inf"),
    "--global-batch-tokens": ("0", "-1"),
    "--max-time": ("0", "-5m", "soon", "", "1x", "1h30", "nan", "1e3"),
}

SETS = {
    "no-equals": ("seed", r"it should be key=value"),
    "only-equals": ("=", r"'' is not a recipe key"),
    "no-key": ("=3", r"'' is not a recipe key"),
    "blank": ("", r"it should be key=value"),
    "near-miss": ("sed=1", r"Did you mean 'seed'\?"),
    "unknown": ("nothing=1", r"'nothing' is not a recipe key"),
    "wrong-type": ("seed=x", r"seed = 'x' \(from --set\)"),
    "empty-number": ("seed=", r"seed = '' \(from --set\)"),
    "spaces": ("  =  ", r"'' is not a recipe key"),
    "negative": ("dropout=-0.5", r"dropout = -0\.5"),
    "nan": ("dropout=nan", r"dropout = nan"),
    "brackets": ("lora_rank=[8]", r"lora_rank = '\[8\]'"),
    "digits": ("seed=" + "7" * 9000, r"seed = "),
    "endless": ("model=" + "m" * 120_000, r"no path has 120,000"),
    "bool": ("fused_gelu=maybe", r"fused_gelu = 'maybe'"),
    "none": ("seed=none", r"seed = 'none'"),
    "dunder": ("__class__=1", r"'__class__' is not a recipe key"),
    "method": ("__init__=1", r"not a recipe key"),
    "escape": ("\x1b[31mseed=1", r"\\x1b\[31mseed"),
    "bidi": ("\u202eseed=1", r"\\u202eseed"),
    "bytes": ("\udcffseed=1", r"udcff|xff"),
    "bytes-as-value": ("model=\udcff", r"not UTF-8"),
    "newline": ("seed=1\nmodel=x", r"seed = '1\\nmodel=x'"),
    "no-batch": ("global_batch_tokens=none", r"both empty; give one"),
    "budget": ("budget_usd=3", r"a budget is reached at a price"),
}

OTHER = {"other.csv": "text,label\na cat,animal\na rose,plant\n"}

CASES: list[Case] = [
    *(typed(f"verb-{wrong}", rf"Did you mean '{v}'\?", wrong) for wrong, v in VERBS.items()),
    typed("verb-zzz", r"No such command 'zzz'", "zzz"),
    typed("verb-empty", r"No such command ''", ""),
    typed("verb-endless", r"No such command", "v" * 50_000),
    typed("verb-escape", r"No such command.*\\x1b\[2J", "\x1b[2J\x07"),
    typed("verb-bytes", r"No such command", "\udcff\udcfe"),
    typed("verb-option", r"No such option", "--verbose", "train"),
    *(
        typed(f"option{wrong}", rf"No such option: {wrong}.*{meant}", "train", wrong, "1")
        for wrong, meant in OPTIONS.items()
    ),
    *(
        typed(f"{verb}-option", r"No such option: --nothing", verb, "--nothing")
        for verb in ("train", "evaluate", "predict", "report", "profiles", "doctor", "demo")
    ),
    typed("option-short", r"No such option", "train", "-x"),
    typed("option-endless", r"No such option", "train", "--" + "o" * 50_000),
    typed("option-escape", r"No such option.*\\x1b\[31m", "train", "--\x1b[31mred"),
    typed("option-bytes", r"No such option", "train", "--\udcff"),
    typed("option-control", r"No such option", "train", "--a\x00b\x7f\x9b"),
    typed("argument-too-many", r"unexpected extra argument", "train", "imdb"),
    typed("profiles-argument", r"unexpected extra argument", "profiles", "rtx4070ti"),
    typed("doctor-argument", r"\\x1b\[31m does not exist", "doctor", "\x1b[31m"),
    *(
        typed(f"{verb}-without-run", r"Missing argument 'RUN'", verb)
        for verb in ("evaluate", "predict", "report")
    ),
    *(
        typed(f"no-value{option}", rf"Option '{option}' requires an argument", "train", option)
        for option in ("--epochs", "--model", "--set", "--recipe", "--output-dir", "--max-time")
    ),
    typed("flag-with-value", r"does not take a value", "train", "--dry-run=yes"),
    *(
        typed(f"value{option}-{text or 'empty'}", rf"{option}", "train", "--dry-run", option, text)
        for option, texts in WRONG_VALUES.items()
        for text in texts
    ),
    *(
        typed(
            f"range{option}-{text[:20] or 'empty'}",
            r"should be|is not a duration|positions",
            "train",
            "--dry-run",
            f"{option}={text}",
        )
        for option, texts in OUT_OF_RANGE.items()
        for text in texts
    ),
    *(
        typed(f"set-{id}", said, "train", "--dry-run", "--set", text)
        for id, (text, said) in SETS.items()
    ),
    typed("set-twice", r"given twice", "train", "--set=seed=1", "--set=seed=2"),
    typed("set-and-option", r"both given", "train", "--seed=1", "--set=seed=2"),
    typed(
        "both-batches",
        r"counted in tokens or in documents",
        "train",
        "--global-batch-tokens=8",
        "--set=global_batch_size=2",
    ),
    typed("launched-option", r"No such option", "--nothing", program="launch/train.py"),
    typed("launched-argument", r"unexpected extra argument", "x", program="launch/train.py"),
    typed("launched-set", r"not a recipe key", "--set=x=1", program="launch/train.py"),
    typed("launched-evaluate", r"Missing argument", program="launch/evaluate.py"),
    # Profiles.
    *(
        typed(f"profile-{text[:12] or 'empty'}", said, "train", "--dry-run", f"--profile={text}")
        for text, said in {
            "rtx4070": r"Did you mean 'rtx4070ti'\?",
            "4070ti": r"Did you mean 'rtx4070ti'\?",
            "RTX4070TI": r"There is no profile 'RTX4070TI'",
            "a100": r"Did you mean 'a100-\d0'\?",
            "h100": r"There is no profile 'h100'",
            "2x-rtx4070": r"Did you mean '2x-rtx4070ti'\?",
            "gpu": r"There is no profile 'gpu'",
            "cuda": r"There is no profile 'cuda'",
            "auto ": r"There is no profile 'auto '",
            "": r"a name is needed",
            "p" * 900: r"There is no profile",
            "\x1b[31mrtx": r"There is no profile '\\x1b\[31mrtx'",
            "\udcff": r"not UTF-8",
            "../profiles": r"There is no profile",
        }.items()
    ),
    typed(
        "fp16-on-a-cpu",
        r"fp16.*needs a GPU",
        *DRY_RUN[1:],
        "--mixed-precision=fp16",
        exit_codes=(3,),
    ),
    # Where the run goes, and what it goes on from.
    typed("output-is-a-file", r"is a file", *DRY_RUN[1:], "--output-dir=good/train.csv"),
    typed("output-is-data", r"holds files and no recipe", *DRY_RUN[1:], "--output-dir=good"),
    typed("output-is-root", r"not a run directory", *DRY_RUN[1:], "--output-dir=/"),
    typed("output-is-empty", r"not a run directory", *DRY_RUN[1:], "--output-dir="),
    typed("output-is-home", r"not a run directory", *DRY_RUN[1:], "--output-dir=."),
    *(
        Case(id=f"output-{id}", argv=train_argv("good", output_dir=path), said=said)
        for id, path, said in (
            ("below-a-file", "good/train.csv/run", r"train\.csv"),
            ("too-long", "o" * 300, r"o{50}"),
            ("path-too-long", "o/" * 3000, r"(o/){20}"),
            ("dev-null", "/dev/null", r"/dev/null"),
            ("below-dev-null", "/dev/null/x", r"/dev/null/x"),
            ("proc", "/proc/nothing", r"/proc/nothing"),
        )
    ),
    *(
        Case(
            id=f"resume-{id}",
            argv=train_argv("good", f"--resume={path}"),
            files={"file": "x", "empty": None, "pipe": os.mkfifo},
            said=said,
        )
        for id, path, said in (
            ("none", "nothing", r"give auto, never, or a checkpoint"),
            ("near-miss", "Auto", r"give auto, never, or a checkpoint"),
            ("nowhere", "", r"resume|checkpoint"),
            ("a-file", "file", r"give auto, never, or a checkpoint"),
            ("a-pipe", "pipe", r"give auto, never, or a checkpoint"),
            ("an-empty-folder", "empty", r"it has no manifest\.json"),
            ("data", "good", r"it has no manifest\.json"),
            ("too-long", "r" * 5000, r"r{50}"),
            ("escape", "\x1b[31m", r"\\x1b\[31m"),
        )
    ),
    # Texts to classify.
    *(
        typed(f"predict-{id}", said, "predict", "run", *words, run=True, stdin=stdin, files=files)
        for id, words, stdin, files, said in (
            ("nothing", (), b"", {}, r"There is no text in stdin"),
            ("blank", ("   ",), b"", {}, r"There is no text in the command line"),
            ("stdin-blank", ("-",), b"\n\n \n", {}, r"There is no text in stdin"),
            ("stdin-binary", ("-",), b"\xff\xfe\x00", {}, r"stdin is not UTF-8 text"),
            ("both", ("a", "--file=f"), b"", {"f": "a"}, r"both given"),
            ("no-file", ("--file=none",), b"", {}, r"none cannot be read|none does not exist"),
            ("empty-file", ("--file=f",), b"", {"f": ""}, r"There is no text in f"),
            ("binary-file", ("--file=f",), b"", {"f": b"a\xff\n"}, r"f is not UTF-8 text"),
            ("folder", ("--file=f",), b"", {"f": None}, r"f (is not a file|cannot be read)"),
            ("fifo", ("--file=f",), b"", {"f": os.mkfifo}, r"f is not a file"),
            ("device", ("--file=/dev/zero",), b"", {}, r"/dev/zero is not a file"),
            ("long-name", ("--file=" + "f" * 5000,), b"", {}, r"f{50}"),
            ("bytes", ("caf\udce9",), b"", {}, r"UTF-8"),
        )
    ),
    *(
        typed(
            f"evaluate-{id}",
            said,
            "evaluate",
            "run",
            option,
            run=True,
            exit_codes=(1, 2),
            files=OTHER,
        )
        for id, option, said in (
            ("no-split", "--split=nothing", r"no split 'nothing'"),
            ("empty-split", "--split=", r"split"),
            ("escape-split", "--split=\x1b[31m", r"\\x1b\[31m"),
            ("no-data", "--dataset=./nothing", r"no file or directory nothing"),
            ("empty-data", "--dataset=", r"dataset"),
            ("climbing-data", "--dataset=../../../../etc", r"etc"),
            ("other-classes", "--dataset=other.csv", r"none of the 2 classes"),
            ("bytes-data", "--dataset=\udcff", r"\\udcff"),
        )
    ),
]


def garbage(key: str) -> str | None:
    """A value that no reader of this key takes, or None where every text is a value."""
    return (
        None if isinstance(parse_value(key, "\x1b[31m%"), str) and _takes_text(key) else "\x1b[31m%"
    )


def _takes_text(key: str) -> bool:
    default = getattr(TrainRecipe(), key)
    literal = key in {"init", "finetuning", "optimizer", "mixed_precision", "priors", "lr_schedule"}
    return isinstance(default, str) and not literal


ENVIRONMENT_CASES: list[Case] = [
    *(
        variable(
            ENVIRONMENT_PREFIX + key.upper(), text, rf"{key} = '\\x1b\[31m%'", f"variable-{key}"
        )
        for key in FIELDS
        if (text := garbage(key)) is not None
        and key not in {"class_names", "trackers", "lora_target_modules"}
    ),
    *(
        variable(ENVIRONMENT_PREFIX + key.upper(), "", rf"{key} = ''", f"empty-{key}")
        for key in ("MODEL", "DATASET", "SEED", "EPOCHS", "FUSED_GELU", "INIT", "PROFILE")
        for key in (key.lower(),)
    ),
    variable(
        "ACCEL_GPT2_LEARNING_RAT", "1", r"Did you mean 'ACCEL_GPT2_LEARNING_RATE'\?", "near-rate"
    ),
    variable("ACCEL_GPT2_EPOCH", "1", r"Did you mean 'ACCEL_GPT2_EPOCHS'\?", "near-epochs"),
    variable(
        "ACCEL_GPT2_MAX_LENGHT", "1", r"Did you mean 'ACCEL_GPT2_MAX_LENGTH'\?", "near-length"
    ),
    variable("ACCEL_GPT2_PROFILE", "rtx", r"There is no profile 'rtx'", "profile"),
    variable("ACCEL_GPT2_SEED", "\udcff", r"UTF-8", "bytes"),
    *(
        Case(
            id=f"data-folder-{id}",
            argv=train_argv("imdb"),
            environment={"ACCEL_GPT2_DATA": path},
            files={"f": "x"},
            said=r"ACCEL_GPT2_DATA",
        )
        for id, path in {
            "none": "nothing",
            "file": "f",
            "long": "d" * 5000,
            "bytes": "\udcff",
        }.items()
    ),
    *(
        Case(
            id=f"cache-{id}",
            argv=train_argv("good"),
            environment={"ACCEL_GPT2_CACHE": path},
            files={"f": "x"},
            said=r"cache folder .* cannot be written|File name too long",
        )
        for id, path in {
            "file": "f",
            "below-a-file": "f/cache",
            "device": "/dev/null/x",
            "proc": "/proc/cache",
            "too-long": "c" * 5000,
        }.items()
    ),
    Case(
        id="home-is-nothing",
        argv=train_argv("good"),
        environment={"ACCEL_GPT2_CACHE": None, "XDG_CACHE_HOME": None, "HOME": "/proc/none"},
        said=r"cache folder .* cannot be written",
    ),
    *(
        Case(id=f"rank-{id}", argv=train_argv("good"), environment=env, said=said)
        for id, env, said in (
            ("world-word", {"WORLD_SIZE": "two"}, r"WORLD_SIZE = 'two'"),
            ("world-zero", {"WORLD_SIZE": "0"}, r"WORLD_SIZE = '0'"),
            ("world-empty", {"WORLD_SIZE": ""}, r"WORLD_SIZE = ''"),
            ("world-broken", {"WORLD_SIZE": "1.5"}, r"WORLD_SIZE = '1\.5'"),
            ("world-negative", {"WORLD_SIZE": "-2"}, r"WORLD_SIZE = '-2'"),
            ("world-huge", {"WORLD_SIZE": "9" * 5000}, r"WORLD_SIZE = '999"),
            ("world-escape", {"WORLD_SIZE": "\x1b[31m"}, r"WORLD_SIZE = '\\x1b"),
            ("rank-word", {"RANK": "first"}, r"RANK = 'first'"),
            ("rank-negative", {"RANK": "-1"}, r"RANK = '-1'"),
            ("rank-empty", {"RANK": ""}, r"RANK = ''"),
            ("rank-beyond", {"RANK": "3", "WORLD_SIZE": "2"}, r"RANK = '3'"),
            ("local-rank-word", {"LOCAL_RANK": "x"}, r"LOCAL_RANK = 'x'"),
            ("local-rank-empty", {"LOCAL_RANK": ""}, r"LOCAL_RANK = ''"),
        )
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_bad_command_line_is_refused_in_a_sentence(
    case: Case, tmp_path: Path, run_template: Path
) -> None:
    """Each gives an exit code and a sentence, and changes no file."""
    check_case(case, tmp_path, run_template)


@pytest.mark.parametrize("case", ENVIRONMENT_CASES, ids=lambda case: case.id)
def test_a_bad_variable_is_refused_in_a_sentence(
    case: Case, tmp_path: Path, run_template: Path
) -> None:
    """Each gives an exit code and a sentence, and changes no file."""
    check_case(case, tmp_path, run_template)


def test_there_are_as_many_as_promised() -> None:
    """No case is written twice."""
    cases = [*CASES, *ENVIRONMENT_CASES]
    assert len({case.id for case in cases}) == len(cases) >= 200
