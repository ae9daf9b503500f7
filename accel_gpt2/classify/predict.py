"""Which class a text belongs to, how sure, and how probable it is under each class."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from accel_gpt2.classify.bayes import (
    joint_log_probabilities,
    posteriors,
    predict,
)
from accel_gpt2.classify.calibration import Calibration, calibrated_log_probabilities
from accel_gpt2.classify.run import CALIBRATION, Run, open_run
from accel_gpt2.classify.scores import InMemoryDocuments, Scorers
from accel_gpt2.data.tokenizer import TextTokenizer
from accel_gpt2.train.model import load_final_tokenizer
from accel_gpt2.train.objective import TransformersModel
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
    log_likelihoods: dict[str, float] | None  # a classification head gives none
    num_tokens: int  # predicted tokens: the text's own and EOS
    truncated: bool


class Classifier:
    """A trained run, ready to answer; each class's model is loaded once, when first needed, and a
    base of adapters once for all."""

    def __init__(self, run: Run, tokenizer: TextTokenizer, calibration: Calibration) -> None:
        self.run = run
        self._tokenizer = tokenizer
        self._calibration = calibration
        self._scorers = Scorers(run)
        self._models: dict[int, TransformersModel] = {}
        self._accelerator = build_accelerator(run.recipe)
        self._stay_on_device = self._fit_together()

    @property
    def class_names(self) -> tuple[str, ...]:
        """In label order."""
        return self.run.class_names

    def predict(self, texts: list[str]) -> list[Prediction]:
        """Classify texts; an empty list gives an empty list."""
        if not texts:
            return []
        documents = InMemoryDocuments(self._tokenizer.encode(texts, self.run.recipe.max_length))
        columns = [self._score(index, documents) for index in range(len(self.run.finals))]
        scores = np.column_stack(columns)
        num_tokens = documents.lengths - 1
        discriminative = self.run.recipe.objective == "classification"
        labels = predict(scores, self.run.log_prior)
        raw = posteriors(joint_log_probabilities(scores, self.run.log_prior))
        calibrated = np.exp(
            calibrated_log_probabilities(self._calibration, scores, self.run.log_prior, num_tokens)
        )
        return [
            Prediction(
                label=self.class_names[int(labels[row])],
                probabilities=self._by_class(calibrated[row]),
                raw_probabilities=self._by_class(raw[row]),
                log_likelihoods=None if discriminative else self._by_class(scores[row]),
                num_tokens=int(num_tokens[row]),
                truncated=document.truncated,
            )
            for row, document in enumerate(documents.encoded)
        ]

    def _by_class(self, values: NDArray[Any]) -> dict[str, float]:
        return {name: float(x) for name, x in zip(self.class_names, values, strict=True)}

    def _score(self, index: int, documents: InMemoryDocuments) -> NDArray[np.float64]:
        device = self._accelerator.device
        model = self._models.get(index)
        if model is None:
            model = self._models[index] = self._scorers.load(index)
        model.to(device)
        scores = score_documents(
            model,
            documents,
            micro_batch_tokens=self.run.recipe.micro_batch_tokens,
            accelerator=self._accelerator,
        )
        if not self._stay_on_device:
            model.cpu()
        return scores

    def _fit_together(self) -> bool:
        """Whether all classes' weights leave half of the card's free memory to what they compute;
        if not, one class is on the card at a time."""
        device = self._accelerator.device
        if device.type != "cuda" or self._scorers.share_base:
            return True
        free_bytes, _ = torch.cuda.mem_get_info(device)
        files = [file for final in self.run.finals for file in final.glob("*.safetensors")]
        return 2 * sum(file.stat().st_size for file in files) <= free_bytes


def load_classifier(run_directory: Path) -> Classifier:
    """A trained run for predicting.

    Raises:
        UserError: when it is no run directory, not trained to the end, or damaged.
    """
    run = open_run(run_directory)
    path = run_directory / CALIBRATION
    if run.recipe.objective == "masked_lm":
        # Training fits it on estimates; an evaluation has fitted one on what is computed here.
        evaluated = run_directory / "evaluation" / CALIBRATION
        path = evaluated if evaluated.is_file() else path
    calibration = Calibration.read(path, len(run.class_names))
    return Classifier(run, load_final_tokenizer(run.finals[0]), calibration)
