"""Arm 2: a pretrained language model that has not seen this data, asked by prompts.

The channel direction of Min et al. 2022 (arXiv:2108.04106): a class's score is log p(x | prompt_c),
the likelihood of the document after a prompt that names the class. The document's tokens and EOS
are scored, the prompt's are not.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_gpt2.catalog.arms import ArmSpec
from accel_gpt2.catalog.datasets import DATASETS, DEFAULT_ZERO_SHOT_TEMPLATE
from accel_gpt2.classify.bayes import log_priors
from accel_gpt2.classify.out_of_distribution import OtherTexts, write_out_of_distribution
from accel_gpt2.classify.scores import InMemoryDocuments
from accel_gpt2.classify.untrained import UntrainedScores, read_compared_data, write_untrained
from accel_gpt2.data.batching import Documents, collate, scoring_batches
from accel_gpt2.data.tokenizer import load_tokenizer
from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.train.causal import LanguageModel, arrays
from accel_gpt2.train.model import build_model
from accel_gpt2.train.objective import to_device
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.progress import TrainProgress
from accel_gpt2.train.scoring import tokens_at_once
from accel_gpt2.train.throughput import peak_memory_bytes


def prompts(dataset: str, class_names: Sequence[str]) -> tuple[str, ...]:
    """One prompt per class: by the data set's template in the catalog, or by one for topics.

    >>> prompts("imdb", ["negative", "positive"])[1]
    'This is a positive movie review:\\n'
    >>> prompts("my_texts.csv", ["river", "orbit"])[0]
    'This text is about river:\\n'
    """
    row = DATASETS.get(dataset)
    template = DEFAULT_ZERO_SHOT_TEMPLATE if row is None else row.zero_shot_template
    names = class_names
    if row is not None and row.zero_shot_class_names and tuple(class_names) == row.class_names:
        names = row.zero_shot_class_names
    return tuple(template.format(class_name=name) for name in names)


def evaluate_zero_shot(
    run_directory: Path,
    arm: ArmSpec,
    recipe: TrainRecipe,
    others: OtherTexts | None = None,
    *,
    class_names: Sequence[str],
    quiet: bool = False,
) -> None:
    """Score the test documents after each class's prompt, and write the evaluation.

    The prior is uniform: labels serve to calibrate, on the validation documents, and for nothing
    else. Where prompt and document are more than the model can read, documents are cut further.

    Args:
        others: what it should notice to be no text of its own.

    Raises:
        UserError: when the pretrained weights or the data cannot be had.
    """
    tokenizer = load_tokenizer(recipe, None)
    model = build_model(
        recipe, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_token_id
    )
    assert isinstance(model, LanguageModel), "the recipe of a comparison is generative"
    texts = prompts(recipe.dataset, class_names)
    prompt_tokens = [
        document.token_ids[1:-1] for document in tokenizer.encode(list(texts), recipe.max_length)
    ]
    positions = getattr(model.transformers_model.config, "max_position_embeddings", None)
    longest = recipe.max_length
    if positions is not None:
        longest = min(longest, positions + 1 - max(len(tokens) for tokens in prompt_tokens))
    if longest < 3:
        raise UserError(
            f"The prompt {max(texts, key=len)!r} leaves no room for text in the {positions} "
            f"positions of {recipe.model}; shorten zero_shot_template in the catalog's row of "
            f"{recipe.dataset}."
        )
    data = read_compared_data(recipe, max_length=longest, progress=not quiet)
    accelerator = build_accelerator(recipe)
    model.to(accelerator.device)
    with TrainProgress(shown=True, quiet=quiet) as progress:

        def score(split: Documents, name: str) -> NDArray[np.float64]:
            columns = []
            for class_name, tokens in zip(class_names, prompt_tokens, strict=True):
                label = f"{name} documents, prompted for {class_name}"
                progress.start(label, len(split.lengths))

                def on_batch(done: int, label: str = label) -> None:
                    progress.update(label, done, len(split.lengths), "")

                columns.append(
                    score_after_prompt(
                        model,
                        split,
                        tokens,
                        micro_batch_tokens=recipe.micro_batch_tokens,
                        accelerator=accelerator,
                        on_batch=on_batch,
                    )
                )
            return np.stack(columns, axis=1)

        validation = score(data.validation, "validation")
        started = time.monotonic()
        test = score(data.test, "test")
        seconds = time.monotonic() - started
        other_documents = InMemoryDocuments(
            [] if others is None else tokenizer.encode(others.texts, longest)
        )
        other = score(other_documents, "other")
    scores = UntrainedScores(
        validation=validation,
        test=test,
        others=other,
        log_prior=log_priors([1] * len(class_names), "uniform"),
        is_posterior=False,
        of_exact_text=True,
        description=f"log p(document | prompt) under {recipe.model}, not trained; prompts: "
        + ", ".join(repr(text) for text in texts),
        training_seconds=0.0,
        scoring_seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(accelerator.device),
    )
    write_untrained(run_directory, recipe, data, scores)
    if others is not None:
        write_out_of_distribution(run_directory, arm, others, other, other_documents.lengths - 1)


def score_after_prompt(
    model: LanguageModel,
    documents: Documents,
    prompt: NDArray[np.int64],
    *,
    micro_batch_tokens: int,
    accelerator: Any,
    on_batch: Callable[[int], None] = lambda done: None,
) -> NDArray[np.float64]:
    """log p(x | prompt) in nats of each document, float64 [num_documents].

    The sum runs over the document's tokens and EOS, as without a prompt.

    Args:
        model: on the accelerator's device; it is left in evaluation mode.
        prompt: token ids that come between BOS and the document's first token.
        on_batch: called after each batch with the number of documents that are done.
    """
    model.eval()
    scores = np.zeros(len(documents.lengths), dtype=np.float64)
    lengths = np.asarray(documents.lengths) + len(prompt)
    budget = tokens_at_once(micro_batch_tokens, accelerator.device)
    done = 0
    for indices in scoring_batches(lengths, micro_batch_tokens=budget):
        plain = [documents.document(int(i)).astype(np.int64) for i in indices]
        batch = collate([np.concatenate([x[:1], prompt, x[1:]]) for x in plain])
        valid = batch.valid.copy()
        valid[:, : len(prompt)] = False  # what is predicted there is the prompt
        batch = dataclasses.replace(batch, valid=valid)
        with accelerator.autocast():
            likelihoods = model.document_log_likelihoods(
                *to_device(arrays(batch), accelerator.device)
            )
        scores[indices] = likelihoods.cpu().numpy()
        done += len(indices)
        on_batch(done)
    return scores
