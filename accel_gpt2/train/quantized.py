"""A frozen base in 4 or 8 bits under LoRA adapters: QLoRA (Dettmers et al. 2023), by bitsandbytes.

What is quantised and what it costs is in docs/decisions/010-qlora.md.
"""

from typing import Any

import torch
from torch import nn

from accel_gpt2.recipe import MixedPrecision, TrainRecipe
from accel_gpt2.train.preflight import check_bitsandbytes

# What quantised weights are multiplied in: what the recipe has the other matrix products in.
_COMPUTE_DTYPES: dict[MixedPrecision, torch.dtype] = {
    "no": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "pure_bf16": torch.bfloat16,
}


def quantization_config(shell: Any, recipe: TrainRecipe) -> Any:
    """What `from_pretrained` is given to quantise a model's linear layers while it reads them.

    It puts the model on this process's GPU where there is one: quantising GPT-2 XL takes minutes on
    a CPU. Embeddings and heads stay as they are: they are tied, or new and trained whole.

    Args:
        shell: the PreTrainedModel, without weights.

    Raises:
        UserError: when bitsandbytes is not installed.
    """
    check_bitsandbytes(recipe)
    from transformers import BitsAndBytesConfig

    kept = [name for name, _ in shell.named_children() if name != shell.base_model_prefix]
    if recipe.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_COMPUTE_DTYPES[recipe.mixed_precision],
        llm_int8_skip_modules=kept,
    )


def settle(model: nn.Module, recipe: TrainRecipe) -> None:
    """Have a model read with `quantization_config` compute alike in training and in scoring."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from accel_gpt2.train.int8 import Int8Linear

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.__class__ = Int8Linear
            module.settle(_COMPUTE_DTYPES[recipe.mixed_precision])
        if isinstance(module, Linear4bit):
            # On a CPU with AVX512-BF16 the first scoring would repack the weights for a kernel of
            # another rounding and without a gradient, and training would go on with that.
            module.support_avx512bf16_for_cpu = False
            # The backward pass would make fp32 weights and round those to the compute dtype, which
            # the forward pass has at once: 4 bytes more a weight of the layer, and their traffic.
            module.weight.quant_state.dtype = _COMPUTE_DTYPES[recipe.mixed_precision]
            # It computes in that dtype and answers in its input's, which behind a LayerNorm under
            # autocast is fp32: GELU would keep twice what it keeps over a plain linear layer.
            module.register_forward_pre_hook(_in_compute_dtype)


def _in_compute_dtype(layer: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    return inputs[0].to(layer.compute_dtype)


def num_weights(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for; a byte of a 4-bit one holds two."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def restore_quantized(model: nn.Module, quantized: nn.Module) -> None:
    """Give a model the weights that its quantised copy computes with, in fp32."""
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.pytorch_utils import Conv1D

    layers = dict(model.named_modules())
    for name, layer in quantized.named_modules():
        if isinstance(layer, Linear4bit):
            weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        elif isinstance(layer, Linear8bitLt):
            weight = layer.weight.data * layer.scale[:, None]
        else:
            continue
        into = layers[name]
        assert isinstance(into.weight, nn.Parameter)
        into.weight.data.copy_(weight.T if isinstance(into, Conv1D) else weight)
