"""Counts what a device holds while operations run on fake tensors."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


def _flash_backward_bytes(_: Tensor, query: Tensor, *__: object) -> int:
    """flash_attn/flash_api.cpp, mha_bwd: dq_accum and softmax_d in fp32, padded."""
    documents, heads, tokens, head_size = query.shape
    padded_tokens, padded_size = -(-tokens // 128) * 128, -(-head_size // 32) * 32
    return documents * heads * padded_tokens * (padded_size + 1) * 4


_WORKSPACES: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_backward.default: _flash_backward_bytes,
}
_COPYING = {_aten.lift_fresh.default, _aten._to_copy.default, _aten.all.default}
_COMPARING = {_aten.allclose.default, _aten.equal.default}


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of all storages on one type of device, and their peak within each phase.

    A storage counts from the operation that returns it until nothing refers to it any more, which
    is when torch's allocators take it back. What an operation allocates and frees within itself
    does not pass by here: `_WORKSPACES` has what is large.

    Fake tensors have no contents. Where Python branches on a number it is told 1, which is true,
    and a mask marks everything, unless it was made from a real one.

    Args:
        device_type: the device that is counted.
        rounding_bytes: every storage is rounded up to a multiple of it.
    """

    def __init__(self, device_type: str, rounding_bytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current_bytes = 0
        self.peaks: dict[Any, int] = {}
        self._device_type = device_type
        self._rounding_bytes = rounding_bytes
        self._phase: Any = None
        self._tokens: Any = WeakIdKeyDictionary()  # one for each storage seen
        self._new_token = itertools.count().__next__
        self._alive: dict[int, int] = {}  # token -> bytes
        self._masks: Any = WeakIdKeyDictionary()  # storage -> contents

    def enter_phase(self, phase: Any) -> None:
        """What follows belongs to `phase`, which may have been entered before."""
        self._phase = phase
        self._note_peak()

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once; called for all that operations return."""
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        if storage in self._tokens:
            return
        token = self._tokens[storage] = self._new_token()
        self._alive[token] = self.bytes_of(tensor)
        self.current_bytes += self._alive[token]
        weakref.finalize(storage, self._free, token)

    def bytes_of(self, tensor: Tensor) -> int:
        """What a tensor's storage counts; 0 on other devices."""
        if tensor.device.type != self._device_type:
            return 0
        rounding = self._rounding_bytes
        return -(-tensor.untyped_storage().nbytes() // rounding) * rounding

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if func in _COMPARING:
            return True
        if func is _aten.nonzero.default:
            return self._nonzero(args[0])
        mask = self._mask(args[0]) if func in _COPYING else None
        if func is _aten._to_copy.default and not isinstance(args[0], FakeTensor):
            args = [torch.empty_like(args[0]), *args[1:]]
        if func in _INDEXING:
            args = [args[0], self._without_masks(args[1]), *args[2:]]
        result = func(*args, **kwargs)
        if (workspace := _WORKSPACES.get(func)) is not None:
            self._note_peak(workspace(*args))
        if mask is not None:
            if func is _aten.all.default:
                mask = np.asarray(mask.all())
            self._masks[result.untyped_storage()] = mask
        if func is _aten.add.Tensor and _sums_gradients(*args[:2]):
            self._free(self._tokens.get(args[0].untyped_storage()))
        for leaf in tree_leaves(result):
            if isinstance(leaf, FakeTensor):
                leaf.constant = None  # or small tensors would compute, on a device that cannot
                self.count(leaf)
        self._note_peak()
        return result

    def _free(self, token: int | None) -> None:
        self.current_bytes -= self._alive.pop(token, 0)  # type: ignore[arg-type]

    def _note_peak(self, workspace_bytes: int = 0) -> None:
        peak = self.current_bytes + workspace_bytes
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), peak)

    def _mask(self, tensor: Tensor) -> NDArray[np.bool_] | None:
        """What a bool tensor holds, where that is known."""
        if tensor.dtype != torch.bool:
            return None
        if not isinstance(tensor, FakeTensor):
            with _disable_current_modes():
                return tensor.clone().numpy()
        contents: NDArray[np.bool_] | None = self._masks.get(tensor.untyped_storage())
        return contents

    def _scalar(self, tensor: Tensor) -> bool | int | float:
        contents = self._mask(tensor)
        if contents is not None:
            return bool(contents.all())
        return 1.0 if tensor.is_floating_point() else 1

    def _nonzero(self, mask: Tensor) -> Tensor:
        contents = self._mask(mask)
        count = mask.numel() if contents is None else int(contents.sum())
        found = torch.empty((count, mask.ndim), dtype=torch.int64, device=mask.device)
        self.count(found)
        self._note_peak()
        return found

    def _without_masks(self, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
        """As aten's own indexing replaces masks by the positions of what they mark."""
        found: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.dtype == torch.bool:
                found += self._nonzero(index).unbind(1)
            else:
                found.append(index)
        return found


def _sums_gradients(into: object, other: object) -> bool:
    """Whether autograd adds two gradients of one tensor, which it does in place.

    Only on plain tensors (torch/csrc/autograd/input_buffer.cpp), so a trace sees a new one. A view
    keeps its base alive, and then autograd makes a new one too.
    """
    return (
        torch._C._current_graph_task_id() != -1  # within a backward pass,
        and not torch.is_grad_enabled()  # and not in a checkpoint's second forward pass
        and isinstance(into, Tensor)
        and isinstance(other, Tensor)
        and into.shape == other.shape
        and into.dtype == other.dtype
        and not into._is_view()
    )
