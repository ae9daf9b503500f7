"""Ways to spread one training over GPUs: one row drives the memory arithmetic and the files that
a launcher reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Backend = Literal["none", "ddp", "fsdp2", "deepspeed"]
StrategyName = Literal[
    "single", "ddp", "fsdp2", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardingStrategy:
    """What each GPU holds a share of, and what lies in host memory instead.

    `title` says it in one line. `zero_stage` is DeepSpeed's, 0 elsewhere. `bucket_elements` are the
    gradients (and from stage 3 on the parameters) that are exchanged at once; 0 where the backend
    has no such buffer of ours to size.
    """

    name: StrategyName
    title: str
    backend: Backend
    zero_stage: int = 0
    shards_parameters: bool = False
    shards_gradients: bool = False
    shards_optimizer: bool = False
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    bucket_elements: int = 0
    source: str

    @property
    def is_sharded(self) -> bool:
        """Whether any state is held in shares."""
        return self.shards_optimizer or self.shards_gradients or self.shards_parameters

    @property
    def sums_bf16_in_fp32(self) -> bool:
        """Whether bf16 gradients of several micro batches are added up in fp32, as ZeRO does if
        told to; weights that are fp32 under autocast have such gradients anyway.

        In bf16, with 8 significant bits, a sum of like numbers stands still at 256 of them. Where
        stage 2 offloads the optimizer, DeepSpeed would keep the fp32 sums on the GPU, 4 bytes for
        each parameter of the share; its bf16 ones are in host memory, and stay that.

        >>> STRATEGIES["zero2"].sums_bf16_in_fp32, STRATEGIES["zero2_offload"].sums_bf16_in_fp32
        (True, False)
        """
        return self.backend == "deepspeed" and not (self.offloads_optimizer and self.zero_stage < 3)

    @property
    def smallest_world_size(self) -> int:
        """The number of processes from which on it does something; host memory helps one alone.

        >>> STRATEGIES["zero2"].smallest_world_size, STRATEGIES["zero2_offload"].smallest_world_size
        (2, 1)
        """
        return 1 if self.backend == "none" or self.offloads_optimizer else 2


# DeepSpeed's default of 5e8 elements is 954 MiB in bf16, more than a small model; 1e7 saved 1.9 GB
# in microsoft/DeepSpeed #1302.
_BUCKET_ELEMENTS = 10_000_000

_ZERO = "Rajbhandari et al. 2020, section 5; deepspeed/runtime/zero"
_OFFLOAD = "Ren et al. 2021 (ZeRO-Offload); deepspeed/runtime/zero"

_ROWS = (
    ShardingStrategy(
        name="single",
        title="The whole model in one process.",
        backend="none",
        source="one process, one device",
    ),
    ShardingStrategy(
        name="ddp",
        title="The whole model on each GPU; gradients are averaged.",
        backend="ddp",
        source="torch.nn.parallel.DistributedDataParallel, buckets of 25 MiB",
    ),
    ShardingStrategy(
        name="fsdp2",
        title="Weights, gradients and optimizer state in shares, by torch.",
        backend="fsdp2",
        shards_parameters=True,
        shards_gradients=True,
        shards_optimizer=True,
        source="torch.distributed.fsdp.fully_shard on every block, resharded after forward",
    ),
    ShardingStrategy(
        name="zero1",
        title="Optimizer state in shares.",
        backend="deepspeed",
        zero_stage=1,
        shards_optimizer=True,
        bucket_elements=_BUCKET_ELEMENTS,
        source=_ZERO,
    ),
    ShardingStrategy(
        name="zero2",
        title="Gradients and optimizer state in shares.",
        backend="deepspeed",
        zero_stage=2,
        shards_gradients=True,
        shards_optimizer=True,
        bucket_elements=_BUCKET_ELEMENTS,
        source=_ZERO,
    ),
    ShardingStrategy(
        name="zero3",
        title="Weights, gradients and optimizer state in shares, by DeepSpeed.",
        backend="deepspeed",
        zero_stage=3,
        shards_parameters=True,
        shards_gradients=True,
        shards_optimizer=True,
        bucket_elements=_BUCKET_ELEMENTS,
        source=_ZERO,
    ),
    ShardingStrategy(
        name="zero2_offload",
        title="Optimizer state in host memory; gradients and it in shares.",
        backend="deepspeed",
        zero_stage=2,
        shards_gradients=True,
        shards_optimizer=True,
        offloads_optimizer=True,
        bucket_elements=_BUCKET_ELEMENTS,
        source=_OFFLOAD,
    ),
    ShardingStrategy(
        name="zero3_offload",
        title="Weights and optimizer state in host memory; all in shares.",
        backend="deepspeed",
        zero_stage=3,
        shards_parameters=True,
        shards_gradients=True,
        shards_optimizer=True,
        offloads_optimizer=True,
        offloads_parameters=True,
        bucket_elements=_BUCKET_ELEMENTS,
        source=_OFFLOAD,
    ),
)

STRATEGIES: Mapping[str, ShardingStrategy] = MappingProxyType({row.name: row for row in _ROWS})
