"""`predict`: which class a text belongs to, and how sure the classifier is."""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from accel_gpt2.cli.options import DebugOption, JsonOption, RunArgument
from accel_gpt2.cli.output import print_json, print_line, print_table, say, warn
from accel_gpt2.cli.run_directory import require_run
from accel_gpt2.cli.texts import text_pieces
from accel_gpt2.terminal import printable

if TYPE_CHECKING:
    from accel_gpt2.classify.predict import Prediction

_LONGEST_EXCERPT = 60


def predict(
    run_directory: RunArgument,
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...", help="Texts to classify; - or nothing reads lines from stdin."
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
    pieces = text_pieces(texts or [], file)
    first = next(pieces)  # what is no text is said before anything heavy is loaded
    from accel_gpt2.classify.predict import load_classifier

    classifier = load_classifier(run_directory)
    answers: list[dict[str, object]] = []
    num_texts = num_truncated = 0
    for piece, is_last in itertools.chain([first], pieces):
        predictions = classifier.predict(piece)
        if json:
            answers += map(_document, piece, predictions)
        elif is_last and num_texts + len(piece) == 1:
            show_prediction(predictions[0])
        else:
            show_answers(piece, predictions, heading=num_texts == 0)
        num_texts += len(piece)
        num_truncated += sum(prediction.truncated for prediction in predictions)
    if json:
        print_json({"predictions": answers})
    if num_truncated:
        warn(f"{num_truncated} of {num_texts} texts are longer than the model reads and were cut.")


def show_prediction(prediction: "Prediction") -> None:
    """Every class with its probability, the likeliest first."""
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


def show_answers(
    texts: Sequence[str], predictions: Sequence["Prediction"], *, heading: bool
) -> None:
    """The answer for each text, at once: lines of later texts stand below, in the same columns."""
    width = max(len(name) for name in (*predictions[0].probabilities, "class"))
    if heading:
        print_line(f"{'class':{width}}   probability   text")
        print_line("\u2500" * (width + 3 + 11 + 3 + _LONGEST_EXCERPT))
    for text, prediction in zip(texts, predictions, strict=True):
        label = prediction.label
        answer = f"{label:{width}}   {prediction.probabilities[label]:11.3f}   {_excerpt(text)}"
        print_line(printable(answer))
    sys.stdout.flush()


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
