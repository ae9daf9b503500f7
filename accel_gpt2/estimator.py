"""The generative classifier as a scikit-learn estimator: texts and labels in, probabilities out.

Importing it loads no torch; fitting does.
"""

import functools
import math
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
from numpy.random import RandomState
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import (
    assert_all_finite,
    check_consistent_length,
    check_random_state,
    column_or_1d,
)
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from accel_gpt2.errors import UserError
from accel_gpt2.recipe import Layer, ResolvedRecipe, TrainRecipe
from accel_gpt2.recipe.resolving import resolve

if TYPE_CHECKING:
    from accel_gpt2.classify.predict import Classifier

FloatArray = npt.NDArray[np.float64]

# Parameters that are no recipe values.
_OWN_PARAMETERS = frozenset({"recipe", "random_state", "output_dir", "verbose"})

# What predicting reads of a run directory; checkpoints and logs stay behind.
_TRAINED_FILES = ("recipe.yaml", "plan.json", "calibration.json", "class-*/final/**/*")


def _has_likelihoods(estimator: "GenerativeClassifier") -> bool:
    return estimator.objective != "classification"


class GenerativeClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """One language model per class and Bayes' rule on top, for texts.

    With another `objective` it is what that one trains; with "classification", a discriminative
    classifier on the same model, to compare with.

    It trains as `accel-gpt2 train` does, by the same loop and with the same treatment of documents:
    empty ones, repeated ones and those that stand there with different labels are not trained on,
    with a warning. A tenth of the documents, at least one of each class, is held out to choose the
    best checkpoint and to calibrate; no test split is cut.

    Parameters
    ----------
    model : str
        A size of the catalog, a directory, or a hub id. The default learns from random weights.
    init, finetuning, objective, discriminative_weight, tokenizer, tokenizer_vocab_size, dropout, \
max_length, priors, validation_fraction, lora_rank, lora_alpha, epochs, max_steps, \
global_batch_tokens, global_batch_size, optimizer, learning_rate, lr_schedule, warmup_fraction, \
weight_decay, mixed_precision
        Values of the recipe; None leaves what `accel-gpt2 train` takes for this model.
    recipe : mapping or None
        Any further values of the recipe by key, as `--set` takes them.
    random_state : int, RandomState or None
        The recipe's seed; None is seed 0, so that fitting twice gives the same classifier.
    output_dir : path or None
        The run directory: fitting the same documents again goes on with what is there, and
        `accel-gpt2 predict` opens it. None: a temporary one, gone with the estimator.
    verbose : bool
        Show the training's progress on stderr.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted.
    recipe_ : TrainRecipe
        Every value that the training used.

    Examples
    --------
    >>> from accel_gpt2 import GenerativeClassifier
    >>> GenerativeClassifier(epochs=2.0).set_params(max_length=64)
    GenerativeClassifier(epochs=2.0, max_length=64)
    """

    def __init__(
        self,
        model: str = "gpt2-tiny",
        *,
        init: str | None = None,
        finetuning: str | None = None,
        objective: str | None = None,
        discriminative_weight: float | None = None,
        tokenizer: str | None = None,
        tokenizer_vocab_size: int | None = None,
        dropout: float | None = None,
        max_length: int | None = None,
        priors: str | None = None,
        validation_fraction: float | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        epochs: float | None = None,
        max_steps: int | None = None,
        global_batch_tokens: int | None = None,
        global_batch_size: int | None = None,
        optimizer: str | None = None,
        learning_rate: float | None = None,
        lr_schedule: str | None = None,
        warmup_fraction: float | None = None,
        weight_decay: float | None = None,
        mixed_precision: str | None = None,
        recipe: Mapping[str, object] | None = None,
        random_state: int | RandomState | None = None,
        output_dir: str | Path | None = None,
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.init = init
        self.finetuning = finetuning
        self.objective = objective
        self.discriminative_weight = discriminative_weight
        self.tokenizer = tokenizer
        self.tokenizer_vocab_size = tokenizer_vocab_size
        self.dropout = dropout
        self.max_length = max_length
        self.priors = priors
        self.validation_fraction = validation_fraction
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.epochs = epochs
        self.max_steps = max_steps
        self.global_batch_tokens = global_batch_tokens
        self.global_batch_size = global_batch_size
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.lr_schedule = lr_schedule
        self.warmup_fraction = warmup_fraction
        self.weight_decay = weight_decay
        self.mixed_precision = mixed_precision
        self.recipe = recipe
        self.random_state = random_state
        self.output_dir = output_dir
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags

    def fit(self, X: Iterable[str], y: npt.ArrayLike) -> Self:
        """Train every class's model on its texts; classes need two different texts at least.

        Raises:
            TypeError, ValueError: when texts, labels or parameters cannot be used.
            UserError: when the machine stands in the way, such as weights that are not here.
        """
        texts = _as_texts(X)
        labels = _as_labels(y, texts)
        classes, label_indices = np.unique(labels, return_inverse=True)
        _require_documents(classes, label_indices)
        names = _class_names(classes)
        run = _TrainedRun(self.output_dir)
        documents = run.directory / "documents.parquet"
        with _as_value_error():
            resolved = self._resolve(documents, names)
        _write_documents(documents, texts, [names[index] for index in label_indices])

        from accel_gpt2.classify.fit import fit
        from accel_gpt2.data.sources import load_text_data

        with _as_value_error():  # what is wrong with the documents; `fit` reads them again, cached
            treatments = load_text_data(resolved.recipe).treatments
        for treatment in treatments:
            warnings.warn(f"{treatment.count:,}: {treatment.what}", stacklevel=2)
        fit(resolved, run.directory, silent=not self.verbose, handle_signals=False)
        self.classes_ = classes
        self.recipe_: TrainRecipe = resolved.recipe
        self._run = run
        return self

    def _resolve(self, documents: Path, names: tuple[str, ...]) -> ResolvedRecipe:
        chosen = {
            key: value.item() if isinstance(value, np.generic) else value
            for key, value in self.get_params(deep=False).items()
            if key not in _OWN_PARAMETERS and value is not None
        }
        seed = self.random_state
        if isinstance(seed, RandomState):
            seed = int(check_random_state(seed).randint(2**31 - 1))
        given: dict[str, object] = {
            "dataset": str(documents),
            "text_field": "text",
            "label_field": "label",
            "class_names": list(names),
            "test_split": "none",
            "seed": 0 if seed is None else int(seed),
        }
        further = dict(self.recipe or {})
        twice = sorted(further.keys() & (chosen.keys() | given.keys()))
        if twice:
            raise ValueError(
                f"recipe holds {', '.join(twice)}, which GenerativeClassifier sets by a parameter "
                "of its own; leave it out."
            )
        origin = type(self).__name__
        values = {"trackers": (), **further, **chosen, **given}
        resolved = resolve([Layer(origin=origin, values=values)])
        if resolved.recipe.objective == "unconditional":
            raise ValueError(
                "objective = 'unconditional' is one language model of all classes and tells none "
                "apart; take another objective."
            )
        return resolved

    def predict_proba(self, X: Iterable[str]) -> FloatArray:
        """Calibrated p(c|x) of shape [texts, classes], classes in the order of `classes_`."""
        predictions = self._predictions(X)
        return np.array([list(x.probabilities.values()) for x in predictions], dtype=np.float64)

    def predict_log_proba(self, X: Iterable[str]) -> FloatArray:
        """Logarithms of `predict_proba`, in nats."""
        with np.errstate(divide="ignore"):
            log_probabilities: FloatArray = np.log(self.predict_proba(X))
        return log_probabilities

    def predict(self, X: Iterable[str]) -> npt.NDArray[Any]:
        """The most probable label of each text by `predict_proba`.

        `accel-gpt2 predict` applies Bayes' rule before calibration: on close calls it may differ.
        """
        best = self.predict_proba(X).argmax(axis=1)
        predictions: npt.NDArray[Any] = self.classes_[best]
        return predictions

    @available_if(_has_likelihoods)  # type: ignore[untyped-decorator]
    def log_likelihoods(self, X: Iterable[str]) -> FloatArray:
        """log p(x|c) in nats, summed over a text's tokens and EOS, of shape [texts, classes]."""
        predictions = self._predictions(X)
        return np.array([list(x.log_likelihoods.values()) for x in predictions], dtype=np.float64)

    def _predictions(self, X: Iterable[str]) -> list[Any]:
        check_is_fitted(self)
        return self._run.classifier.predict(_as_texts(X))


class _TrainedRun:
    """A trained run directory; a pickle carries what predicting needs of it."""

    def __init__(self, directory: str | Path | None) -> None:
        """Without a directory, a temporary one that goes when nobody refers to this any more."""
        if directory is None:
            directory = tempfile.mkdtemp(prefix="accel-gpt2-")
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)
        self.directory = Path(directory).expanduser()

    @functools.cached_property
    def classifier(self) -> "Classifier":
        from accel_gpt2.classify.predict import load_classifier

        return load_classifier(self.directory)

    def __getstate__(self) -> dict[str, bytes]:
        files = {
            path.relative_to(self.directory).as_posix(): path.read_bytes()
            for pattern in _TRAINED_FILES
            for path in self.directory.glob(pattern)
            if path.is_file()
        }
        if not files:
            raise UserError(
                f"{self.directory} is gone, and with it the trained models; bring it back, or fit "
                "again."
            )
        return files

    def __setstate__(self, files: dict[str, bytes]) -> None:
        _TrainedRun.__init__(self, None)
        for name, content in files.items():
            path = self.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@contextmanager
