"""TF32 is a training's, and torch's two names for it agree."""

import pytest
import torch

from accel_gpt2.recipe import MixedPrecision, TrainRecipe
from accel_gpt2.train.tf32 import products_in_tf32


@pytest.mark.parametrize(
    ("tf32", "mixed_precision", "expected"),
    [(True, "no", "tf32"), (False, "no", "ieee"), (True, "bf16", "ieee")],
)
def test_only_within_a_training_that_asks_for_it(
    tf32: bool, mixed_precision: MixedPrecision, expected: str
) -> None:
    """On inside, off outside, and the compiler can ask by either name."""
    recipe = TrainRecipe(tf32=tf32, mixed_precision=mixed_precision)
    with products_in_tf32(recipe):
        assert torch.backends.cuda.matmul.fp32_precision == expected
        assert (torch.get_float32_matmul_precision() == "high") == (expected == "tf32")
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == "highest"
