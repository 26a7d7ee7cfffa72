"""Memory of this process, for the benchmarks; Linux only."""

from pathlib import Path


def status(key: str) -> int:
    """Bytes, by their name in /proc/self/status: VmRSS now, VmHWM at the most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def forget_peak() -> None:
    """VmHWM counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
