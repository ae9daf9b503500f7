"""`predict`: which class a text belongs to, and how sure the classifier is."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accel_gpt2.cli.options import DebugOption, JsonOption, RunArgument
from accel_gpt2.cli.output import print_json, print_table, say, warn
from accel_gpt2.cli.run_directory import require_run
from accel_gpt2.errors import UsageError

if TYPE_CHECKING:
    from accel_gpt2.classify.predict import Prediction

_LONGEST_EXCERPT = 60


def predict(
    run_directory: RunArgument,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT", help="Texts to classify; - or nothing reads lines from stdin."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="A file with one text a line."),
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Classify texts, with calibrated probabilities."""
    require_run(run_directory)
    documents = read_texts(texts or [], file)
    from accel_gpt2.classify.predict import load_classifier

    predictions = load_classifier(run_directory).predict(documents)
    if json:
        print_json(
            {
                "predictions": [
                    _document(text, prediction)
                    for text, prediction in zip(documents, predictions, strict=True)
                ]
            }
        )
    else:
        show_predictions(documents, predictions)
    truncated = sum(prediction.truncated for prediction in predictions)
    if truncated:
        warn(f"{truncated} of {len(documents)} texts are longer than the model reads and were cut.")


def read_texts(texts: Sequence[str], file: Path | None) -> list[str]:
    """The texts to classify: typed, or the non-empty lines of a file or of stdin.

    Raises:
        UsageError: when there is no text, or texts and a file are both given.
    """
    if texts and file is not None:
        raise UsageError("Texts and --file are both given; give one of them.")
    if file is not None:
        if not os.path.isfile(file):  # a device has no end, and a pipe may wait for a writer
            there = "is not a file" if os.path.exists(file) else "does not exist"
            raise UsageError(f"{file} {there}; `... | accel-gpt2 predict RUN -` reads a pipe.")
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{file} is not UTF-8 text (byte {error.start}): convert it, for instance with "
                "`iconv`."
            ) from None
        source = str(file)
    elif texts and list(texts) != ["-"]:
        lines, source = list(texts), "the command line"
    else:
        if sys.stdin.isatty() and not texts:
            raise UsageError("Give a text, --file FILE, or - to read lines from stdin.")
        try:
            lines, source = sys.stdin.read().splitlines(), "stdin"
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin is not UTF-8 text (byte {error.start}).") from None
    for number, line in enumerate(lines, start=1):
        try:
            line.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"Text {number} of {source} is not UTF-8 text.") from None
    documents = [line for line in lines if line.strip()]
    if not documents:
        raise UsageError(f"There is no text in {source}: an empty text has no class.")
    if len(documents) < len(lines):
        say(f"{len(lines) - len(documents)} empty lines of {source} are left out.")
    return documents


def show_predictions(documents: Sequence[str], predictions: Sequence["Prediction"]) -> None:
    """One text: every class with its probability; several: the answer for each."""
    if len(documents) == 1:
        (prediction,) = predictions
        names = sorted(prediction.probabilities, key=lambda name: -prediction.probabilities[name])
        print_table(
            {
                "class": "left",
                "probability": "right",
                "log p(text|class), nats": "right",
                "answer": "left",
            },
            [
                [
                    name,
                    f"{prediction.probabilities[name]:.3f}",
                    _nats(prediction, name),
                    "<- Bayes' rule" if name == prediction.label else "",
                ]
                for name in names
            ],
        )
        if prediction.label != names[0]:
            say(
                f"A close call: Bayes' rule answers {prediction.label}; calibration, which also "
                f"corrects for length and class, leans to {names[0]}."
            )
        return
    print_table(
        {"class": "left", "probability": "right", "text": "left"},
        [
            [prediction.label, f"{prediction.probabilities[prediction.label]:.3f}", _excerpt(text)]
            for text, prediction in zip(documents, predictions, strict=True)
        ],
    )


def _nats(prediction: "Prediction", name: str) -> str:
    found = prediction.log_likelihoods
    return "" if found is None else f"{found[name]:.1f}"


def _excerpt(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_EXCERPT else line[: _LONGEST_EXCERPT - 1] + "…"


def _document(text: str, prediction: "Prediction") -> dict[str, object]:
    return {
        "text": text,
        "label": prediction.label,
        "probabilities": prediction.probabilities,
        "raw_probabilities": prediction.raw_probabilities,
        "log_likelihoods": prediction.log_likelihoods,
        "num_tokens": prediction.num_tokens,
        "truncated": prediction.truncated,
    }
