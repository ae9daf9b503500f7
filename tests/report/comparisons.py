"""comparison.json as a comparison leaves it, from simulated scores and the project's statistics."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from accel_gpt2.classify import bayes, curves, statistics
from accel_gpt2.classify.calibration import calibrated_log_probabilities, fit_calibration
from accel_gpt2.classify.metrics import bits_per_byte_matrix, classification_metrics
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.recipe.layers import to_yaml

HOSTILE = "<script>alert('$x$')</script>"
# (id, kind, name, how far the true class is ahead in standard deviations)
ARMS = (
    ("1a", "classical", "TF-IDF + logistic regression", 1.35),
    ("1b", "classical", "naive Bayes n-gram models", 1.15),
    ("2", "zero_shot", "gpt2 zero-shot", 0.75),
    ("3", "generative", "gpt2 per class", 1.5),
    ("4", "generative", "gpt2 LoRA per class", 1.42),
    ("5", "discriminative", "gpt2 with a head", 1.62),
    ("6", "discriminative", "roberta-base with a head", 1.75),
    ("7a", "masked", "roberta-base per class, own masks", 0.2),
    ("7b", "masked", "roberta-base per class, shared masks", 1.1),
    ("7c", "masked", "roberta-base per class, full PLL", 1.4),
    ("8", "hybrid", "gpt2 hybrid per class", 1.6),
)
WITHOUT_TRAINING = {"1a", "1b", "2"}
HEADS = {"1a", "5", "6"}


def write_comparison(
    directory: Path,
    class_names: Sequence[str],
    *,
    ids: Sequence[str] = tuple(row[0] for row in ARMS),
    num_seeds: int = 3,
    num_documents: int = 800,
    name: str = "{}",
) -> dict[str, Any]:
    """Write comparison.json with the entries of these ids done, and return it.

    `name` wraps every entry's name, class names and texts stay as they are given.
    """
    rng = np.random.default_rng(0)
    num_classes = len(class_names)
    labels = np.arange(num_documents) % num_classes
    num_tokens = rng.integers(8, 120, num_documents)
    difficulty = rng.normal(0, 1, (num_documents, num_classes))  # what all entries share

    entries, correct = [], {}
    for id_, kind, arm_name, strength in ARMS:
        if id_ not in ids:
            continue
        scores = [
            _scores(rng, labels, num_tokens, difficulty, strength, is_posterior=id_ in HEADS)
            for _ in range(num_seeds)
        ]
        entry, right = _entry(id_, kind, arm_name, scores, labels, num_tokens, class_names)
        entry["name"] = name.format(entry["name"])
        entries.append(entry)
        correct[id_] = right
    pairs = statistics.compare_pairs(correct, num_bootstrap=500)
    comparison = {
        "format_version": 1,
        "dataset": "imdb",
        "split": "test",
        "num_documents": num_documents,
        "class_names": list(class_names),
        "class_counts": {
            split: [count] * num_classes
            for split, count in (("train", 900), ("validation", 100), ("test", 400))
        },
        "max_length": 128,
        "truncated_documents": 61,
        "seeds": list(range(num_seeds)),
        "command": f"accel-gpt2 compare --dataset imdb --arms all --seeds {num_seeds}",
        "date": "2026-11-23",
        "environment": {"python": "3.12.3", "torch": "2.13.0+cpu", "machine": "2 CPU cores"},
        "data_treatments": [
            {
                "kind": "duplicate",
                "split": "train",
                "count": 31,
                "example": "row 128: Oil prices rise <b>again</b>",
                "what": "documents that occur in the test split were left out of training",
            }
        ],
        "verdict": [
            "roberta-base with a head (6) wins: its test accuracy is 88.1% (95% interval 85.8 to "
            "90.2), 1.4 points above gpt2 hybrid per class (8), which may be chance.",
            "Training took 12 min 03 s for 6 and 58 min 40 s for 8.",
        ],
        "entries": entries,
        "pairs": pairs,
        "alarms": [
            {
                "kind": "near_chance",
                "entries": ["7a"],
                "what": "The accuracy of 7a is 54.1%, and always answering the largest class gets "
                "50.0%.",
                "cause": "Masks that are drawn anew for each class add noise that is larger than "
                "the difference between the classes.",
                "next": "Compare with 7b and 7c, which score the same models with the same masks.",
            }
        ]
        if "7a" in ids
        else [],
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "comparison.json").write_text(json.dumps(comparison, allow_nan=False))
    return comparison


def missing_entry(id_: str, kind: str) -> dict[str, Any]:
    """An entry of which nothing is known but why, null as a comparison writes it."""
    unknown = ("recipe", "metrics", "by_seed", "curves", "log_ratios", "out_of_distribution")
    return {
        "id": id_,
        "arm": int(id_[0]),
        "name": f"arm {id_}",
        "kind": kind,
        "description": None,
        "status": "missing",
        "why_missing": f"No weights of {HOSTILE} are here: put them into $ACCEL_GPT2_MODELS.",
        "directories": [],
        **dict.fromkeys(unknown),
    }


def _scores(rng, labels, num_tokens, difficulty, strength, *, is_posterior):
    """log p(x|c), or log p(c|x), of one seed; the true class is ahead by `strength` and noise."""
    advantage = difficulty + rng.normal(0, 0.6, difficulty.shape)
    advantage[np.arange(len(labels)), labels] += strength * 1.4
    if is_posterior:
        scores = 1.5 * advantage
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return -4.4 * num_tokens[:, None] + 0.9 * np.sqrt(num_tokens)[:, None] * advantage


def _token_log_likelihoods(log_likelihoods, num_tokens):
    """A document's sum as it comes together token by token, flat over documents."""
    noise = np.random.default_rng(abs(int(log_likelihoods[0]))).normal(0, 2, num_tokens.sum())
    starts = np.cumsum(num_tokens) - num_tokens
    rest = (log_likelihoods - np.add.reduceat(noise, starts)) / num_tokens
    return noise + np.repeat(rest, num_tokens)


