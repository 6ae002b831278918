"""Settings of the C library's memory allocator."""

import ctypes
import platform


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for reuse; without effect for other C libraries.

    A training step allocates the same hundreds of megabytes as the one before. If glibc returns
    them to the system in between, page faults take 10 to 15 % of a step on a CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; older glibc: 32 MiB
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
