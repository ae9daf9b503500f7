"""Documents to score, as lists of tokens in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Documents:
    """BOS, tokens, EOS each."""

    token_ids: Sequence[NDArray[np.int64]]

    @property
    def lengths(self) -> NDArray[Any]:
        """In tokens, BOS and EOS included."""
        return np.array([len(ids) for ids in self.token_ids])

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of one."""
        return self.token_ids[index]
