"""Which class a text belongs to, how sure, and how probable it is under each class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from accel_gpt2.classify.bayes import (
    joint_log_probabilities,
    log_priors,
    posteriors,
    predict,
)
from accel_gpt2.classify.calibration import Calibration, calibrated_log_probabilities
from accel_gpt2.classify.run import CALIBRATION, Run, open_run
from accel_gpt2.data.tokenizer import EncodedDocument, TextTokenizer
from accel_gpt2.train.model import LanguageModel, load_final, load_final_tokenizer
from accel_gpt2.train.processes import build_accelerator
from accel_gpt2.train.scoring import score_documents


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The answer for one text; each mapping has the class names as keys.

    `label` is Bayes' rule on the summed log-likelihoods (nats). `probabilities` are calibrated on
    held-out training data, `raw_probabilities` are the posteriors before that, which are far too
    sure; the two may differ on a close call.
    """

    label: str
    probabilities: dict[str, float]
    raw_probabilities: dict[str, float]
    log_likelihoods: dict[str, float]
    num_tokens: int  # predicted tokens: the text's own and EOS
    truncated: bool


@dataclass(frozen=True, slots=True)
class _InMemory:
    encoded: list[EncodedDocument]

    @property
    def lengths(self) -> NDArray[Any]:
        return np.array([len(document.token_ids) for document in self.encoded], dtype=np.int64)

    def document(self, index: int) -> NDArray[Any]:
        return self.encoded[index].token_ids


class Classifier:
    """A trained run, ready to answer; each class's model is loaded once, when first needed."""

    def __init__(self, run: Run, tokenizer: TextTokenizer, calibration: Calibration) -> None:
        self.run = run
        self._tokenizer = tokenizer
        self._calibration = calibration
        self._log_prior = log_priors(run.class_counts, run.recipe.priors)
        self._models: dict[int, LanguageModel] = {}
        self._accelerator = build_accelerator(run.recipe)

    @property
    def class_names(self) -> tuple[str, ...]:
        """In label order."""
        return self.run.class_names

    def predict(self, texts: list[str]) -> list[Prediction]:
        """Classify texts; an empty list gives an empty list."""
        if not texts:
            return []
        documents = _InMemory(self._tokenizer.encode(texts, self.run.recipe.max_length))
        columns = [self._score(index, documents) for index in range(len(self.class_names))]
        log_likelihoods = np.stack(columns, axis=1)
        num_tokens = documents.lengths - 1
        labels = predict(log_likelihoods, self._log_prior)
        raw = posteriors(joint_log_probabilities(log_likelihoods, self._log_prior))
        calibrated = np.exp(
            calibrated_log_probabilities(
                self._calibration, log_likelihoods, self._log_prior, num_tokens
            )
        )
        return [
            Prediction(
                label=self.class_names[int(labels[row])],
                probabilities=self._by_class(calibrated[row]),
                raw_probabilities=self._by_class(raw[row]),
                log_likelihoods=self._by_class(log_likelihoods[row]),
                num_tokens=int(num_tokens[row]),
                truncated=document.truncated,
            )
            for row, document in enumerate(documents.encoded)
        ]

    def _by_class(self, values: NDArray[Any]) -> dict[str, float]:
        return {name: float(x) for name, x in zip(self.class_names, values, strict=True)}

    def _score(self, index: int, documents: _InMemory) -> NDArray[np.float64]:
        device = self._accelerator.device
        model = self._models.get(index)
        if model is None:
            model = self._models[index] = load_final(self.run.final(index), self.run.recipe)
        model.to(device)
        scores = score_documents(
            model,
            documents,
            micro_batch_tokens=self.run.recipe.micro_batch_tokens,
            accelerator=self._accelerator,
        )
        if device.type == "cuda":
            model.cpu()  # one class on the card at a time: all of them may not fit
        return scores


def load_classifier(run_directory: Path) -> Classifier:
    """A trained run for predicting.

    Raises:
        UserError: when it is no run directory, not trained to the end, or damaged.
    """
    run = open_run(run_directory)
    calibration = Calibration.read(run_directory / CALIBRATION, len(run.class_names))
    return Classifier(run, load_final_tokenizer(run.final(0)), calibration)
