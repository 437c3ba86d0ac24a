"""The most memory that this process and its device have held."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_rss() -> None:
    """Count this process's peak from now on, where the system lets it (Linux); elsewhere it is the whole life's."""
    try:
        _CLEAR.write_text("5")  # proc(5): the peak becomes what is resident now
    except OSError:
        return


def peak_rss() -> int | None:
    """Bytes of this process that were resident at once at most; None where the system does not say."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_bytes(device: "jax.Device") -> int | None:
    """Bytes of the device's memory that were in use at once at most since the start; None where it does not say."""
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else int(peak)
