"""One side of a comparison, in a process of its own."""

import importlib
import os
from multiprocessing.connection import Connection
from pathlib import Path

from peers.turns import Turns
from peers.workload import prepare, read_documents, read_workload

CHECKED_DOCUMENTS = 8


def main(side: str, folder: Path, log: Path, connection: Connection) -> None:
    """Prepare the folder for all sides, or train as one of them when it is its turn.

    What libraries print goes to `log`.
    """
    import torch

    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    work = read_workload(folder)
    if side == "prepare":
        connection.send(prepare(work))
        return
    documents = read_documents(work)
    turns = Turns(documents.train[:CHECKED_DOCUMENTS], documents.held_out, connection)
    module, _, variant = side.partition(":")
    torch.manual_seed(work.seed)
    importlib.import_module(f"peers.{module}").train(work, documents, turns, variant)
    raise SystemExit(f"{side} came to an end by itself")
