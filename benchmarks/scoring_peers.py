"""Documents scored per second, and the memory that it takes, beside what a person would run.

    OMP_NUM_THREADS=1 python benchmarks/scoring_peers.py [--data ../shared/data]

log p(document) of the same documents under the same random GPT-2 of 4 layers of width 256 with
GPT-2's whole vocabulary, in fp32 on one thread. Each way is as its users have it, in a process of
its own that lives through all rounds: the peers with gelu_new, as GPT-2's configuration says, and
what we run with our fused kernel, which gives the same values; one more naive loop has that too.
First every way says the scores, which have to be equal, and the most memory it held for them over
what it held before; then the ways take turns, and a ratio is of two turns of one round, in CPU
seconds. `products` are the matrix products of a forward pass and nothing else. lm-eval is left out
where it is not installed.

Lengths are those of the data set's row in the catalog, the tokens random; --data names a folder
with the real texts. Ten minutes on a quiet core.
"""

import argparse
import ctypes
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from results import Page
from token_documents import Documents
from torch import Tensor

from accel_gpt2.catalog.datasets import DATASETS

_BOS = 50256
_VOCAB_SIZE = 50257
_MAX_LENGTH = 512
_DATASETS = {"ag_news": 192, "imdb": 32}  # documents
_BATCH_DOCUMENTS = {"ag_news": 32, "imdb": 8}  # of the peers that make batches: 4,000 tokens
_SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 256}
_LARGEST_DIFFERENCE = 1e-5  # relative
OURS, NAIVE, NAIVE_FUSED, BATCHES, LM_EVAL, PRODUCTS = (
    "accel-gpt2 score_documents",
    "naive loop, model(ids, labels=ids)",
    "naive loop, gelu_pytorch_tanh",
    "batches, whole log-softmax",
    "lm-eval, loglikelihood",
    "products",
)


Score = Callable[[Documents], NDArray[np.float64]]


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
    ways = (OURS, NAIVE, NAIVE_FUSED, BATCHES, LM_EVAL, PRODUCTS)
    found = importlib.util.find_spec("lm_eval") is not None
    return tuple(way for way in ways if found or way != LM_EVAL)


def _compare(page: Page, dataset: str, options: argparse.Namespace) -> None:
    documents = _read(dataset, options.data, options.share)
    fork = multiprocessing.get_context("fork")  # libraries and documents are there already
    with ExitStack() as stack:
        processes = {
            way: stack.enter_context(
                ProcessPoolExecutor(1, fork, _start, (way, dataset, documents))
            )
            for way in _ways()
        }
        first = {way: process.submit(_first).result() for way, process in processes.items()}
        page.add(
            f"## {dataset}\n\n{len(documents.token_ids)} documents of "
            f"{documents.lengths.mean() - 1:.0f} predicted tokens on average"
            f"{'' if options.data else ', random tokens'}.\n\n| way | largest difference from the "
            "naive loop's scores, relative |\n|---|---|"
        )
        for way, (scores, _) in first.items():
            if way not in (NAIVE, PRODUCTS):
                difference = float(np.abs(scores / first[NAIVE][0] - 1).max())
                page.add(f"| {way} | {difference:.1e} |")
                if not difference < _LARGEST_DIFFERENCE:
                    raise SystemExit(f"{way} gives other scores: {difference:.1e}")
        seconds: dict[str, list[float]] = {way: [] for way in processes}
        for number in range(options.rounds):
            order = deque(processes)
            order.rotate(-number)
            for way in order:
                seconds[way].append(processes[way].submit(_turn).result())
            sys.stderr.write(f"{dataset}: round {number + 1} of {options.rounds}\n")
    memory = {way: held for way, (_, held) in first.items()}
    _add_results(page, len(documents.token_ids), seconds, memory)


