"""Memory of the C library that a process keeps, rather than giving it back and asking for it again at every step."""

import ctypes

# Names of glibc's <malloc.h>, with the values that say never.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors of the CPU, for as long as it lives.

    Otherwise glibc gives tensors above some size back to the system as they are freed, and the next step waits for
    the system to fill the same thousands of pages with zeros: a tenth of the time of small networks
    (docs/benchmarks.md). The values of tensors do not change; the memory in use stays near its peak.

    Returns:
        Whether the C library knows the settings; others than glibc do not, and nothing changes.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows has no library without a name
        return False
    return bool(set_option(M_MMAP_MAX, 0)) and bool(set_option(M_TRIM_THRESHOLD, -1))
