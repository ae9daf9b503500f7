"""What grows with what: documents, classes, length of documents, size of the model.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--million]

Each row is a process of its own. For documents: made-up texts of the lengths of AG News in a CSV
are read and cleaned, tokenised, put in order and cut into the first batch; then the same again as
a start that goes on does it, from the cache. Memory is the most that is not a mapped file, sampled
fifty times a second, over what the process held after its imports: a mapped file is read in where
it is needed and costs no memory that another program could want. CPU seconds throughout.

For classes: a training of two steps each, and predictions. For length and size: scoring, on random
weights with GPT-2's whole vocabulary. Eight minutes on a quiet core, a quarter of an hour with
--million.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from results import Page

from accel_gpt2.catalog.datasets import DATASETS

_DOCUMENTS = (1_000, 10_000, 100_000, 300_000)
_CLASSES = (2, 4, 8, 16, 32)
_LENGTHS = (32, 64, 128, 256, 512, 1024)
_SIZES = ((2, 2, 128), (4, 4, 256), (6, 6, 384), (12, 12, 768))
_WORDS = 20_000
_SCORED_TOKENS = 8192
_MEMORY_OF_TEXT = 2.0  # digest, labels and lengths of a row, and what Python makes of them
_FLAT = 1.5  # times the least cost of a document, among files of 10,000 rows and more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--documents", type=int, nargs="*", default=list(_DOCUMENTS))
    parser.add_argument("--classes", type=int, nargs="*", default=list(_CLASSES))
    parser.add_argument("--lengths", type=int, nargs="*", default=list(_LENGTHS))
    parser.add_argument("--sizes", type=int, default=len(_SIZES), help="how many model sizes")
    parser.add_argument("--million", action="store_true", help="a million documents too")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        kind, *values = options.row
        found = _ROWS[kind](*(int(value) for value in values))
        sys.stdout.write(f"\n{json.dumps(found)}\n")
        return
    page = Page(
        options.output,
        "scaling",
        "What grows with what",
        packages=("accel-gpt2", "torch", "transformers", "datasets"),
    )
    if options.documents:
        _write_documents(page, options.documents + [1_000_000] * options.million)
    if options.classes:
        _write_classes(page, options.classes)
    if options.lengths:
        _write_lengths(page, options.lengths)
    if options.sizes:
        _write_sizes(page, _SIZES[: options.sizes])


def _write_documents(page: Page, counts: Sequence[int]) -> None:
    page.add(
        "## Documents\n\nCPU seconds for each 100,000 rows; the first batch and memory as they are."
        "\n\n| rows | read and clean | tokenise | the same from the cache | first batch, s "
        "| memory, MiB |\n|---|---|---|---|---|---|"
    )
    rows = {}
    for count in counts:
        row = rows[count] = _measure("documents", count)
        per = 100_000 / count
        page.add(
            f"| {count:,} | {row['clean'] * per:.2f} | {row['tokenize'] * per:.2f} | "
            f"{row['again'] * per:.2f} | {row['batch']:.3f} | {row['memory'] / 2**20:.0f} |"
        )
    large = [count for count in counts if count >= 10_000]
    if len(large) > 1:
        page.add("")
        for what, name in (("clean", "reading and cleaning"), ("tokenize", "tokenising")):
            costs = [rows[count][what] / count for count in large]
            claim = f"A row's {name}, {large[-1]:,} rows over the least"
            page.bar(claim, costs[-1] / min(costs), _FLAT, at_most=True)
        # The difference of two sizes, because libraries hold some memory whatever the rows.
        before, last = large[-2:]
        per_row = (rows[last]["memory"] - rows[before]["memory"]) / (last - before)
        text = rows[last]["text_bytes"] / last
        page.bar(
            f"Memory for one row more, over the {text:.0f} bytes of its text",
            per_row / text,
            _MEMORY_OF_TEXT,
            at_most=True,
        )


def _write_classes(page: Page, counts: Sequence[int]) -> None:
    page.add(
        "\n## Classes\n\ngpt2-tiny, 30 documents and two steps a class.\n\n| classes | training, s "
        "a class | first predictions, s a class | memory, MiB |\n|---|---|---|---|"
    )
    for count in counts:
        row = _measure("classes", count)
        page.add(
            f"| {count} | {row['train'] / count:.2f} | {row['predict'] / count:.3f} | "
            f"{row['memory'] / 2**20:.0f} |"
        )


def _write_lengths(page: Page, lengths: Sequence[int]) -> None:
    page.add(
        "\n## Length of documents\n\nScoring, 4 layers of width 256.\n\n"
        "| tokens a document | tokens/s | memory, MiB |\n|---|---|---|"
    )
    for length in lengths:
        row = _measure("scoring", 4, 4, 256, length)
        page.add(f"| {length} | {row['rate']:,.0f} | {row['memory'] / 2**20:.0f} |")


def _write_sizes(page: Page, sizes: Sequence[tuple[int, int, int]]) -> None:
    page.add(
        "\n## Size of the model\n\nScoring documents of 64 tokens.\n\n| layers x width "
        "| million parameters | tokens/s | GFLOP/s | memory, MiB |\n|---|---|---|---|---|"
    )
    for n_layer, n_head, n_embd in sizes:
        row = _measure("scoring", n_layer, n_head, n_embd, 64)
        flops = 2 * (12 * n_layer * n_embd**2 + 50257 * n_embd) * row["rate"]
        page.add(
            f"| {n_layer} x {n_embd} | {row['parameters'] / 1e6:.1f} | {row['rate']:,.0f} | "
            f"{flops / 1e9:.1f} | {row['memory'] / 2**20:.0f} |"
        )


def _measure(kind: str, *values: int) -> dict[str, float]:
    started = time.perf_counter()
    command = [sys.executable, __file__, "--row", kind, *map(str, values)]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stderr)
    sys.stderr.write(f"{kind} {values}: {time.perf_counter() - started:.0f} s\n")
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _documents(count: int) -> dict[str, float]:
    from accel_gpt2.data.batching import epoch_batches, split_micro_batches
    from accel_gpt2.data.sources import load_text_data
    from accel_gpt2.data.tokenized import tokenize_documents
    from accel_gpt2.data.tokenizer import load_gpt2_tokenizer
    from accel_gpt2.recipe import TrainRecipe

    with _own_folder() as folder:
        text_bytes = _write_csv(folder / "texts.csv", count, num_classes=4)
        recipe = TrainRecipe(dataset=str(folder / "texts.csv"), max_length=256)
        tokenizer = load_gpt2_tokenizer()
        found: dict[str, float] = {"text_bytes": text_bytes}
        with _memory() as memory:

            def clean() -> Any:
                return load_text_data(recipe)

            found["clean"], text = _timed(clean)

            def tokenize() -> Any:
                return tokenize_documents(text.train, tokenizer, 256, description="train")

            found["tokenize"], tokens = _timed(tokenize)

            def first_batch() -> Any:
                own = tokens.for_class(0)
                lengths = tokens.lengths[own]
                order = epoch_batches(
                    lengths, global_batch_tokens=8192, global_batch_size=None, seed=0, epoch=0
                )
                return split_micro_batches(lengths, order[0], world_size=1, micro_batch_tokens=4096)

            found["batch"], _ = _timed(first_batch)
            found["again"] = _timed(clean)[0] + _timed(tokenize)[0]
        found["memory"] = memory[0]
        return found


def _classes(count: int) -> dict[str, float]:
    from accel_gpt2.classify.fit import fit
    from accel_gpt2.classify.predict import load_classifier
    from accel_gpt2.recipe import Layer
    from accel_gpt2.recipe.resolving import resolve

    with _own_folder() as folder:
        _write_csv(folder / "texts.csv", 40 * count, num_classes=count)
        values = {
            "model": "gpt2-tiny",
            "dataset": str(folder / "texts.csv"),
            "tokenizer_vocab_size": 512,
            "max_length": 64,
            "max_steps": 2,
            "global_batch_size": 8,
            "validation_documents": 2 * count,
            "trackers": [],
        }
        resolved = resolve([Layer(origin="benchmark", values=values)])
        with _memory() as memory:
            seconds, _ = _timed(lambda: fit(resolved, folder / "run", quiet=True, silent=True))
            classifier = load_classifier(folder / "run")
            predicting, _ = _timed(lambda: classifier.predict(["some text", "some other text"]))
        return {"train": seconds, "predict": predicting, "memory": memory[0]}


def _scoring(n_layer: int, n_head: int, n_embd: int, length: int) -> dict[str, float]:
    import torch
    from accelerate import Accelerator
    from transformers import GPT2Config, GPT2LMHeadModel

    from accel_gpt2.classify.scores import InMemoryDocuments
    from accel_gpt2.data.tokenizer import EncodedDocument
    from accel_gpt2.recipe import TrainRecipe
    from accel_gpt2.train.causal import LanguageModel
    from accel_gpt2.train.scoring import score_documents

    torch.manual_seed(0)
    recipe, accelerator = TrainRecipe(), Accelerator(cpu=True)
    config = GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, activation_function="gelu_pytorch_tanh"
    )
    model = LanguageModel(GPT2LMHeadModel(config), recipe.loss_chunk_tokens).eval()
    tokens = np.random.default_rng(0).integers(0, 50256, (_SCORED_TOKENS // length, length + 1))
    documents = InMemoryDocuments(
        [EncodedDocument(token_ids=ids, num_bytes=length, truncated=False) for ids in tokens]
    )

    def score() -> object:
        return score_documents(
            model,
            documents,
            micro_batch_tokens=recipe.micro_batch_tokens,
            accelerator=accelerator,
        )

    with _memory() as memory:
        seconds, _ = _timed(score)
    rate = length * len(tokens) / seconds
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"rate": rate, "memory": memory[0], "parameters": parameters}


_ROWS: dict[str, Callable[..., dict[str, float]]] = {
    "documents": _documents,
    "classes": _classes,
    "scoring": _scoring,
}


@contextmanager
def _own_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACCEL_GPT2_CACHE"] = f"{folder}/cache"
        yield Path(folder)


def _write_csv(path: Path, count: int, *, num_classes: int) -> int:
    """Texts of a Zipf's law's words, no two alike; returns the bytes of all texts."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(random.choice(letters, random.integers(2, 10))) for _ in range(_WORDS)]
    lengths, weights = np.array(DATASETS["ag_news"].token_lengths).T
    drawn = random.choice(lengths, count, p=weights / weights.sum())
    text_bytes = 0
    with path.open("w", encoding="utf-8") as file:
        file.write("text,label\n")
        for row, length in enumerate(drawn):
            # A made-up word is about two and a half tokens.
            picked = random.zipf(1.3, max(1, int(length / 2.5))) % _WORDS
            text = f"{row} {' '.join(words[index] for index in picked)}"
            text_bytes += len(text)
            file.write(f"{text},class {row % num_classes:02}\n")
    return text_bytes


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


@contextmanager
def _memory() -> Iterator[list[int]]:
    """One number when it ends: the most anonymous bytes over those at its begin."""
    most = [0]
    before = _anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], _anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield most
    finally:
        done.set()
        watcher.join()


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
