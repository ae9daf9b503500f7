"""What a person waits for answers: whole processes of `accel-gpt2 predict`, from the shell.

    OMP_NUM_THREADS=1 python benchmarks/prediction.py [--rounds 5]

Trains, for a few steps, four GPT-2s of 4 layers of width 256 with GPT-2's whole vocabulary, one per
class of AG News, and one with a classification head; then asks for the classes of 1,000 short texts
that come through a pipe. First answer and last answer are counted from the start of the process;
programs take turns. Beside them a script as a person would write it: transformers, each text alone
under each model, `model(ids, labels=ids)`, answers as they come. Then where the start goes.

Texts are made up of GPT-2's words, of the lengths of AG News; --data names a folder with the real
ones. Six minutes on a quiet core.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from results import Page

from accel_gpt2.catalog.datasets import DATASETS

_ROW = DATASETS["ag_news"]
_TRAINING_TEXTS = 400
_BIN = Path(sys.executable).parent

_NAIVE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
names = json.loads(Path(sys.argv[1], "plan.json").read_text())["class_names"]
folders = sorted(Path(sys.argv[1]).glob("class-*/final"))
tokenizer = AutoTokenizer.from_pretrained(folders[0])
models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders]
for text in sys.stdin:
    ids = tokenizer(text.rstrip("\\n"), return_tensors="pt").input_ids
    end = torch.tensor([[tokenizer.eos_token_id]])
    ids = torch.cat([end, ids, end], dim=1)
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss.item() for model in models]
    print(names[losses.index(min(losses))], flush=True)
"""

# What a prediction needs, in the order in which it comes: imports first, then the run.
_STAGES = """
import sys, time
started = time.perf_counter(), time.process_time()
def stage(name):
    global started
    now = time.perf_counter(), time.process_time()
    print(f"| {name} | {now[0] - started[0]:.2f} | {now[1] - started[1]:.2f} |")
    started = time.perf_counter(), time.process_time()
import typer, accel_gpt2.cli.predict
stage("import the command line")
import numpy, torch
stage("import torch")
from transformers import AutoTokenizer
stage("import the tokenizers of transformers")
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
stage("import its GPT-2, with Accelerate and torch's compiler")
from accel_gpt2.classify.predict import load_classifier
stage("import the rest of ours")
from pathlib import Path
classifier = load_classifier(Path(sys.argv[1]))
stage("open the run, check and load its tokenizer")
classifier.predict(["One short text."])
stage("check and load four models, first answer")
classifier.predict(["One short text."])
stage("second answer")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Seconds from the start of a process, and what it took of the processor."""

    first_seconds: float
    last_seconds: float
    cpu_seconds: float
    lines: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--run", type=Path, help="a trained run, in place of those of four layers")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    page = Page(
        options.output,
        "prediction",
        "What a person waits for answers",
        packages=("accel-gpt2", "torch", "transformers"),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = _texts(options.data, _TRAINING_TEXTS + options.texts)
        runs = {"generative": options.run}
        if options.run is None:
            runs = _train(folder, texts[:_TRAINING_TEXTS])
        _compare(page, runs, texts[_TRAINING_TEXTS:], options.rounds)
        page.add(
            "\n## Where the start goes\n\n| stage | wall, s | CPU, s |\n|---|---|---|\n"
            + _said([sys.executable, "-c", _STAGES, str(runs["generative"])]).strip()
        )


def _texts(data: Path | None, count: int) -> list[str]:
    """One line each."""
    random = np.random.default_rng(0)
    if data is not None:
        from accel_gpt2.data.sources import load_documents

        os.environ["ACCEL_GPT2_DATA"] = str(data)
        split = load_documents(_ROW.name, "test", _ROW.class_names)
        rows = random.choice(len(split), count, replace=False)
        return [" ".join(text.split()) for text in split.select(rows)["text"]]
    from accel_gpt2.data.tokenizer import load_gpt2_tokenizer

    tokenizer = load_gpt2_tokenizer()
    lengths, weights = np.array(_ROW.token_lengths).T
    drawn = random.choice(lengths, count, p=weights / weights.sum())
    # Half of each text is words, so that it is read as about so many tokens again.
    texts = [tokenizer.decode(random.integers(256, 10_000, length)) for length in drawn]
    return [" ".join(text.split()) for text in texts]


