"""Who a worker process is, so that others can tell whether it still lives, and how gently it should run."""

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import psutil

Scheduling = Literal["idle", "batch", "normal"]
"""How Linux shares the processor out: only what nobody else wants, a share without haste, or as with anybody."""
SLEEPING_OPENMP: Mapping[str, str] = {
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
}
"""Environment in which threads of OpenMP (GNU's, Intel's and LLVM's) do not spin while they wait. Read when torch is
loaded, so a process has to be started with it."""

logger = logging.getLogger(__name__)


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


def run_gently(niceness: int, scheduling: Scheduling = "normal") -> None:
    """Makes this process stand back for the processor and the disk; what the system forbids or lacks is left out.

    Threads started later inherit this from the one that starts them.

    Args:
        niceness: 0 to 19.
        scheduling: "idle" gives way to any other process at once, whatever the niceness, and gets next to nothing
            while all cores are busy.
    """
    refused = [
        f"{name} ({error})"
        for name, step in (
            ("niceness", lambda: _nice(niceness)),
            ("disk priority", lambda: psutil.Process().ionice(psutil.IOPRIO_CLASS_BE, 7)),
            ("scheduling", lambda: _schedule(scheduling)),
            ("niceness of the session", lambda: _nice_session(19 if scheduling == "idle" else niceness)),
        )
        if (error := _refusal(step)) is not None
    ]
    if refused:
        logger.info("this system does not grant a low priority in full: %s", "; ".join(refused))


def _refusal(step: Callable[[], object]) -> str | None:
    try:
        step()
    except (psutil.Error, OSError, AttributeError, ValueError) as error:
        return str(error)
    return None


def _threads() -> list[int]:
    """Of this process. Linux keeps priorities for each, and libraries start some as soon as they are imported."""
    return [thread.id for thread in psutil.Process().threads()] if psutil.LINUX else [0]


def _nice(niceness: int) -> None:
    for thread in _threads():
        os.setpriority(os.PRIO_PROCESS, thread, max(os.getpriority(os.PRIO_PROCESS, thread), niceness))


def _schedule(scheduling: Scheduling) -> None:
    if scheduling != "normal":
        policy = os.SCHED_IDLE if scheduling == "idle" else os.SCHED_BATCH
        for thread in _threads():
            os.sched_setscheduler(thread, policy, os.sched_param(0))


def _nice_session(niceness: int) -> None:
    """Where Linux groups processes by session, priorities count within a session only; the group has its own."""
    switch = Path("/proc/sys/kernel/sched_autogroup_enabled")
    if not switch.exists() or switch.read_text(encoding="ascii").strip() != "1":
        return
    # A worker started by hand shares its session with a shell and perhaps with the server.
    if os.getsid(0) == os.getpid():
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
