"""What a block with adapters has in hand beyond what is saved of it, as read off traces of the step
(`accel_gpt2.trace`)."""

from accel_gpt2.plan.gpt2_step import Gpt2Step

# In bytes an element of the hidden state: forward, backward. Traced with all four projections
# adapted: peft's copies in the adapter's own type, the product of the second matrix, its multiple,
# the sum. By compute width, autocast, checkpointing, and dropout before the adapter.
_ADAPTER_TRANSIENTS = {
    (4, False, False, False): (20, 32),
    (4, False, False, True): (36, 20),
    (4, False, True, False): (60, 32),
    (4, False, True, True): (60, 36),
    (2, False, False, False): (10, 16),
    (2, False, False, True): (18, 10),
    (2, False, True, False): (30, 16),
    (2, False, True, True): (30, 18),
    (2, True, False, False): (36, 18),
    (2, True, False, True): (48, 26),
    (2, True, True, False): (44, 36),
    (2, True, True, True): (60, 48),
}

# The same on a base in NF4, and taken for one in int8 too: forward, backward; and while a matrix is
# dequantised, which is more where a micro batch is small, besides the 4 d^2 weights of it: forward,
# backward. In the traces a module that allocates what bitsandbytes' Linear4bit does stood for it.
_NF4_TRANSIENTS = {
    (4, False, False, False): (36, 32, 8, 16),
    (4, False, False, True): (40, 20, 8, 16),
    (4, False, True, False): (76, 36, 32, 16),
    (4, False, True, True): (76, 36, 32, 16),
    (2, False, False, False): (18, 16, 4, 8),
    (2, False, False, True): (20, 10, 4, 8),
    (2, False, True, False): (38, 18, 16, 8),
    (2, False, True, True): (38, 18, 16, 8),
    (2, True, False, False): (24, 16, 8, 10),
    (2, True, False, True): (22, 10, 8, 10),
    (2, True, True, False): (44, 28, 23, 12),
    (2, True, True, True): (44, 24, 23, 12),
}

# With DoRA, by compute width, autocast and checkpointing: forward, backward; and in an evaluation,
# by the first two. Each is the larger of two sums, in bytes an element of the hidden state and of
# d^2: where a norm is taken there is the adapter's matrix as large as the weights', made from one
# as large as the identity. With all four projections adapted.
_DoraBytes = tuple[tuple[float, float], tuple[float, float]]
_DORA_TRANSIENTS: dict[tuple[int, bool, bool], tuple[_DoraBytes, _DoraBytes]] = {
    (4, False, False): (((0, 112.6), (24.5, 57)), ((20, 1), (20, 1))),
    (4, False, True): (((32.6, 80), (108, 16)), ((4, 112.4), (32, 20))),
    (2, False, False): (((0, 56.4), (12.3, 28.4)), ((10, 0.5), (10, 0.5))),
    (2, False, True): (((16.3, 40), (54, 8)), ((2, 56.2), (16, 10))),
    (2, True, False): (((18, 104.5), (44, 49)), ((50, -7.5), (50, -7.5))),
    (2, True, True): (((36, 96), (90, 16)), ((28, 104.3), (46.7, 44.5))),
}
_DORA_EVALUATION: dict[tuple[int, bool], _DoraBytes] = {
    (4, False): ((44, 80), (116, 18.5)),
    (2, False): ((22, 40), (58, 9.3)),
    (2, True): ((44, 100), (98, 21)),
}


def adapter_transients(step: Gpt2Step, *, checkpointed: bool) -> tuple[float, float]:
    """In the forward and the backward pass of a block, in bytes."""
    recipe, drop = step.recipe, step.dropout_bytes
    key = step.compute, step.autocast, checkpointed, recipe.lora_dropout > 0
    # Under checkpointing and autocast the peak is where a mask is made, otherwise where it has
    # been used, or before.
    forward_drop = 0 if checkpointed else -drop
    backward_drop = drop if checkpointed and step.autocast else -drop
    if recipe.use_dora:
        transients = _DORA_TRANSIENTS[step.compute, step.autocast, checkpointed]
        dequantised = 4 * step.model.n_embd**2 * step.compute
        matrix = dequantised if recipe.finetuning == "qlora" else 0
        return (
            _dora_bytes(step, transients[0]) + forward_drop * step.nd + matrix,
            _dora_bytes(step, transients[1]) + backward_drop * step.nd + matrix,
        )
    if recipe.finetuning == "lora":
        forward, backward = _ADAPTER_TRANSIENTS[key]
        return (forward + forward_drop) * step.nd, (backward + backward_drop) * step.nd
    forward, backward, forward_with_matrix, backward_with_matrix = _NF4_TRANSIENTS[key]
    matrix = 4 * step.model.n_embd**2 * step.compute
    return (
        max((forward + forward_drop) * step.nd, forward_with_matrix * step.nd + matrix),
        max((backward - drop) * step.nd, backward_with_matrix * step.nd + matrix),
    )


def _dora_bytes(step: Gpt2Step, alternatives: _DoraBytes) -> float:
    return max(each * step.nd + more * step.model.n_embd**2 for each, more in alternatives)


def dora_evaluation_bytes(step: Gpt2Step) -> float:
    """In a block with DoRA, while documents are scored."""
    return _dora_bytes(step, _DORA_EVALUATION[step.compute, step.autocast])
