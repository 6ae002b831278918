"""Memory on a CPU: the format of feature maps, and what becomes of freed blocks."""

import ctypes
import platform

import torch
from torch import Tensor

from fast.dispatch import is_plain


def channels_last(images: Tensor) -> Tensor:
    """The images in the memory format channels_last, where the layers are faster in it.

    That is on a CPU, and on a GPU in bfloat16, which its tensor cores read so.
    https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
    """
    kind = images.device.type
    on_gpu_in_bfloat16 = kind not in ("cpu", "meta") and torch.is_autocast_enabled(kind)
    if images.ndim != 4 or not (is_plain(images) or on_gpu_in_bfloat16):
        return images
    # A copy: the strides of one channel fit both formats, and later layers would use the default.
    return torch.empty_like(images, memory_format=torch.channels_last).copy_(images)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, where it is the C library.

    Each step takes the same hundred megabytes again. Returned to the system in between, they fault
    in page by page each time: 10 to 15 % of a step on the CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD, of which older versions have a limit.
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
