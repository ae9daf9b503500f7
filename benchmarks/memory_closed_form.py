"""How far the closed form of memory is off traces of the training step: a Markdown table.

    python benchmarks/memory_closed_form.py > docs/benchmarks/2026-11-30-memory-closed-form.md

A quarter of an hour on one core; what was traced before comes from the cache.
"""

import statistics
import sys
from pathlib import Path

# Not as `tests.agreement`: gpuhunt installs a `tests` of its own, which is found first.
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "agreement"))

from memory_grid import Comparison, compare, configurations, options, rows

from accel_gpt2.units import MIB
from accel_gpt2.versions import installed_versions

COUNT, N_LAYER = 64, 3


def main() -> None:
    """Write the page."""
    drawn, by_hand = configurations(COUNT, n_layer=N_LAYER), options(n_layer=N_LAYER)
    packed = rows(n_layer=N_LAYER)
    comparisons = compare([*drawn, *by_hand, *packed])
    errors = [comparison.relative_error for comparison in comparisons]
    versions = installed_versions()
    lines = [
        "# Memory: closed form against trace",
        "",
        f"{len(comparisons)} configurations: {COUNT}, the first by hand and the others drawn with "
        f"a fixed seed, {len(by_hand)} of options that save memory, and {len(packed)} of packed "
        f"rows, for whose padding plans leave an eighth and traces have none. All sizes at their "
        f"real width, {N_LAYER} blocks, one GPU. `plan.memory` is compared with a "
        "trace of our own step on fake tensors (`accel_gpt2.trace`): the largest sum of allocated "
        "tensors, each a multiple of 512 bytes.",
        "",
        f"Mean difference {statistics.mean(map(abs, errors)):.3%}, largest "
        f"{max(errors, key=abs):+.2%}; {sum(abs(error) < 1e-3 for error in errors)} are within "
        f"0.1%, and the closed form is {max(0.0, -min(errors)):.2%} too low at most. torch "
        f"{versions['torch']}, transformers {versions['transformers']}.",
        "",
        "| model | training | tokens | loss | traced MiB | peak at | closed form |",
        "|---|---|---|---|---|---|---|",
        *map(_row, comparisons),
        "",
    ]
    sys.stdout.write("\n".join(lines))


def _row(comparison: Comparison) -> str:
    recipe, request = comparison.recipe, comparison.request
    training = [recipe.mixed_precision, recipe.optimizer]
    if recipe.mixed_precision == "pure_bf16":
        training.append(recipe.bf16_rounding)
    if recipe.finetuning == "lora":
        training.append(f"LoRA r{recipe.lora_rank}")
        training += ["DoRA"] if recipe.use_dora else []
        if recipe.lora_dropout:
            training.append("LoRA dropout")
    if recipe.gradient_checkpointing:
        of = "" if recipe.checkpointed_layers is None else f" of {recipe.checkpointed_layers}"
        training.append(f"checkpointing{of}")
    if recipe.packing == "on":
        training.append("packed rows")
    if recipe.release_gradients:
        training.append("released gradients")
    if recipe.dropout:
        training.append("dropout")
    if not recipe.fused_gelu:
        training.append("gelu_new")
    if request.num_micro_batches > 1:
        training.append("accumulation")
    length = request.longest_tokens - 1
    loss = "stock" if request.stock_loss else f"chunks of {recipe.loss_chunk_tokens}"
    cells = [
        recipe.model,
        ", ".join(training),
        f"{recipe.micro_batch_tokens // length} x {length}",
        f"{loss}, V {request.vocab_size}",
        f"{comparison.traced.peak_bytes / MIB:,.0f}",
        comparison.traced.peak_phase,
        f"{comparison.relative_error:+.2%}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
