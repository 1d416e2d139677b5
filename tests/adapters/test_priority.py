"""That a worker stands back: read from a process that the supervisor started, and where the system refuses."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from eda.adapters.worker import process
from eda.adapters.worker.process import SLEEPING_OPENMP, Scheduling
from eda.adapters.worker.settings import WorkerSettings
from eda.server.worker_supervisor import WorkerSupervisor
from tests.adapters.helpers import FAKE_WORKER, wait_for

linux = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="no scheduling policies here")


def started(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, scheduling: Scheduling
) -> Iterator[psutil.Process]:
    """A worker whose main loop runs, hence with its priority set."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE_WORKER.parents[2]))
    settings = WorkerSettings(
        str(data_dir), "", "", poll_seconds=0.05, supervised=True, niceness=7, scheduling=scheduling
    )
    supervisor = WorkerSupervisor(settings, command=(sys.executable, str(FAKE_WORKER)))
    supervisor.start()
    try:
        yield psutil.Process(wait_for(lambda: supervisor.pid))
    finally:
        supervisor.stop()


@linux
@pytest.mark.parametrize("scheduling", ["idle", "batch", "normal"])
def test_a_supervised_worker_stands_back_with_all_its_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduling: Scheduling
) -> None:
    policy = {"idle": os.SCHED_IDLE, "batch": os.SCHED_BATCH, "normal": os.SCHED_OTHER}[scheduling]
    niceness = max(7, psutil.Process().nice())
    for worker in started(tmp_path, monkeypatch, scheduling):
        wait_for(lambda: (tmp_path / "eda.sqlite3").exists())  # opened once the priority is set
        for thread in worker.threads():
            assert os.sched_getscheduler(thread.id) == policy
            assert os.getpriority(os.PRIO_PROCESS, thread.id) == niceness


@linux
def test_openmp_does_not_spin_in_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "55")
    for worker in started(tmp_path, monkeypatch, "idle"):
        environment = worker.environ()
        assert environment["GOMP_SPINCOUNT"] == "55", "what the operator sets wins"
        assert {name: environment[name] for name in ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")} == {
            "OMP_WAIT_POLICY": SLEEPING_OPENMP["OMP_WAIT_POLICY"],
            "KMP_BLOCKTIME": SLEEPING_OPENMP["KMP_BLOCKTIME"],
        }


REFUSED = """
import logging, os
from eda.adapters.worker import process
logging.basicConfig(level=logging.INFO, format="%(message)s")
def refuse(*_):
    raise PermissionError(1, "Operation not permitted")
os.sched_setscheduler = refuse
process.psutil.Process.ionice = refuse
process.run_gently(3, "idle")
print(os.getpriority(os.PRIO_PROCESS, 0))
"""


@linux
def test_what_the_system_refuses_is_left_out_with_one_line() -> None:
    found = subprocess.run(
        [sys.executable, "-c", REFUSED],
        cwd=FAKE_WORKER.parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    [line] = found.stderr.splitlines()
    assert "disk priority" in line
    assert "scheduling ([Errno 1] Operation not permitted)" in line
    assert int(found.stdout) == max(3, psutil.Process().nice())


def test_a_system_without_policies(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("SCHED_IDLE", "SCHED_BATCH", "sched_setscheduler"):
        monkeypatch.delattr(process.os, name, raising=False)
    monkeypatch.setattr(process.os, "setpriority", lambda *_: None)
    monkeypatch.setattr(process.psutil.Process, "ionice", lambda *_: None, raising=False)
    with caplog.at_level(logging.INFO, logger="eda.adapters.worker.process"):
        process.run_gently(5, "idle")
    assert len(caplog.records) == 1


def test_the_session_of_a_shell_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its group of processes holds others than the worker."""
    written: list[str] = []
    monkeypatch.setattr(Path, "write_text", lambda self, text, **_: written.append(f"{self}: {text}"))
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "1\n")
    process._nice_session(19)
    assert written == []
    monkeypatch.setattr(os, "getsid", lambda _: os.getpid())
    process._nice_session(19)
    assert written == ["/proc/self/autogroup: 19\n"]
