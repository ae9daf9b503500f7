"""Documents scored per second, and the memory that it takes, beside what a person would run.

    OMP_NUM_THREADS=1 python benchmarks/scoring_peers.py [--data ../shared/data]

log p(document) of the same documents under the same random GPT-2 of 4 layers of width 256 with
GPT-2's whole vocabulary, in fp32 on one thread. First every way says the scores, which have to be
equal; then the ways take turns, and a ratio is of two turns of one round, in CPU seconds. Memory is
the peak of a process of each way's own over what it held before it scored. `products` are the
matrix products of a forward pass and nothing else. lm-eval is left out where it is not installed.

Lengths are those of the data set's row in the catalog, the tokens random; --data names a folder
with the real texts. Five minutes on a quiet core.
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from results import Page
from torch import Tensor

from accel_gpt2.catalog.datasets import DATASETS

_BOS = 50256
_MAX_LENGTH = 512
_DATASETS = {"ag_news": 48, "imdb": 12}  # documents
_BATCH_DOCUMENTS = {"ag_news": 32, "imdb": 8}  # of the peers that make batches: 4,000 tokens
_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256}
_LARGEST_DIFFERENCE = 1e-5  # relative
OURS, NAIVE, BATCHES, LM_EVAL, PRODUCTS = (
    "accel-gpt2 score_documents",
    "naive loop, model(ids, labels=ids)",
    "batches, whole log-softmax",
    "lm-eval, loglikelihood",
    "products",
)


@dataclass(frozen=True, slots=True)
class Documents:
    """BOS, tokens, EOS each."""

    token_ids: Sequence[NDArray[np.int64]]

    @property
    def lengths(self) -> NDArray[Any]:
        return np.array([len(ids) for ids in self.token_ids])

    def document(self, index: int) -> NDArray[Any]:
        return self.token_ids[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the real data sets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--share", type=float, default=1.0, help="of the documents")
    parser.add_argument("--output", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--datasets", nargs="+", default=list(_DATASETS), choices=_DATASETS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    page = Page(
        options.output,
        "scoring-peers",
        "Scoring beside what a person would run",
        packages=("torch", "transformers", *(("lm_eval",) if LM_EVAL in _ways() else ())),
    )
    if LM_EVAL not in _ways():
        page.add("lm-eval is not installed, and left out.\n")
    for dataset in options.datasets:
        _compare(page, dataset, options)


def _ways() -> tuple[str, ...]:
    ways = (OURS, NAIVE, BATCHES, LM_EVAL, PRODUCTS)
    found = importlib.util.find_spec("lm_eval") is not None
    return tuple(way for way in ways if found or way != LM_EVAL)


def _compare(page: Page, dataset: str, options: argparse.Namespace) -> None:
    documents = _read(dataset, options.data, options.share)
    _model()
    # Before anything else: memory that this process has had and freed would be had for nothing.
    memory = {way: _measure_memory(way, documents, dataset) for way in _ways() if way != PRODUCTS}
    ways = {way: _way(way, dataset) for way in _ways()}
    reference = ways[NAIVE](documents)
    page.add(
        f"## {dataset}\n\n{len(documents.token_ids)} documents of "
        f"{documents.lengths.mean() - 1:.0f} predicted tokens on average"
        f"{'' if options.data else ', random tokens'}.\n\n| way | largest difference from the "
        "naive loop's scores, relative |\n|---|---|"
    )
    for way, score in ways.items():
        if way not in (NAIVE, PRODUCTS):
            difference = float(np.abs(score(documents) / reference - 1).max())
            page.add(f"| {way} | {difference:.1e} |")
            if not difference < _LARGEST_DIFFERENCE:
                raise SystemExit(f"{way} gives other scores: {difference:.1e}")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(options.rounds):
        order = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for way in order:
            started = time.process_time()
            ways[way](documents)
            seconds[way].append(time.process_time() - started)
        sys.stderr.write(f"{dataset}: round {number + 1} of {options.rounds}\n")
    page.add(
        "\n| way | documents/s | times the naive loop, median | least | most | peak memory |"
        "\n|---|---|---|---|---|---|"
    )
    for way in ways:
        ratios = [naive / own for naive, own in zip(seconds[NAIVE], seconds[way], strict=True)]
        rate = len(documents.token_ids) / statistics.median(seconds[way])
        held = f"{memory[way] / 2**20:,.0f} MiB" if way in memory else ""
        page.add(
            f"| {way} | {rate:.1f} | {statistics.median(ratios):.2f} | {min(ratios):.2f} | "
            f"{max(ratios):.2f} | {held} |"
        )
    page.add("")
    pairs = list(zip(seconds[NAIVE], seconds[OURS], seconds[PRODUCTS], strict=True))
    page.bar("Times the naive loop", statistics.median(a / b for a, b, _ in pairs), 3)
    page.bar("Memory over that of batches", memory[OURS] / memory[BATCHES], 0.1, at_most=True)
    share = statistics.median(c / b for _, b, c in pairs)
    page.add(f"- The products alone take {share:.0%} of our time.\n")


def _read(dataset: str, data: Path | None, share: float) -> Documents:
    random = np.random.default_rng(0)
    count = max(2, round(share * _DATASETS[dataset]))
    if data is None:
        values, weights = np.array(DATASETS[dataset].token_lengths).T
        lengths = random.choice(values, count, p=weights / weights.sum())
        texts = [random.integers(0, _BOS, min(length, _MAX_LENGTH - 2)) for length in lengths]
        return Documents([np.array([_BOS, *text, _BOS]) for text in texts])
    from accel_gpt2.data.sources import load_documents
    from accel_gpt2.data.tokenizer import load_gpt2_tokenizer

    os.environ["ACCEL_GPT2_DATA"] = str(data)
    split = load_documents(dataset, "test", DATASETS[dataset].class_names)
    rows = np.sort(random.choice(len(split), count, replace=False))
    encoded = load_gpt2_tokenizer().encode(split.select(rows)["text"][:], _MAX_LENGTH)
    return Documents([document.token_ids for document in encoded])


@cache
def _model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**_SHAPE, activation_function="gelu_pytorch_tanh")
    return GPT2LMHeadModel(config).eval()


def _way(way: str, dataset: str) -> Callable[[Documents], NDArray[np.float64]]:
    match way:
        case _ if way == OURS:
            return _ours()
        case _ if way == NAIVE:
            return _naive
        case _ if way == BATCHES:
            return lambda documents: _batches(documents, _BATCH_DOCUMENTS[dataset])
        case _ if way == LM_EVAL:
            return _lm_eval(_BATCH_DOCUMENTS[dataset])
        case _:
            return _products


def _ours() -> Callable[[Documents], NDArray[np.float64]]:
    from accelerate import Accelerator

    from accel_gpt2.recipe import TrainRecipe
    from accel_gpt2.train.causal import LanguageModel
    from accel_gpt2.train.scoring import score_documents

    recipe, accelerator = TrainRecipe(), Accelerator(cpu=True)
    model = LanguageModel(_model(), recipe.loss_chunk_tokens).eval()
    return lambda documents: score_documents(
        model,
        documents,
        micro_batch_tokens=recipe.micro_batch_tokens,
        accelerator=accelerator,
    )


@torch.no_grad()
def _naive(documents: Documents) -> NDArray[np.float64]:
    scores = []
    for ids in documents.token_ids:
        tokens = torch.from_numpy(ids)[None]
        scores.append(-_model()(tokens, labels=tokens).loss.item() * (len(ids) - 1))
    return np.array(scores)


@torch.no_grad()
def _batches(documents: Documents, size: int) -> NDArray[np.float64]:
    scores: list[float] = []
    for start in range(0, len(documents.token_ids), size):
        rows = [torch.from_numpy(ids) for ids in documents.token_ids[start : start + size]]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)
        logits: Tensor = _model()(tokens, attention_mask=mask).logits
        log_p = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        scores += (log_p * mask[:, 1:]).sum(dim=1).tolist()
    return np.array(scores)


def _lm_eval(size: int) -> Callable[[Documents], NDArray[np.float64]]:
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
    from transformers import GPT2Tokenizer

    from accel_gpt2.data.tokenizer import GPT2_VOCABULARY

    tokenizer = GPT2Tokenizer.from_pretrained(GPT2_VOCABULARY)
    model = HFLM(pretrained=_model(), tokenizer=tokenizer, device="cpu", batch_size=size)

    def score(documents: Documents) -> NDArray[np.float64]:
        # Tokenised as the others are; its own encoding of "" is BOS too.
        asked = [(("", ""), [_BOS], ids[1:].tolist()) for ids in documents.token_ids]
        found = model._loglikelihood_tokens(asked, disable_tqdm=True)
        return np.array([log_p for log_p, _ in found])

    return score


@torch.no_grad()
def _products(documents: Documents) -> NDArray[np.float64]:
    """A forward pass's products, of 512 rows and an aligned part of the vocabulary each."""
    d, rows = _SHAPE["n_embd"], 512
    passes = int((documents.lengths - 1).sum()) / rows
    x, wide = torch.zeros(rows, d), torch.zeros(rows, 4 * d)
    inputs = [(x, 3 * d), (x, d), (x, 4 * d), (wide, d)] * _SHAPE["n_layer"]
    words = 1024
    parts, rest = divmod(_model().config.vocab_size, words)
    inputs += [(x, words)] * parts + [(x, rest)]
    weights = {(len(x.T), out): torch.zeros(out, len(x.T)) for x, out in inputs}
    for _ in range(int(passes)):
        for x, out in inputs:
            torch.mm(x, weights[len(x.T), out].T)
    last = int(passes % 1 * rows)
    for x, out in inputs:
        torch.mm(x[:last], weights[len(x.T), out].T)
    return np.zeros(len(documents.token_ids))


def _held_bytes(way: str, documents: Documents, dataset: str) -> int:
    """The most that this process holds while it scores, over what it held before."""
    score = _way(way, dataset)
    # What libraries set up once is nobody's; a longer document would leave memory to have again.
    score(Documents([np.array([_BOS, 0, _BOS])]))
    before = _status_bytes("VmRSS")
    score(documents)
    return _status_bytes("VmHWM") - before


def _status_bytes(name: str) -> int:
    # Not getrusage: its maximum is that of the process that started this one, where that is more.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _measure_memory(way: str, documents: Documents, dataset: str) -> int:
    """In a process of its own, which has the model and all libraries from this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        return process.submit(_held_bytes, way, documents, dataset).result()


if __name__ == "__main__":
    main()
