"""How the C library hands out memory to a training on a CPU."""

import ctypes
import sys

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Have freed memory of any size kept for the next tensor; whether that can be had here.

    glibc gives every block above 32 MB back to the kernel when it is freed, and each step's logits
    and gradients of the head are such: fetching and zeroing their pages again took a sixth of a
    small model's step (docs/log.md). The process stays as large as it was at its largest.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
