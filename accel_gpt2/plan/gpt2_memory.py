"""The memory of GPT-2's training step in closed form, phase by phase and term by term.

Coefficients say where they come from: counted from named tensors, or read off traces of the step
(`accel_gpt2.trace`). docs/decisions/009-memory.md tells how, and
docs/benchmarks/2026-11-30-memory-closed-form.md how far off it is.
"""

import math

from accel_gpt2.catalog.optimizers import OPTIMIZERS
from accel_gpt2.plan.activation_memory import (
    block_bytes,
    forward_copies,
    saved_activations,
    saved_per_token,
    weight_copies,
)
from accel_gpt2.plan.adapter_memory import adapter_transients, dora_evaluation_bytes
from accel_gpt2.plan.gpt2_step import Gpt2Step, fullest, term
from accel_gpt2.plan.loss_memory import head_gradient, loss_terms, outputs_kept
from accel_gpt2.plan.memory_types import MemoryPhase, MemoryTerm
from accel_gpt2.plan.state_memory import (
    all_gradients,
    exchanged,
    gathered,
    gradient_bytes,
    held_gradients,
    resident,
)


def phases(step: Gpt2Step) -> tuple[MemoryPhase, ...]:
    """Of a step, in its order; then evaluation and saving."""
    always = resident(step)
    found = {
        "forward": _forward(step),
        "loss backward": loss_terms(step),
        "block backward": _blocks(step),
        "embedding backward": _embedding(step),
        "optimizer step": _optimizer(step),
        "evaluation": _evaluation(step),
        "checkpoint saving": _saving(step),
    }
    return tuple(
        MemoryPhase(name=name, terms=tuple(x for x in (*always, *own) if x.bytes))
        for name, own in found.items()
        if own
    )


def _forward(step: Gpt2Step) -> list[MemoryTerm]:
    return [
        *held_gradients(step),
        *fullest(
            [
                *saved_activations(step, blocks),
                term(
                    "forward of a block",
                    _forward_transient(step, checkpointed=blocks <= step.checkpointed)
                    + step.length * step.model.n_embd * step.weight,
                    "what the last block has in hand, and the embeddings",
                ),
            ]
            for blocks in {step.model.n_layer, step.checkpointed} - {0}
        ),
        *forward_copies(step),
        *gathered(step, blocks=2),
        *outputs_kept(step),
    ]


def _forward_transient(step: Gpt2Step, *, checkpointed: bool) -> float:
    # Read off traces. Without checkpointing all but the sum of the residual is saved anyway.
    if not step.full:
        return adapter_transients(step, checkpointed=checkpointed)[0]
    if checkpointed:
        return {4: 48, 2: 30 if step.autocast else 24}[step.compute] * step.nd
    return 3 * step.stream * step.nd


def _blocks(step: Gpt2Step) -> list[MemoryTerm]:
    """Backward through the block at which most is held: the last or the first of its kind."""
    layers, checkpointed = step.model.n_layer, step.checkpointed
    fuller = fullest(
        [
            *_block_gradients(step, layers - blocks),
            *saved_activations(step, blocks),
            *(_recomputed(step) if blocks <= checkpointed else []),
            _backward_transient(step, checkpointed=blocks <= checkpointed),
        ]
        for blocks in sorted({layers, checkpointed + 1, checkpointed, 1}, reverse=True)
        if 1 <= blocks <= layers
    )
    return [
        *fuller,
        *gathered(step, blocks=2),
        *exchanged(step, blocks=1),
        *head_gradient(step),
        *outputs_kept(step),
    ]


def _block_gradients(step: Gpt2Step, blocks_done: int) -> list[MemoryTerm]:
    if step.accumulates:
        return held_gradients(step)
    if step.released:
        return []
    share = blocks_done / step.model.n_layer
    per_block = (
        step.block_matrices + 13 * step.model.n_embd
        if step.full
        else step.num_trained / step.model.n_layer
    )
    whole = gradient_bytes(step) / max(1, step.num_trained) * per_block * step.model.n_layer
    return [term("gradients", share * whole, f"of the {blocks_done} blocks that are done")]


def _recomputed(step: Gpt2Step) -> list[MemoryTerm]:
    # Read off traces: the recomputation stops before gelu_new's result is cast to 16 bits.
    uncast = 8 if step.autocast and not step.recipe.fused_gelu else 0
    return [
        term(
            "recomputed block",
            block_bytes(step) - uncast * step.nd + weight_copies(step),
            f"{saved_per_token(step) - uncast:g} bytes x {step.nd:,}, statistics, 16-bit weights",
        )
    ]


def _backward_transient(step: Gpt2Step, *, checkpointed: bool) -> MemoryTerm:
    e, drop = step.compute, step.dropout_bytes
    if not step.full:
        needed = adapter_transients(step, checkpointed=checkpointed)[1]
        return term("backward of a block", needed, f"{needed / step.nd:.3g} bytes x {step.nd:,}")
    copy = e if step.autocast or drop else 0  # autocast's, or dropout's
    if step.recipe.fused_gelu:
        # At the block's last product: the gradient that came, its copy, and that of GELU's
        # output; the block's own output is gone.
        per_token = copy + 4 * e - drop
    else:
        # Read off traces: within gelu_new, when that gradient has gone where it is added.
        per_token = {4: 32, 2: 48 if step.autocast else 16}[e] - drop
    weights = 4 * e  # the gradient of that product's matrix
    if not step.recipe.fused_gelu and step.accumulates:
        weights -= 4 * step.weight
    needed = per_token * step.nd + weights * step.model.n_embd**2
    if step.released:  # that gradient as wide as the weights, while they are stepped
        stepped = 4 * (_step_bytes(step) + (0 if step.accumulates else step.weight))
        needed = max(needed, copy * step.nd + stepped * step.model.n_embd**2)
    if checkpointed:
        # At the end of the recomputation: the gradient, the product, dropout's result, the sum.
        again = step.stream + e + step.stream + (e if drop else 0)
        needed = max(needed, again * step.nd)
    return term(
        "backward of a block",
        needed,
        f"{per_token} bytes x {step.nd:,} + {weights} bytes x {step.model.n_embd**2:,}",
    )