def _entry(id_, kind, arm_name, scores, labels, num_tokens, class_names):
    """One done entry and which documents its first seed gets right."""
    num_classes = len(class_names)
    log_prior = (
        np.zeros(num_classes) if id_ in HEADS else np.full(num_classes, -np.log(num_classes))
    )
    first = scores[0]
    calibration = fit_calibration(first, log_prior, num_tokens, labels)
    right = np.array([bayes.predict(x, log_prior) == labels for x in scores])
    over_seeds = statistics.accuracy_over_seeds(right)
    accuracy = over_seeds["accuracy"][0]
    is_causal = kind in {"generative", "hybrid", "zero_shot"}
    entry = {
        "id": id_,
        "arm": int(id_[0]),
        "name": arm_name,
        "kind": kind,
        "description": f"What {arm_name} is, in a sentence or two that say how it decides.",
        "status": "done",
        "why_missing": None,
        "directories": [f"arm-{id_}/seed-{seed}" for seed in range(len(scores))],
        "recipe": None if id_ in WITHOUT_TRAINING else _recipe(id_),
        "metrics": {
            **classification_metrics(
                labels, first, log_prior, calibration, num_tokens, class_names, num_bootstrap=200
            ),
            "bits_per_byte": None
            if id_ in HEADS
            else bits_per_byte_matrix(labels, first, num_tokens * 4).tolist(),
            "documents_per_second": 812.4 / int(id_[0]),
            "scoring_seconds": 1.2,
            "truncated_documents": 61,
            "training": {
                "seconds": 342.0 * int(id_[0]),
                "document_tokens": None if id_ in WITHOUT_TRAINING else 1_966_080,
                "tokens_per_second": None if id_ in WITHOUT_TRAINING else 20_500.0,
                "peak_memory_bytes": None if id_ in WITHOUT_TRAINING else 900_000_000,
                "cost_usd": 0.19 * int(id_[0]) if id_ in {"5", "6"} else None,
            },
            "majority_class_accuracy": 1 / num_classes,
        },
        "by_seed": {"seeds": list(range(len(scores))), **over_seeds},
        "curves": {
            "training_documents": [
                {
                    "documents_per_class": documents,
                    "accuracy": [
                        x - 0.3 * (accuracy - 1 / num_classes) * np.log2(1024 / documents) / 4
                        for x in over_seeds["accuracy"]
                    ],
                }
                for documents in (64, 256, 900)
            ],
            "tokens_read": curves.accuracy_by_tokens_read(
                [_token_log_likelihoods(first[:, i], num_tokens) for i in range(num_classes)],
                num_tokens,
                labels,
                log_prior,
            )
            if is_causal
            else None,
            "risk_coverage": curves.risk_coverage(
                labels, calibrated_log_probabilities(calibration, first, log_prior, num_tokens)
            ),
        },
        "log_ratios": curves.log_ratio_histograms(labels, first, class_names),
        "out_of_distribution": {
            "dataset": "sms_spam",
            **curves.out_of_distribution_aurocs(
                first,
                num_tokens,
                first[::3] * 0.8,
                num_tokens[::3],
                log_prior,
                calibration,
                posteriors_only=id_ in HEADS,
            ),
        },
    }
    return entry, right[0]


def _recipe(id_: str) -> dict[str, Any]:
    import yaml

    recipe = TrainRecipe(model="gpt2", dataset="imdb", finetuning="lora" if id_ == "4" else "full")
    return dict(yaml.safe_load(to_yaml(recipe)))
