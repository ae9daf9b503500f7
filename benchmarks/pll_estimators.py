"""How much of a masked language model classifier's accuracy its likelihood estimate costs.

    python benchmarks/pll_estimators.py runs/imdb-roberta-tiny --documents 400

takes a run with objective = masked_lm and classifies the same test documents by the full
pseudo-log-likelihood and by random masks, shared between the classes or drawn by each of them, with
1 to 16 draws. Beside what was measured stands what the spread of single tokens predicts for
independent masks: with k of n tokens masked, a class's estimate has the variance
n (n - k) / k · var(token), and a document goes to the right class with the normal distribution's
probability that the estimates' difference keeps its sign. Prints Markdown.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from results import say
from scipy.stats import norm

from accel_gpt2.classify.run import Run, open_run
from accel_gpt2.classify.scores import Scorers
from accel_gpt2.data.sources import load_text_data
from accel_gpt2.data.tokenized import TokenizedDocuments, tokenize_documents
from accel_gpt2.recipe import Pll
from accel_gpt2.train.masked import MaskedLanguageModel, PllEstimator
from accel_gpt2.train.model import load_final_tokenizer
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents

DRAWS = (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--documents", type=int, default=400, help="of the test split, at random")
    options = parser.parse_args()
    run = open_run(options.run)
    documents = _documents(run, options.documents)
    token_values = [_token_values(run, index, documents) for index in range(len(run.finals))]
    full = np.array([[values.sum() for values in of_class] for of_class in token_values]).T
    say(
        f"{len(documents)} documents of {run.recipe.dataset}, {run.recipe.model} per class, "
        f"{run.recipe.mask_fraction:.0%} of the tokens masked at once\n\n"
        "| estimate | draws | accuracy | ± standard error |\n|---|---|---|---|"
    )
    _row("full", "", _accuracy(run, full, documents))
    for kind in ("shared", "independent"):
        for draws in DRAWS:
            scores = _scores(run, documents, kind, draws)
            _row(kind, str(draws), _accuracy(run, scores, documents))
    for draws in DRAWS:
        predicted = _predicted(run, token_values, full, documents, draws)
        _row("independent, predicted from single tokens", str(draws), predicted)


def _row(name: str, draws: str, right: np.ndarray) -> None:
    error = np.sqrt(right.mean() * (1 - right.mean()) / len(right))
    say(f"| {name} | {draws} | {right.mean():.3f} | {error:.3f} |")


def _documents(run: Run, count: int) -> TokenizedDocuments:
    text = load_text_data(run.recipe)
    tokenizer = load_final_tokenizer(run.finals[0])
    tokens = tokenize_documents(text.test, tokenizer, run.recipe.max_length, description="test")
    chosen = np.random.default_rng(run.recipe.seed).permutation(len(tokens))[:count]
    return tokens.select(np.sort(chosen))


def _scorer(run: Run, index: int, estimator: PllEstimator) -> MaskedLanguageModel:
    model = Scorers(run).load(index)
    if not isinstance(model, MaskedLanguageModel):
        raise SystemExit(f"{run.directory} holds no masked language models.")
    model.estimator = estimator
    return model


def _scores(run: Run, documents: TokenizedDocuments, kind: Pll, draws: int) -> np.ndarray:
    estimator = PllEstimator(
        kind=kind,
        mask_fraction=run.recipe.mask_fraction,
        num_samples=draws,
        seed=run.recipe.seed,
    )
    columns = [
        score_documents(
            _scorer(run, index, dataclasses.replace(estimator, class_index=index)),
            documents,
            micro_batch_tokens=run.recipe.micro_batch_tokens,
            accelerator=build_accelerator(run.recipe),
        )
        for index in range(len(run.finals))
    ]
    return np.column_stack(columns)


def _token_values(run: Run, index: int, documents: TokenizedDocuments) -> list[np.ndarray]:
    """log p of each token given all others, under one class's model; one array per document."""
    model = _scorer(run, index, PllEstimator())
    device = build_accelerator(run.recipe).device
    found: list[np.ndarray] = []
    for number in range(len(documents)):
        passes: Any = model.to(device).masked_log_likelihoods([documents.document(number)], device)
        found.append(np.concatenate([values.cpu().double().numpy() for _, _, values in passes]))
    return found


def _accuracy(run: Run, scores: np.ndarray, documents: TokenizedDocuments) -> np.ndarray:
    return np.asarray((scores + run.log_prior).argmax(axis=1) == documents.labels, dtype=float)


def _predicted(
    run: Run,
    token_values: list[list[np.ndarray]],
    full: np.ndarray,
    documents: TokenizedDocuments,
    draws: int,
) -> np.ndarray:
    """The probability of a right answer, document by document: of the label's class against each
    other class, as if these were independent."""
    probabilities = []
    for number, label in enumerate(documents.labels):
        values = [of_class[number] for of_class in token_values]
        num_tokens = len(values[0])
        masked = max(1, round(run.recipe.mask_fraction * num_tokens))
        spread = [
            num_tokens * (num_tokens - masked) / masked * x.var(ddof=1) / draws
            if num_tokens > 1
            else 0.0
            for x in values
        ]
        joint = full[number] + run.log_prior
        others = [other for other in range(len(values)) if other != label]
        probabilities.append(
            np.prod(
                [
                    norm.cdf(
                        (joint[label] - joint[other])
                        / np.sqrt(spread[label] + spread[other] + 1e-12)
                    )
                    for other in others
                ]
            )
        )
    return np.array(probabilities)


if __name__ == "__main__":
    main()
