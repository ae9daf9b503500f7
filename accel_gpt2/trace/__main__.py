"""The process that traces: a JSON list of requests on stdin, one of what was found on stdout."""

import contextlib
import dataclasses
import json
import sys
from typing import Any

from accel_gpt2.errors import UserError
from accel_gpt2.recipe import TrainRecipe
from accel_gpt2.trace.memory import TraceRequest
from accel_gpt2.trace.tracing import trace


def _request(values: dict[str, Any]) -> TraceRequest:
    recipe: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in values["recipe"].items()
    }
    return TraceRequest(**(values | {"recipe": TrainRecipe(**recipe)}))


def _answer(request: TraceRequest) -> dict[str, object]:
    try:
        return dataclasses.asdict(trace(request))
    except UserError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever the many architectures do that a trace cannot follow
        reason = next(iter(str(error).strip().splitlines()), "").rstrip(".")[:300]
        return {
            "error": f"A training step of {request.recipe.model} cannot be traced "
            f"({type(error).__name__}: {reason}); take a short `accel-gpt2 bench` for its memory."
        }


def main() -> None:
    """Answer each request; what libraries print goes to stderr."""
    requests = [_request(values) for values in json.load(sys.stdin)]
    with contextlib.redirect_stdout(sys.stderr):
        answers = [_answer(request) for request in requests]
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
