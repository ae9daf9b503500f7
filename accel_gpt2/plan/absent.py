"""When a term of the memory or of the time is there at all, for those who miss it."""

from collections.abc import Mapping
from types import MappingProxyType

_AUTOCAST = "under autocast: fp32 weights, products in bf16 or fp16, no shards"

# "It is there ...": what would have to be otherwise. Terms that every training has are not here.
WHEN_THERE: Mapping[str, str] = MappingProxyType(
    {
        # On the device.
        "adapters": "with LoRA and QLoRA",
        "master weights": "with DeepSpeed, which has its own fp32 weights, unless it offloads them",
        "optimizer state": "unless all of it is paged or in host memory",
        "DDP buckets": "with DDP, which exchanges a second copy of the gradients",
        "exchange buckets": "with DeepSpeed",
        "exchanged gradients": "with FSDP2 and ZeRO-3, while shares are made of them",
        "gathered weights": "with FSDP2 and ZeRO-3, whose processes hold shares of the weights",
        "offload buffer": "with ZeRO-1 and ZeRO-2 when the optimizer is in host memory",
        "gradients": "unless each goes as soon as its parameter is stepped (release_gradients)",
        "block inputs": "with gradient checkpointing",
        "recomputed block": "with gradient checkpointing",
        "last block's output": "when all blocks are checkpointed",
        "saved activations": "unless all blocks are checkpointed",
        "16-bit copies of weights": f"{_AUTOCAST}; of blocks that are not checkpointed",
        "autocast's cache": _AUTOCAST,
        "16-bit copy of the head": _AUTOCAST,
        "fp32 head gradient": "in full fine-tuning, where the head is trained",
        "head gradient": "in full fine-tuning, where the head is trained",
        "embedding gradient": "in full fine-tuning, where the embedding is trained",
        "gradient of the input": "where a gradient goes down to the embedding",
        "optimizer temporaries": "with optimizers that are not fused into one kernel",
        "logits of a chunk": "with our loss, where its forward pass holds more than its end",
        "hidden states and their gradient": "with our loss",
        "outputs kept": "with transformers' own loss",
        "logits": "with transformers' own loss; ours has those of a chunk",
        "hidden states": "with transformers' own loss",
        "copies of the weights": "without a GPU, where a file is written from a copy",
        "cuBLAS workspaces": "on a GPU",
        # In RAM.
        "training": "without a GPU, where RAM is the device",
        "weights on their way": "on a GPU",
        "paged optimizer state": "with a paged optimizer on a GPU",
        "gathered checkpoint": "with FSDP2 and ZeRO, whose shares one process puts together",
        "offloaded optimizer": "with strategies that offload (*_offload)",
        "offloaded parameters": "with zero3_offload",
        # In time.
        "recomputation": "with gradient checkpointing",
        "exchange": "with several GPUs at one model, where the backward pass does not hide it",
        "test scoring": "where test documents are scored",
    }
)