def _embedding(step: Gpt2Step) -> list[MemoryTerm]:
    if not step.full:
        if not step.recipe.gradient_checkpointing:
            return []  # no gradient comes so far
        return [
            *([] if step.released else [all_gradients(step, "all that the step makes")]),
            term(
                "gradient of the input",
                3 * step.stream * step.nd,
                f"{step.nd:,} x {step.stream} bytes, the embedding and its gradient beside it",
            ),
        ]
    sums = "the head's, and the embedding's to be added to it"
    if step.released:
        return _released_embedding(step, sums)
    return [
        all_gradients(step, "all that the step makes"),
        *gathered(step, blocks=0),
        *exchanged(step, blocks=0),
        *outputs_kept(step),
        term(
            "embedding gradient",
            (2 if step.accumulates else 1) * step.head * step.weight,
            f"{step.head:,} x {step.weight} bytes, {sums}",
        ),
        term("gradient of the input", step.stream * step.nd, f"{step.nd:,} x {step.stream}"),
    ]


def _released_embedding(step: Gpt2Step, sums: str) -> list[MemoryTerm]:
    stepped = step.weight + _step_bytes(step)
    width = 2 * step.weight
    largest = max(width * step.head + step.stream * step.nd, stepped * step.head)
    return [
        # Of a micro batch before the last one, after which they are kept.
        *held_gradients(step),
        *outputs_kept(step),
        term(
            "embedding gradient",
            largest,
            f"{step.head:,} x {width} bytes, {sums}; or {stepped:g} while it is stepped",
        ),
    ]


def _step_bytes(step: Gpt2Step) -> float:
    """An optimizer's temporaries over one tensor, per element."""
    spec = OPTIMIZERS[step.recipe.optimizer]
    if step.plain_pure:
        return spec.bf16_step_bytes_per_parameter
    return spec.step_bytes_per_parameter


def _optimizer(step: Gpt2Step) -> list[MemoryTerm]:
    if step.released:  # in the backward pass
        return []
    sizes = sorted((math.prod(shape) for shape, _ in step.trained_shapes), reverse=True)
    following = sizes[:2]
    if step.full:  # in the model's order
        embeddings = [step.head, step.model.n_positions * step.model.n_embd]
        feed_forward = 2 * [4 * step.model.n_embd**2]
        following = max(embeddings, feed_forward, key=sum)
    # One tensor's are let go when the next one's are there.
    temporaries = _step_bytes(step) * (sizes[0] if step.plain_pure else sum(following))
    flat_already = step.strategy.zero_stage == 2 and step.weight == 2  # summed in fp32
    if step.strategy.backend == "deepspeed" and not flat_already:
        # stage_1_and_2.py and stage3.py, step: the share's gradients in fp32.
        temporaries += 4 * step.num_trained / step.world_size
    return [
        all_gradients(step, "of the step"),
        *outputs_kept(step),
        term(
            "optimizer temporaries",
            0 if step.strategy.offloads_optimizer else temporaries,
            f"{step.recipe.optimizer} over the largest of {step.num_trained:,} parameters",
        ),
    ]


def _evaluation(step: Gpt2Step) -> list[MemoryTerm]:
    width = step.stream
    # Read off traces: the products' cache, and what a block has in hand.
    kind = (step.compute, step.autocast)
    per_token = {(4, False): 56, (2, True): 32, (2, False): 28}[kind]
    if not step.full:
        per_token = {(4, False): 72, (2, True): 53, (2, False): 36}[kind]
    cache = (
        (2 * step.block_matrices + 2 * 9 * step.model.n_embd) * step.model.n_layer
        if step.autocast and step.full
        else 0
    )
    in_fp32 = 4 * (step.head + step.nd) if width == 2 else 0
    scoring = in_fp32 + 4 * step.chunk_logits + width * step.nd
    # Hidden states times a constant, as two fp16 numbers of which one is there twice, and what is
    # between them in fp32; of the head no more than a part at a time.
    scoring += 14 * step.nd if step.scores_by_halves else 0
    in_blocks = float(per_token * step.nd)
    if step.recipe.use_dora:
        in_blocks = dora_evaluation_bytes(step)
    return [
        *_gathered_to_score(step),
        *outputs_kept(step),
        term("autocast's cache", cache, "16-bit copies that live until the forward pass ends"),
        term(
            "scoring",
            max(scoring, in_blocks),
            "fp32 logits of a chunk, head and hidden states, or what a block has in hand",
        ),
    ]


def _gathered_to_score(step: Gpt2Step) -> list[MemoryTerm]:
    if step.strategy.zero_stage < 3:
        return gathered(step, blocks=2)
    count = step.model.num_parameters
    return [
        term(
            "gathered weights",
            count * step.weight,
            f"{count:,} x {step.weight} bytes: while documents are scored, ZeRO-3's weights "
            "are whole on every process",
        )
    ]


def _saving(step: Gpt2Step) -> list[MemoryTerm]:
    copy = 0 if step.on_gpu else step.num_trained * step.weight
    return [
        *outputs_kept(step),
        term("copies of the weights", copy, "safetensors writes a file from its own copies"),
    ]
