"""The ceiling: the matrix products of a step and nothing else, each as one call of the library."""

import torch

from peers.turns import Turns
from peers.workload import Documents, Workload

_HEAD_ROWS = 512  # of logits at a time: more of them are slower


def train(work: Workload, documents: Documents, turns: Turns, variant: str) -> None:
    """Three products for each weight and step; `variant` is the number of words."""
    d, tokens = work.width, round(work.documents_per_step * documents.tokens_per_document)
    products = [(tokens, d, out) for out in (3 * d, d, 4 * d)] + [(tokens, 4 * d, d)]
    products *= work.num_layers
    heads = [min(_HEAD_ROWS, tokens - start) for start in range(0, tokens, _HEAD_ROWS)]
    products += [(rows, d, int(variant)) for rows in heads]
    inputs = {(rows, n): torch.randn(rows, n) for rows, *sizes in products for n in sizes}
    weights = {(n, m): torch.randn(m, n) for _, n, m in products}
    turns.begin(None, None)
    while True:
        for rows, n, m in products:
            x, error, weight = inputs[rows, n], inputs[rows, m], weights[n, m]
            torch.mm(x, weight.t())
            torch.mm(error, weight)
            torch.mm(error.t(), x)
        turns.count(tokens)
        turns.stepped()
