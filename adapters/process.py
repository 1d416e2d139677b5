"""Who a worker process is, so that others can tell whether it still lives, and how gently it should run."""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

import psutil


def identity() -> str:
    """Names this process beyond doubt: machine, boot, process namespace, id and start time, as JSON."""
    process = psutil.Process()
    return json.dumps({"host": _host(), "pid": process.pid, "started": process.create_time()})


def is_certainly_dead(worker: str) -> bool:
    """Whether the process that ``identity`` named is gone. ``False`` when that cannot be told from here."""
    try:
        described = json.loads(worker)
        host, pid, started = described["host"], int(described["pid"]), float(described["started"])
    except (ValueError, TypeError, KeyError):
        return False
    if host != _host():
        return False
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) > 1.0 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def run_gently(niceness: int) -> None:
    """Lowers this process's priority for processor and disk by ``niceness`` (0 to 19); best effort."""
    process = psutil.Process()
    with suppress(psutil.Error, OSError, AttributeError):
        process.nice(max(process.nice(), niceness))
    with suppress(psutil.Error, OSError, AttributeError, ValueError):
        process.ionice(psutil.IOPRIO_CLASS_BE, 7)
    # Where Linux groups processes by session, niceness counts within a session only; the group has its own.
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(f"{niceness}\n", encoding="ascii")


def resident_bytes() -> int:
    """Memory that this process occupies now."""
    return int(psutil.Process().memory_info().rss)


def wait_until_dead(pid: int, timeout: float) -> bool:
    """Waits up to ``timeout`` seconds for a process that is not a child; tells whether it is gone."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid):
            return True
        time.sleep(0.02)
    return not psutil.pid_exists(pid)


def _host() -> str:
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
