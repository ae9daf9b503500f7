"""Stops a training between two optimizer steps, until it is its turn again.

Torch tells of every optimizer step, whoever calls for it; so a peer's own loop runs as it is.
"""

import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

# The summed loss of a batch of whole documents in nats, by a side's own collator and loss.
BatchLoss = Callable[[Sequence[NDArray[Any]]], float]


class Turns:
    """Answers the commands that come over a connection.

    `steps N` trains so many optimizer steps and answers with seconds and tokens; `losses` gives the
    loss of each of the first documents, and of all of them as one batch; `evaluate` the held-out
    loss in nats per token. The other end's end ends the process.

    Attributes:
        on_step: called after every optimizer step, before it is decided whether a turn ends.
    """

    def __init__(
        self,
        checked: Sequence[NDArray[Any]],
        held_out: Sequence[NDArray[Any]],
        connection: Connection,
    ) -> None:
        self.on_step: Callable[[], None] = lambda: None
        self._document_tokens = 0
        self._computed_tokens = 0
        self._checked = checked
        self._held_out = held_out
        self._connection = connection
        self._batch_loss: BatchLoss | None = None
        self._steps_left = 0
        self._steps = 0

    def begin(self, embedding: nn.Module | None, batch_loss: BatchLoss | None) -> None:
        """Wait for the first turn; called when everything is built, before the first step."""
        self._batch_loss = batch_loss
        if embedding is not None:
            embedding.register_forward_pre_hook(self._count_computed)
        register_optimizer_step_post_hook(self._after_step)
        self._connection.send({"ready": True})
        self._wait()

    def count(self, document_tokens: int) -> None:
        """So many tokens of documents are predicted now, padding not counted; only while it
        trains."""
        if torch.is_grad_enabled():
            self._document_tokens += document_tokens

    def stepped(self) -> None:
        """An optimizer step is done; the end of a turn waits here for the next one."""
        self.on_step()
        self._steps_left -= 1
        if self._steps_left > 0:
            return
        self._connection.send(
            {
                "steps": self._steps,
                "cpu_seconds": time.process_time() - self._cpu_started,
                "wall_seconds": time.perf_counter() - self._wall_started,
                "document_tokens": self._document_tokens - self._document_before,
                "computed_tokens": self._computed_tokens - self._computed_before,
            }
        )
        self._wait()

    def _after_step(self, *_: Any) -> None:
        self.stepped()

    # Positions that go through the model, padding included.
    def _count_computed(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._computed_tokens += inputs[0].numel()

    def _wait(self) -> None:
        while True:
            try:
                command, *arguments = self._connection.recv().split()
            except EOFError:
                os._exit(0)  # in the middle of a training that nobody wants to see finished
            match command:
                case "steps":
                    self._steps = self._steps_left = int(arguments[0])
                    self._document_before = self._document_tokens
                    self._computed_before = self._computed_tokens
                    self._wall_started = time.perf_counter()
                    self._cpu_started = time.process_time()
                    return
                case "losses":
                    self._connection.send(
                        {
                            "each": [self._loss([document]) for document in self._checked],
                            "batch": self._loss(self._checked),
                        }
                    )
                case "evaluate":
                    tokens = sum(len(document) - 1 for document in self._held_out)
                    total = sum(self._loss([document]) for document in self._held_out)
                    self._connection.send({"loss": total / tokens})

    def _loss(self, documents: Sequence[NDArray[Any]]) -> float:
        assert self._batch_loss is not None, "this side has no loss"
        with torch.no_grad():
            return self._batch_loss(documents)
