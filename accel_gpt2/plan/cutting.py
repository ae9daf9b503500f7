"""How documents are cut into pieces that go through a device at once: what `data.batching` does,
and what a plan counts on."""

import bisect
import itertools
from collections.abc import Callable, Sequence


def cut_by_tokens(tokens: Sequence[int], budget: int) -> list[int]:
    """Where pieces begin and end, each as full as the budget allows and one document at least.

    >>> cut_by_tokens([3, 4, 9, 2], 7)
    [0, 2, 3, 4]
    """
    totals = list(itertools.accumulate(tokens, initial=0))
    cuts = [0]
    while cuts[-1] < len(tokens):
        start = cuts[-1]
        end = bisect.bisect_right(totals, totals[start] + budget, lo=start) - 1
        cuts.append(max(end, start + 1))
    return cuts


def cut_padded(tokens: Sequence[int], budget: int) -> list[int]:
    """The same for documents, the longest first, that are padded to the first of their piece.

    >>> cut_padded([9, 4, 3, 2], 8)
    [0, 1, 3, 4]
    """
    cuts = [0]
    while cuts[-1] < len(tokens):
        count = max(1, budget // max(1, tokens[cuts[-1]]))
        cuts.append(min(cuts[-1] + count, len(tokens)))
    return cuts


def cut_evenly(
    cut: Callable[[Sequence[int], int], list[int]],
    tokens: Sequence[int],
    budget: int,
    world_size: int,
) -> list[int]:
    """As few pieces as the budget allows, but for one for each rank, and those as small as they
    can be, to a sixty-fourth: a small last piece takes a GPU's host as long as a large one, and a
    rank with a small piece waits for the others.

    >>> cut_evenly(cut_by_tokens, [4, 3, 3, 2, 2, 2], 12, 1)
    [0, 2, 6]
    """
    cuts = cut(tokens, budget)
    num_pieces = -(-(len(cuts) - 1) // world_size) * world_size
    too_small, enough = sum(tokens) // max(1, num_pieces) - 1, budget
    while num_pieces > 1 and enough - too_small > max(1, enough // 64):
        tried = cut(tokens, (too_small + enough) // 2)
        if len(tried) - 1 <= num_pieces:
            cuts, enough = tried, (too_small + enough) // 2
        else:
            too_small = (too_small + enough) // 2
    return cuts
