"""What the loss takes: ours, which makes its gradients chunk by chunk, and transformers' own."""

from accel_gpt2.plan.activation_memory import forward_copies, saved_activations
from accel_gpt2.plan.gpt2_step import Gpt2Step, fullest, term
from accel_gpt2.plan.memory_types import MemoryTerm
from accel_gpt2.plan.state_memory import gathered, held_gradients


def loss_terms(step: Gpt2Step) -> list[MemoryTerm]:
    """The loss at its fullest, forward or backward; ours makes its gradients in the former."""
    fuller = fullest(_stock_losses(step) if step.stock_loss else _losses(step))
    return [
        *held_gradients(step),
        *saved_activations(step, step.model.n_layer),
        *gathered(step, blocks=1),
        *outputs_kept(step),
        term(
            "last block's output",
            step.stream * step.nd if step.checkpointed == step.model.n_layer else 0,
            f"{step.stream} bytes x {step.nd:,}, the last LayerNorm's input",
        ),
        *fuller,
    ]


def _losses(step: Gpt2Step) -> list[list[MemoryTerm]]:
    # Autocast's copy of a chunk's rows, and their gradient, unless the peak is at the head's.
    width = 2 if step.autocast else 0
    width += 0 if step.full and step.compute == 2 else step.compute
    rows = width * min(step.recipe.loss_chunk_tokens, step.tokens) * step.model.n_embd
    return [
        [
            *forward_copies(step),
            *_chunk(step),
            term(
                "hidden states and their gradient",
                2 * step.stream * step.nd + 32 * step.tokens + rows,
                f"2 x {step.stream} bytes x {step.nd:,}, a chunk's rows, indices",
            ),
        ],
        [
            *head_gradient(step),
            term(
                "hidden states and their gradient",
                3 * step.stream * step.nd,
                f"3 x {step.stream} bytes x {step.nd:,}",
            ),
        ],
    ]


def _stock_losses(step: Gpt2Step) -> list[list[MemoryTerm]]:
    """transformers' loss forward (logits, a copy in fp32, log-softmax), and backward
    (log-softmax and two gradients)."""
    logits = step.tokens * step.model.vocab_size
    forward = 8 if step.compute == 4 else 10
    hidden = term(
        "hidden states",
        step.compute * step.nd,
        f"{step.compute} bytes x {step.nd:,}, the head's",
    )
    return [
        [
            hidden,
            *forward_copies(step),
            term("logits", forward * logits, f"{logits:,} x {forward} bytes"),
            *_head_copy(step),
        ],
        [hidden, term("logits", 12 * logits, f"{logits:,} x 12 bytes"), *_head_copy(step)],
    ]


def _chunk(step: Gpt2Step) -> list[MemoryTerm]:
    """A chunk's logits, and beside them where they are narrower the fp32 ones, or the product of
    their error with the hidden states."""
    beside = 0
    if step.compute == 2:
        beside = max(4 * step.chunk_logits, 2 * step.head if step.full else 0)
    return [
        term(
            "logits of a chunk",
            step.compute * step.chunk_logits + beside,
            f"{step.chunk_logits:,} logits x {step.compute} bytes, and {beside:,} for them in fp32 "
            "or for the product of their error with the hidden states",
        ),
        term(
            "fp32 head gradient",
            4 * step.head if step.full else 0,
            f"{step.head:,} x 4 bytes, a sum over the chunks",
        ),
        *_head_copy(step),
    ]


def _head_copy(step: Gpt2Step) -> list[MemoryTerm]:
    return [
        term(
            "16-bit copy of the head",
            2 * step.head if step.autocast else 0,
            f"{step.head:,} x 2 bytes",
        )
    ]


def head_gradient(step: Gpt2Step) -> list[MemoryTerm]:
    """The loss's part of the gradient of the tied weights."""
    return [
        term(
            "head gradient",
            step.head * step.weight if step.full else 0,
            f"{step.head:,} x {step.weight} bytes, held until the embedding's is added",
        )
    ]


def outputs_kept(step: Gpt2Step) -> list[MemoryTerm]:
    """The logits that transformers' `outputs` holds as long as somebody holds it."""
    if not step.stock_loss:
        return []
    width = 2 if step.pure else 4
    logits = step.tokens * step.model.vocab_size
    return [
        term("outputs kept", width * logits, f"{logits:,} logits x {width} bytes, in `outputs`")
    ]
