"""Durations and sizes in words."""

from __future__ import annotations

_SIZES = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def duration(seconds: float) -> str:
    """Three digits below 10 s: "1.25 s", "45.8 ms", "3.1 us"; from there two units at most: "59 s", "8 min 32 s", "2 h 05 min", "3 d 04 h"."""
    if not seconds:
        return "0 s"
    if seconds < 9.995:
        unit, scale = next((unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)) if seconds >= 0.9995 * scale or unit == "us")
        return f"{seconds / scale:.3g} {unit}"
    whole = int(seconds + 0.005)
    for large, scale, small, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= scale:
            return f"{whole // scale:,} {large} {whole % scale // part:02} {small}"
    return f"{whole} s"


def size(num_bytes: float) -> str:
    """Bytes as "3.97 GiB", "11.38 KiB", "228 B"."""
    for unit, scale in _SIZES:
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes:.0f} B"