def _train(folder: Path, texts: list[str]) -> dict[str, Path]:
    """A run of each objective that has a model per class, or a head; a few steps each."""
    names = _ROW.class_names
    rows = [f'"{text.replace(chr(34), "")}",{names[i % 4]}' for i, text in enumerate(texts)]
    csv = folder / "texts.csv"
    csv.write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
    _save_small(folder / "model")
    start = ["--model", str(folder / "model"), "--init", "pretrained"]
    runs = {}
    for objective in ("generative", "classification"):
        runs[objective] = folder / objective
        command = [str(_BIN / "accel-gpt2"), "train", *start, "--dataset", str(csv)]
        command += ["--profile", "cpu", "--max-steps", "2", "--max-length", "128", "--quiet"]
        command += ["--set", f"objective={objective}", "--set", "global_batch_tokens=512"]
        _said([*command, "--output-dir", str(runs[objective])])
    return runs


def _save_small(folder: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from accel_gpt2.data.tokenizer import load_gpt2_tokenizer

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, n_embd=256)).save_pretrained(folder)
    load_gpt2_tokenizer().save(folder)


def _compare(page: Page, runs: dict[str, Path], texts: list[str], rounds: int) -> None:
    predict = str(_BIN / "accel-gpt2"), "predict"
    programs = {
        "accel-gpt2 predict, a model per class": [*predict, str(runs["generative"]), "-"],
        "naive script, a model per class": [
            sys.executable, "-c", _NAIVE, str(runs["generative"]),
        ],
    }  # fmt: skip
    if "classification" in runs:
        head = [*predict, str(runs["classification"]), "-"]
        programs["accel-gpt2 predict, classification head"] = head
    found: dict[str, list[Answers]] = {name: [] for name in programs}
    for number in range(rounds):
        turn = number % len(programs)
        for name in [*programs][turn:] + [*programs][:turn]:
            found[name].append(_answers(programs[name], texts))
            assert len(found[name][-1].lines) == len(texts), name
            sys.stderr.write(f"{name}: {found[name][-1].cpu_seconds:.1f} s of CPU\n")
    page.add(
        f"{len(texts):,} texts through a pipe, medians of {rounds} rounds; seconds from the start "
        "of the process.\n\n| program | first answer | all answers | CPU | texts/s after the first "
        "|\n|---|---|---|---|---|"
    )
    for name, answers in found.items():
        first, last, cpu = (
            statistics.median(getattr(x, key) for x in answers)
            for key in ("first_seconds", "last_seconds", "cpu_seconds")
        )
        rate = (len(texts) - 1) / (last - first)
        page.add(f"| {name} | {first:.1f} s | {last:.1f} s | {cpu:.1f} s | {rate:.0f} |")
    ours, naive, *_ = found.values()
    pairs = zip(ours, naive, strict=True)
    ratio = statistics.median(b.cpu_seconds / a.cpu_seconds for a, b in pairs)
    pairs_of_lines = zip(ours[0].lines, naive[0].lines, strict=True)
    same = sum(a.startswith(f"{b} ") for a, b in pairs_of_lines)
    page.add(
        f"\nThe naive script takes {ratio:.2f} times the processor of `accel-gpt2 predict`; "
        f"{same:,} of {len(texts):,} answers are the same (it has no priors)."
    )


def _answers(command: list[str], texts: list[str]) -> Answers:
    """Write the texts to a program and time its lines; the two of a heading are no answers."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    times: list[float] = []
    answers: list[str] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as lines:
        lines.write("\n".join(texts) + "\n")
        lines.seek(0)
        with subprocess.Popen(
            command, stdin=lines, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith(("class ", "\u2500")):
                    times.append(time.perf_counter() - started)
                    answers.append(line.rstrip("\n"))
    if process.returncode:
        raise SystemExit(f"{command} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Answers(
        first_seconds=times[0],
        last_seconds=times[-1],
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        lines=answers,
    )


def _said(command: list[str]) -> str:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    return ended.stdout


if __name__ == "__main__":
    main()