def _add_results(
    page: Page, num_documents: int, seconds: dict[str, list[float]], memory: dict[str, int]
) -> None:
    page.add(
        "\n| way | documents/s | times the naive loop, median | least | most | peak memory |"
        "\n|---|---|---|---|---|---|"
    )
    for way, own in seconds.items():
        ratios = [naive / mine for naive, mine in zip(seconds[NAIVE], own, strict=True)]
        rate = num_documents / statistics.median(own)
        held = f"{memory[way] / 2**20:,.0f} MiB" if way != PRODUCTS else ""
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


def _model(activation_function: str = "gelu_new") -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**_SHAPE, activation_function=activation_function)
    return GPT2LMHeadModel(config).eval()


def _way(way: str, dataset: str) -> Score:
    size = _BATCH_DOCUMENTS[dataset]
    match way:
        case _ if way == OURS:
            return _ours()
        case _ if way == NAIVE:
            return partial(_naive, _model())
        case _ if way == NAIVE_FUSED:
            return partial(_naive, _model("gelu_pytorch_tanh"))
        case _ if way == BATCHES:
            return partial(_batches, _model(), size)
        case _ if way == LM_EVAL:
            return _lm_eval(size)
        case _:
            return _products


def _ours() -> Score:
    from accel_gpt2.recipe import TrainRecipe
    from accel_gpt2.train.causal import LanguageModel
    from accel_gpt2.train.processes import build_accelerator
    from accel_gpt2.train.scoring import score_documents

    recipe = TrainRecipe()
    accelerator = build_accelerator(recipe)
    model = LanguageModel(_model("gelu_pytorch_tanh"), recipe.loss_chunk_tokens).eval()
    return partial(
        score_documents,
        model,
        micro_batch_tokens=recipe.micro_batch_tokens,
        accelerator=accelerator,
    )


@torch.no_grad()
def _naive(model: Any, documents: Documents) -> NDArray[np.float64]:
    scores = []
    for ids in documents.token_ids:
        tokens = torch.from_numpy(ids)[None]
        scores.append(-model(tokens, labels=tokens).loss.item() * (len(ids) - 1))
    return np.array(scores)


@torch.no_grad()
def _batches(model: Any, size: int, documents: Documents) -> NDArray[np.float64]:
    scores: list[float] = []
    for start in range(0, len(documents.token_ids), size):
        rows = [torch.from_numpy(ids) for ids in documents.token_ids[start : start + size]]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True)
        logits: Tensor = model(tokens, attention_mask=mask).logits
        log_p = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
        scores += (log_p * mask[:, 1:]).sum(dim=1).tolist()
    return np.array(scores)


def _lm_eval(size: int) -> Score:
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
    parts, rest = divmod(_VOCAB_SIZE, words)
    inputs += [(x, words)] * parts + [(x, rest)]
    weights = {(len(x.T), out): torch.zeros(out, len(x.T)) for x, out in inputs}
    for _ in range(int(passes)):
        for x, out in inputs:
            torch.mm(x, weights[len(x.T), out].T)
    last = int(passes % 1 * rows)
    for x, out in inputs:
        torch.mm(x[:last], weights[len(x.T), out].T)
    return np.zeros(len(documents.token_ids))


# What the process of one way keeps.
_score: Score
_documents: Documents


def _start(way: str, dataset: str, documents: Documents) -> None:
    global _score, _documents
    _score, _documents = _way(way, dataset), documents


def _first() -> tuple[NDArray[np.float64], int]:
    """The scores, and the most that this process held for them over what it held before."""
    # What libraries set up once is nobody's; a longer document would leave memory to have again.
    _score(Documents([np.array([_BOS, 0, _BOS])]))
    # Nor does it count that building the model took more, or that this memory lies about.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    before = _status_bytes("VmRSS")
    scores = _score(_documents)
    return scores, _status_bytes("VmHWM") - before


def _turn() -> float:
    """CPU seconds."""
    started = time.process_time()
    _score(_documents)
    return time.process_time() - started


def _status_bytes(name: str) -> int:
    # Not getrusage: its maximum is that of the process that started this one, where that is more.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
