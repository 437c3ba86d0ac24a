"""Peak memory of this process and of a device."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak_rss() -> None:
    """Start the process's peak anew, which only Linux can. Elsewhere it stays the peak since the start."""
    try:
        _CLEAR.write_text("5")  # proc(5): the peak becomes what is resident now
    except OSError:
        return


def peak_rss() -> int | None:
    """Peak resident memory of this process in bytes; None where the system does not tell."""
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
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kilobytes


def peak_device_bytes(device: "jax.Device") -> int | None:
    """Peak of the device's memory in use since the start, in bytes; None where it does not tell."""
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return None if peak is None else int(peak)