def _as_value_error() -> Iterator[None]:
    """What scikit-learn's tools expect of arguments that cannot be used."""
    try:
        yield
    except UserError as error:
        raise ValueError(str(error)) from error


def _as_texts(X: Any) -> list[str]:
    """The documents as a list.

    >>> _as_texts("one text")
    Traceback (most recent call last):
    ValueError: X is a single text; give a list of texts, as in [text].
    """
    if isinstance(X, str):
        raise ValueError("X is a single text; give a list of texts, as in [text].")
    num_dimensions = getattr(X, "ndim", 1)
    if num_dimensions != 1:
        raise ValueError(
            f"X has {num_dimensions} dimensions and should have one, a text for each document; of "
            "a table give the column that holds the texts."
        )
    try:
        documents = list(X)
    except TypeError:
        raise TypeError(f"X is of type {type(X).__name__}; it should be a list of texts.") from None
    if not documents:
        raise ValueError("Found array with 0 sample(s), and at least 1 text is needed.")
    for index, document in enumerate(documents):
        if document is None or (isinstance(document, float) and math.isnan(document)):
            raise ValueError(f"X[{index}] is missing; give its text, or drop the document.")
        if not isinstance(document, str):
            raise TypeError(
                f"X[{index}] is {document!r:.60}, of type {type(document).__name__}; documents "
                "should be texts."
            )
        try:
            document.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"X[{index}] holds half of a surrogate pair, which is no character; remove it."
            ) from None
    return [str(document) for document in documents]  # numpy's strings among them


