"""The process in which one chat template runs (see ``eda.adapters.templates.renderer``): JSON lines in, JSON lines out.

The first line holds the template, each further one messages to render. An answer has ``text`` or ``error``. A line that
takes too much processor time ends the process by a signal that Python cannot hold up, since one operation of a template
(``'a' * 10**9``, sorting, a regular expression) may take for ever inside of the interpreter.
"""

import json
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from eda.formats.chat_template import ChatTemplate, ChatTemplateError, CompiledTemplate

MEMORY_BYTES = 512 * 1024 * 1024
PROCESSOR_SECONDS = 1.0
"""For one rendering; compiling and trying a template may take as long."""
_FREE_CHARS = 1 << 20


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process whatever it is doing
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C at a terminal is for the server, which lets requests finish
    first = json.loads(sys.stdin.buffer.readline())
    compiled: list[CompiledTemplate] = []

    def compile_template() -> str:
        pairs = tuple((name, token) for name, token in first["special_tokens"])
        compiled.append(CompiledTemplate(ChatTemplate(first["source"], pairs)))
        return ""

    if not _answer(compile_template):
        return
    while line := sys.stdin.buffer.readline():
        messages = json.loads(line)
        most = _FREE_CHARS + 4 * len(line)
        if not _answer(partial(compiled[0].render, messages, max_chars=most)):
            return


def _answer(work: Callable[[], str]) -> bool:
    """Does one thing within the limit and writes what came of it; tells whether the process may go on."""
    answer: dict[str, Any]
    goes_on = True
    signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)
    try:
        answer = {"text": work()}
    except ChatTemplateError as error:
        answer = {"error": str(error)[:1000]}
    except MemoryError:
        answer = {"error": f"the chat template needs more than {MEMORY_BYTES >> 20} MiB of memory"}
        goes_on = False
    except RecursionError:
        answer = {"error": "the chat template nests too deeply"}
        goes_on = False
    signal.setitimer(signal.ITIMER_PROF, 0)
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()
    return goes_on


if __name__ == "__main__":
    main()
