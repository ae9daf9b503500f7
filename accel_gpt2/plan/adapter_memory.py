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

# With DoRA, each the largest of some sums, in bytes an element of the hidden state and of d^2:
# where a norm is taken there is the adapter's matrix as large as the weights', made from one as
# large as the identity. With all four projections adapted. By compute width and autocast, and the
# forward pass by checkpointing, what is recomputed by dropout: its fullest moment is another then.
_DoraBytes = tuple[tuple[float, float], ...]
_DORA_FORWARD: dict[tuple[int, bool, bool], _DoraBytes] = {
    (4, False, False): ((0, 112.6), (24.5, 57)),
    (4, False, True): ((32.6, 80), (108, 16)),
    (2, False, False): ((0, 56.4), (12.3, 28.4)),
    (2, False, True): ((16.3, 40), (54, 8)),
    (2, True, False): ((18, 104.5), (44, 49)),
    (2, True, True): ((36, 96), (90, 16)),
}
_DORA_BACKWARD: dict[tuple[int, bool], _DoraBytes] = {
    (4, False): ((20, 1),),
    (2, False): ((10, 0.5),),
    (2, True): ((50, -7.5),),
}
_DORA_RECOMPUTED: dict[tuple[int, bool, bool], _DoraBytes] = {
    (4, False, False): ((4, 112.4), (16, 80.3), (32, 20)),
    (4, False, True): ((-1, 112.4), (19, 80.3), (27, 20)),
    (2, False, False): ((2, 56.2), (8, 40.2), (16, 10)),
    (2, False, True): ((-1, 56.2), (9, 40.2), (13, 10)),
    (2, True, False): ((28, 104.3), (46, 48.2)),
    (2, True, True): ((19, 104.3), (45, 48.2)),
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
        kind = step.compute, step.autocast
        dequantised = 4 * step.model.n_embd**2 * step.compute
        matrix = dequantised if recipe.finetuning == "qlora" else 0
        forward = _dora_bytes(step, _DORA_FORWARD[*kind, checkpointed]) + forward_drop * step.nd
        if checkpointed:
            backward = _dora_bytes(step, _DORA_RECOMPUTED[*kind, recipe.dropout > 0])
        else:
            backward = _dora_bytes(step, _DORA_BACKWARD[kind]) - drop * step.nd
        return forward + matrix, backward + matrix
    if recipe.finetuning == "lora":
        forward, backward = _ADAPTER_TRANSIENTS[key]
        return (forward + forward_drop) * step.nd, (backward + backward_drop) * step.nd
    forward, backward, forward_with_matrix, backward_with_matrix = _NF4_TRANSIENTS[key]
    matrix = 4 * step.model.n_embd**2 * step.compute
    return (
        max((forward + forward_drop) * step.nd, forward_with_matrix * step.nd + matrix),
        max((backward - drop) * step.nd, backward_with_matrix * step.nd + matrix),
    )


def _dora_bytes(step: Gpt2Step, sums: _DoraBytes) -> float:
    return max(each * step.nd + more * step.model.n_embd**2 for each, more in sums)


def dora_evaluation_bytes(step: Gpt2Step) -> float:
    """In a block with DoRA, while documents are scored."""
    return _dora_bytes(step, _DORA_EVALUATION[step.compute, step.autocast])