def _as_labels(y: npt.ArrayLike, texts: list[str]) -> npt.NDArray[Any]:
    if y is None:
        raise ValueError("GenerativeClassifier requires y to be passed, but the target y is None.")
    labels: npt.NDArray[Any] = column_or_1d(y, warn=True)
    assert_all_finite(labels, input_name="y")
    check_classification_targets(labels)
    check_consistent_length(texts, labels)
    return labels


def _require_documents(classes: npt.NDArray[Any], label_indices: npt.NDArray[np.int64]) -> None:
    if len(classes) < 2:
        raise ValueError(
            f"There is only one class, {classes[0]!s}; a classifier needs texts of at least two."
        )
    counts = np.bincount(label_indices)
    scarce = int(counts.argmin())
    if counts[scarce] < 2:
        raise ValueError(
            f"The class {classes[scarce]!s} has 1 text and needs at least 2, one of them for "
            "validation; add texts, or leave the class out."
        )


def _class_names(classes: npt.NDArray[Any]) -> tuple[str, ...]:
    """What the run calls the classes: the labels as text, numbered where they read alike.

    >>> _class_names(np.array([False, True])), _class_names(np.array(["", "a", "a "]))
    (('False', 'True'), ('0', '1 a', '2 a'))
    """
    names = tuple(" ".join(str(label).split()) for label in classes)
    if all(names) and len(set(names)) == len(names):
        return names
    return tuple(f"{index} {name}".strip() for index, name in enumerate(names))


def _write_documents(path: Path, texts: list[str], labels: list[str]) -> None:
    """The documents as the file that training reads; a run is of the documents that it has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": texts, "label": labels})
    if (path.parent / "recipe.yaml").is_file() and not (
        path.is_file() and pq.read_table(path).equals(table)
    ):
        raise ValueError(
            f"output_dir={str(path.parent)!r} holds a classifier of other documents; give another "
            "folder, or remove this one."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
