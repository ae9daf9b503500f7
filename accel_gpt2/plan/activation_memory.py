"""What autograd keeps of the forward pass: activations, and the 16-bit weights that go with them.

Coefficients are counted from the tensors that autograd saves, which are named; where one was read
off traces of the step (`accel_gpt2.trace`), it says so.
"""

from accel_gpt2.plan.gpt2_step import PROJECTIONS, Gpt2Step, term
from accel_gpt2.plan.memory_types import MemoryTerm
from accel_gpt2.plan.packing import GROUP_PADDING


def saved_per_token(step: Gpt2Step) -> float:
    """Bytes an element of the hidden state that autograd keeps of one block.

    Input and middle of the residual stream; what the four projections take (LayerNorm's
    output, attention's output, LayerNorm's output, GELU's output) as long as a weight of theirs
    is trained; query, key and value; attention's output; what GELU takes; two dropout masks.
    """
    e = step.compute
    fed = {"attn.c_attn": 1, "mlp.c_fc": 1, "mlp.c_proj": 4}
    products = sum(size for path, size in fed.items() if step.full or path in step.adapted)
    saved: float = 2 * step.stream + e * (products + 3 + 1 + 4)
    if not step.recipe.fused_gelu:
        # gelu_new's own intermediate results, four times as wide: x and tanh and 1 + tanh in
        # fp32 under autocast, because pow is.
        saved += 4 * (4 + 4 + 4 if not step.pure else 2 + 2 + 2)
    saved += 2 * step.dropout_bytes
    if step.attends_in_groups:
        # Query, key, value and attention's output are padded; its output without it is kept too.
        saved += e * (4 * GROUP_PADDING + (step.full or "attn.c_proj" in step.adapted))
    if not step.full:
        saved += _adapter_inputs(step)
    return saved


def _adapter_inputs(step: Gpt2Step) -> float:
    """What adapters keep besides: attention's output as they take it, and dropout's masks."""
    extra = 0.0
    drops = step.recipe.lora_dropout > 0
    quantized = step.recipe.finetuning == "qlora"
    if "attn.c_proj" in step.adapted and (drops or (step.autocast and not quantized)):
        extra += step.compute
    if drops:
        extra += sum(PROJECTIONS[path][0] for path in step.adapted)
    if step.recipe.use_dora:
        # The base's product and the adapter's, which it scales; the former after an fp32 bias.
        width = step.compute + (4 if step.autocast else step.compute)
        extra += width * sum(PROJECTIONS[path][1] for path in step.adapted)
    return extra


def block_bytes(step: Gpt2Step) -> float:
    """What autograd keeps of one block, the 16-bit copies of its weights left out.

    Besides `saved_per_token`: mean and deviation of two LayerNorms, attention's log-sum-exp per
    head, and what goes from a LoRA matrix to the other.
    """
    per_token = 16 + 4 * step.model.n_head
    per_token += len(step.adapted) * step.recipe.lora_rank * step.compute
    return saved_per_token(step) * step.nd + per_token * step.tokens + _dropped_attention(step)


def _dropped_attention(step: Gpt2Step) -> float:
    # Without a fused kernel that drops, a CPU keeps probabilities, noise and their product;
    # autocast has them in fp32. Read off traces.
    if step.on_gpu or step.recipe.dropout == 0:
        return 0.0
    each = 13 if step.autocast else 3 * step.compute
    return each * step.model.n_head * step.length * step.tokens


def weight_copies(step: Gpt2Step) -> float:
    """16-bit copies of one block's weights, which its backward pass needs."""
    if not step.autocast:
        return 0.0
    adapters = step.num_adapter_parameters / step.model.n_layer
    # NF4 weights are dequantised anew for every product.
    matrices = 0 if step.recipe.finetuning == "qlora" else step.block_matrices
    return 2.0 * (matrices + adapters)


def embedding_bytes(step: Gpt2Step) -> float:
    """What the first block takes, and the dropout before it."""
    if not step.full and not step.recipe.gradient_checkpointing:
        return -_not_saved_below_the_first_adapter(step)
    embedded = float(step.stream + step.dropout_bytes) * step.nd
    if not step.full:
        embedded += step.stream * step.nd  # peft makes the embedding a leaf with a gradient
    return embedded


def _not_saved_below_the_first_adapter(step: Gpt2Step) -> float:
    # What the first block takes needs no gradient, so its first LayerNorm keeps nothing but
    # what the embedding would have kept, and dropout before the first adapter no mask.
    drops = step.recipe.lora_dropout > 0 and "attn.c_attn" in step.adapted
    return 1.0 * step.nd if drops else 0.0


def saved_activations(step: Gpt2Step, blocks: int) -> list[MemoryTerm]:
    """What is saved of the embedding and of the first so many blocks."""
    inputs = min(blocks, step.checkpointed)
    whole = blocks - inputs
    terms = []
    embedded = embedding_bytes(step)
    if inputs:
        # What the first block takes is in the embedding's. The first whole block's input is
        # besides what that keeps.
        between = inputs - 1 + (whole > 0)
        terms.append(
            term(
                "block inputs",
                embedded + between * step.stream * step.nd,
                f"{step.stream} bytes x {step.nd:,} for each of {inputs} blocks",
            )
        )
        embedded = 0
    if whole:
        terms.append(
            term(
                "saved activations",
                embedded + whole * block_bytes(step),
                f"({saved_per_token(step):g} bytes x {step.nd:,} + statistics) for each of "
                f"{whole} blocks",
            )
        )
        if step.autocast:
            terms.append(_copies(step, whole))
    return terms


def _copies(step: Gpt2Step, blocks: int) -> MemoryTerm:
    # The first block's frozen c_attn has nothing below it that needs a gradient.
    below = step.recipe.finetuning == "lora" and not step.checkpointed
    unneeded = 2 * 3 * step.model.n_embd**2 if below else 0
    return term(
        "16-bit copies of weights",
        blocks * weight_copies(step) - unneeded,
        f"autocast's, {weight_copies(step):,.0f} bytes for each of {blocks} blocks",
    )


def forward_copies(step: Gpt2Step) -> list[MemoryTerm]:
    """Autocast's copies that live until the forward pass ends, saved or not."""
    if not step.autocast:
        return []
    biases = 2 * 9 * step.model.n_embd if step.full else 0
    adapters = step.num_adapter_parameters / step.model.n_layer
    # Frozen weights are not remembered; what is saved is not counted twice.
    trained = 2 * (step.block_matrices if step.full else adapters)
    return [
        term(
            "autocast's cache",
            biases * step.model.n_layer + trained * step.checkpointed,
            "16-bit copies of trained weights, until the forward pass ends",
        )
    ]
