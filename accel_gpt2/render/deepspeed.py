"""DeepSpeed's configuration of a strategy: the committed JSON, and what a training hands over."""

import json
from typing import Any

from accel_gpt2.catalog.strategies import ShardingStrategy
from accel_gpt2.recipe import TrainRecipe, autocast_precision


def deepspeed_config(strategy: ShardingStrategy) -> dict[str, Any]:
    """A ZeRO strategy as DeepSpeed spells it; what a recipe decides is "auto" here.

    Micro batches and their accumulation are the training loop's, so the engine is told of one.
    Bucket sizes are those of the memory arithmetic (`plan.state_memory`).
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        # Offloaded too, the optimizer is torch's: as fast as DeepSpeed's own, and never compiled.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_optimization(strategy),
    }


def _zero_optimization(strategy: ShardingStrategy) -> dict[str, Any]:
    bucket = strategy.bucket_elements
    zero: dict[str, Any] = {
        "stage": strategy.zero_stage,
        "overlap_comm": True,  # one bucket is filled while the other is exchanged
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if strategy.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket,
            # With the defaults of 1e9, models under a billion parameters are never let go of:
            # prefetching stops at the first, and the second is how soon a weight is used again.
            "stage3_max_live_parameters": 3 * bucket,
            "stage3_max_reuse_distance": bucket,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    host = {"device": "cpu", "pin_memory": True}
    if strategy.offloads_optimizer:
        zero["offload_optimizer"] = host
    if strategy.offloads_parameters:
        zero["offload_param"] = dict(host)
    return zero


def resolved_deepspeed_config(strategy: ShardingStrategy, recipe: TrainRecipe) -> dict[str, Any]:
    """`deepspeed_config` with each "auto" replaced by what the recipe says.

    Accelerate would make other values of them: 1.0 of any clipping, for instance.

    >>> from accel_gpt2.catalog.strategies import STRATEGIES
    >>> config = resolved_deepspeed_config(STRATEGIES["zero2"], TrainRecipe(mixed_precision="bf16"))
    >>> config["bf16"], config["fp16"], config["gradient_clipping"]
    ({'enabled': True}, {'enabled': False}, 1.0)
    """
    precision = autocast_precision(recipe.mixed_precision)
    config = deepspeed_config(strategy) | {
        "gradient_clipping": recipe.max_grad_norm,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
    }
    # By this name stage 1 would get another class of optimizer; `train.deepspeed` asks its own.
    if precision == "bf16" and strategy.sums_bf16_in_fp32 and strategy.zero_stage > 1:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def deepspeed_json(strategy: ShardingStrategy) -> str:
    """The text of `ds_configs/<strategy>.json`."""
    return json.dumps(deepspeed_config(strategy), indent=2) + "\n"
