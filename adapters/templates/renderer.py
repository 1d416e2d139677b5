"""Chat templates of strangers, rendered with limits on time, memory and size.

Each template runs in a small process of its own (``eda.adapters.templates.worker``), so one that takes for ever delays
its own model's chats only, and is ended by the operating system.
"""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from eda.adapters.templates.worker import PROCESSOR_SECONDS
from eda.formats.chat_template import ChatTemplate, ChatTemplateError, Message

MAX_PROCESSES = 16
"""Templates that are kept ready; the least recently used one goes."""
_START_SECONDS = 60.0
_ANSWER_SECONDS = 10.0
"""By the clock. Processor time is what usually ends a rendering; this is for a machine that is overloaded."""
_PASSED_ON = ("TZ", "LD_LIBRARY_PATH", "PYTHONHOME")
_ROOT = Path(__file__).resolve().parents[2]


class TemplateRenderer:
    """Renders messages under templates. Safe to use from several threads; ``close`` ends its processes."""

    def __init__(self) -> None:
        self._processes: OrderedDict[ChatTemplate, _TemplateProcess] = OrderedDict()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close_all, self._processes)

    def submit(self, template: ChatTemplate, messages: Sequence[Message]) -> Future[str]:
        """Asks for the text of a prompt; the future raises ``ChatTemplateError``.

        Renderings of one template are done one after another, those of several at the same time.
        """
        return self._submit(template, messages)

    def render(self, template: ChatTemplate, messages: Sequence[Message]) -> str:
        """Like ``submit``, and waits."""
        return self._submit(template, messages).result()

    def check(self, template: ChatTemplate) -> None:
        """Compiles and tries a template, and leaves it ready. Raises ``ChatTemplateError`` when it cannot be used."""
        self._submit(template, None).result()

    def close(self) -> None:
        """Ends all processes, after what they are doing now; later calls start new ones."""
        with self._lock:
            _close_all(self._processes)

    def _submit(self, template: ChatTemplate, messages: Sequence[Message] | None) -> Future[str]:
        with self._lock:
            process = self._processes.get(template)
            if process is None:
                while len(self._processes) >= MAX_PROCESSES:
                    self._processes.popitem(last=False)[1].close(wait=False)
                process = self._processes[template] = _TemplateProcess(template)
            self._processes.move_to_end(template)
            return process.executor.submit(process.render, messages)


def _close_all(processes: "OrderedDict[ChatTemplate, _TemplateProcess]") -> None:
    while processes:
        processes.popitem()[1].close(wait=True)


class _TemplateProcess:
    """One template's process, started when it is needed. Everything but ``close`` happens in the executor's thread."""

    def __init__(self, template: ChatTemplate) -> None:
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="chat-template")
        self._template = template
        self._process: subprocess.Popen[bytes] | None = None
        self._flaw: str | None = None
        """Why the template cannot be used at all, once that is known."""

    def render(self, messages: Sequence[Message] | None) -> str:
        if self._flaw is not None:
            raise ChatTemplateError(self._flaw)
        if self._process is None or self._process.poll() is not None:
            self._start()
        if messages is None:
            return ""
        answer = self._ask(messages, _ANSWER_SECONDS)
        if "error" in answer:
            raise ChatTemplateError(answer["error"])
        return str(answer["text"])

    def close(self, *, wait: bool) -> None:
        self.executor.submit(self._end)
        self.executor.shutdown(wait=wait)

    def _start(self) -> None:
        self._end()
        # The server's environment may hold keys. ``-S``: nothing of the machine's start-up files either.
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, sys.path)])
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-m", "eda.adapters.templates.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        pairs = [list(pair) for pair in self._template.special_tokens]
        answer = self._ask({"source": self._template.source, "special_tokens": pairs}, _START_SECONDS)
        if "error" in answer:
            self._flaw = answer["error"]
            self._end()
            raise ChatTemplateError(answer["error"])

    def _ask(self, question: Any, seconds: float) -> Mapping[str, str]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        deadline = time.monotonic() + seconds
        with suppress(BrokenPipeError):  # how it ended is told below
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        line = _read_line(process, deadline)
        if line is not None:
            answer: dict[str, str] = json.loads(line)
            return answer
        is_late = time.monotonic() >= deadline
        if is_late:
            process.kill()
        status = process.wait()
        self._end()
        if is_late:
            raise ChatTemplateError(f"the chat template gave no text within {seconds:.0f} s")
        if status == -signal.SIGPROF:
            problem = f"the chat template takes more than {PROCESSOR_SECONDS:.0f} s of processor time"
            return {"error": problem}
        raise ChatTemplateError(f"the chat template ended its process (status {status})")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError), process:  # closes its pipes and waits
                pass


def _read_line(process: "subprocess.Popen[bytes]", deadline: float) -> bytes | None:
    """What the process answers; ``None`` when it ends or the deadline passes before the end of the line."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    content = bytearray()
    while not content.endswith(b"\n"):
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not poll.poll(remaining * 1000):
            return None
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return None
        content += piece
    return bytes(content)
