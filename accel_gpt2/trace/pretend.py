"""A pretend accelerator: a device on which fake tensors behave as they do on a CUDA GPU.

Fake tensors of device type `cuda` end the process on a build of torch without CUDA as soon as
autograd records them. So this is torch's slot for backends that others bring, with CUDA's rules for
autocast and attention; the same on every build of torch, with a GPU in the machine or without.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

NAME = "pretend"

_HALF = (torch.float16, torch.bfloat16)


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of `torch.<device>`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return list(_HALF)

    def is_bf16_supported(self) -> bool:
        return True

    def get_rng_state(self, *_: object) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, *_: object) -> None: ...

    def synchronize(self, *_: object) -> None: ...

    def device(self, *_: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@functools.cache
def register() -> torch.device:
    """The device. It changes torch for the whole process, and must come before the first backward
    pass, which counts the devices there are."""
    backend_registration._setup_privateuseone_for_python_backend(
        rename=NAME, backend_module=_Module()
    )
    _register_copies()
    _register_autocast()
    torch.nn.functional.scaled_dot_product_attention = _attention
    return torch.device(NAME, 0)


_Library: Any = torch.library.Library

# Registrations end with the object that made them.
_libraries: list[Any] = []


def _register_copies() -> None:
    """What torch makes itself, without asking fake mode, such as the index of `x[[0, -1]]`."""
    aten = _Library("aten", "IMPL")
    _libraries.append(aten)
    aten.impl("empty_strided", _empty, "PrivateUse1")
    aten.impl("_copy_from", lambda source, target, non_blocking=False: target, "PrivateUse1")


def _empty(size: list[int], stride: list[int], *, dtype: torch.dtype, **_: object) -> Tensor:
    made: Tensor = torch._C._acc.create_empty_tensor(tuple(size), dtype)
    return made


# aten/src/ATen/autocast_mode.h: AT_FORALL_LOWER_PRECISION_FP, AT_FORALL_FP32 and
# AT_FORALL_FP32_SET_OPT_DTYPE, as far as transformers' language models use them.
_LOW_PRECISION = (
    "matmul", "mm", "mv", "addmm", "addmv", "addbmm", "bmm", "baddbmm", "linear", "einsum",
    "conv1d", "prelu",
)  # fmt: skip
_FP32 = (
    "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "pow.Tensor_Scalar",
    "pow.Tensor_Tensor", "pow.Scalar", "exp", "expm1", "log", "log1p", "log2", "log10", "rsqrt",
    "reciprocal", "softplus", "nll_loss", "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss",
    "logsumexp", "norm.Scalar", "cosine_similarity",
)  # fmt: skip
_FP32_BY_OPTION = (
    "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "cumprod", "prod",
)  # fmt: skip

# As at::autocast's: the 16-bit copy of each parameter, until the outermost autocast ends.
_copies: dict[int, tuple[Tensor, Tensor]] = {}


def _register_autocast() -> None:
    everything = _Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    aten = _Library("aten", "IMPL")
    _libraries.extend((everything, aten))
    for names, kernel in (
        (_LOW_PRECISION, _casting_to(lambda: torch.get_autocast_dtype(NAME))),
        (_FP32, _casting_to(lambda: torch.float32)),
        (_FP32_BY_OPTION, _with_fp32_option),
    ):
        for name in names:
            operator, _, overload = name.partition(".")
            function = getattr(getattr(torch.ops.aten, operator), overload or "default")
            aten.impl(name, functools.partial(kernel, function), "AutocastPrivateUse1")
    torch.clear_autocast_cache = _cleared_with(torch.clear_autocast_cache)


def _without_autocast() -> Any:
    keys: Any = torch._C.DispatchKey
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(keys.AutocastPrivateUse1))


def _casting_to(dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    def kernel(function: Any, *arguments: Any, **options: Any) -> Any:
        with _without_autocast():
            cast = functools.partial(_cast, dtype=dtype())
            return function(*map(cast, arguments), **{k: cast(v) for k, v in options.items()})

    return kernel


def _with_fp32_option(function: Any, *arguments: Any, **options: Any) -> Any:
    with _without_autocast():
        if any(_is_eligible(value) and value.dtype in _HALF for value in arguments):
            names = [argument.name for argument in function._schema.arguments]
            given = dict(zip(names, arguments, strict=False)) | options
            if given.get("dtype") is None:
                return function(**(given | {"dtype": torch.float32}))
        return function(*arguments, **options)


def _is_eligible(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == NAME
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """As at::autocast::cached_cast."""
    if isinstance(value, list | tuple):
        return type(value)(_cast(item, dtype) for item in value)
    if not _is_eligible(value) or value.dtype == dtype:
        return value
    is_parameter = value.requires_grad and value.is_leaf and not value._is_view()
    if dtype == torch.float32 or value.dtype != torch.float32 or not is_parameter:
        return value.to(dtype)
    if torch.is_autocast_cache_enabled():
        if id(value) not in _copies:
            _copies[id(value)] = value, value.to(dtype)
        return _copies[id(value)][1]
    return value.to(dtype)


def _cleared_with(clear: Callable[[], None]) -> Callable[[], None]:
    def clear_both() -> None:
        _copies.clear()
        clear()

    return clear_both


# FlashAttention's largest: pytorch, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
_FLASH_HEAD_SIZE = 256

_plain_attention = torch.nn.functional.scaled_dot_product_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that CUDA chooses: flash in 16 bits without a mask, else memory-efficient."""
    if query.device.type != NAME:
        return _plain_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled(NAME):
        dtype = torch.get_autocast_dtype(NAME)
        query, key, value, attn_mask = (_cast(x, dtype) for x in (query, key, value, attn_mask))
    if attn_mask is None and query.dtype in _HALF and query.shape[-1] <= _FLASH_HEAD_SIZE:
        attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return attended
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # at::convert_boolean_attn_mask
            bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
            attn_mask = bias.masked_fill(attn_mask.logical_not(), float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    keeps_sums = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    attended = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, keeps_sums, dropout_p, is_causal, scale=scale
    )[0]
    return attended
