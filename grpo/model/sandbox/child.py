"""Use the tokenizer and chat template of a stranger, with limits of time and memory.

`tokenizer.py` starts this file as a process. It reads a request a line on standard input and answers it with a line
on standard output, both JSON. Torch is left out: so it starts in a second and holds 70 MB. The system ends it at a
limit, also where the process that started it has died.
"""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

TRIAL = "What is (4 - 9) * 6? a\u0301 \u5317\u4eac \U0001f600\n\t<answer>-30</answer>  " + "word " * 200
LEAST_REPLY = 2**20  # bytes that any request may be answered with
REPLY_PER_BYTE = 32  # of a request: a token id has up to 8 characters in JSON


def limit_memory(extra: int) -> None:
    """Let this process have `extra` bytes more than it has now, where the system can be asked for that (Linux)."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + extra, resource.getrlimit(resource.RLIMIT_AS)[1]))


def limit_seconds(seconds: float) -> None:
    """End this process by SIGPROF after so many seconds of computing; 0 for no limit."""
    import signal

    if hasattr(signal, "setitimer"):  # Windows has none
        signal.setitimer(signal.ITIMER_PROF, seconds)


def answer(tokenizer: Any, request: Mapping[str, Any]) -> Any:
    """Return what the tokenizer makes of a request, as JSON values."""
    work, options = request["work"], request["options"]
    if work == "chat":
        found = tokenizer.apply_chat_template(request["value"], **options)
    elif work == "encode":
        found = tokenizer(request["value"], **options)
    else:
        return tokenizer.batch_decode(request["value"], **options)
    return found if isinstance(found, str) else {"input_ids": found["input_ids"]}


def reply(work: Any, out: TextIO, most: int) -> None:
    """Write the result of `work()`, of at most so many characters, or the error that it raised."""
    try:
        line = json.dumps({"result": work()})
        if len(line) > most:
            line = json.dumps({"error": f"it makes a text of {len(line):,} characters", "kind": "ValueError"})
    except BaseException as error:  # one of tokenizers' is not an Exception
        line = json.dumps({"error": str(error)[:2000], "kind": type(error).__name__})
    out.write(line + "\n")
    out.flush()


def main(source: str, local_files_only: bool, memory: int, seconds: float) -> None:
    """Load the tokenizer of a folder or Hub model, try it, then answer requests until there are no more."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    sys.modules["torch"] = None  # so that importing it fails
    from transformers import AutoTokenizer

    tokenizer: Any = None

    def load() -> bool:
        nonlocal tokenizer
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local_files_only)
        ids = tokenizer(TRIAL)["input_ids"]
        if len(ids) > 100 * len(TRIAL):
            raise ValueError(f"it makes {len(ids):,} tokens of {len(TRIAL)} characters")
        tokenizer.batch_decode([ids])
        return True

    limit_memory(memory)
    limit_seconds(seconds)
    reply(load, out, LEAST_REPLY)
    for line in sys.stdin:
        request = json.loads(line)
        limit_seconds(request["seconds"])
        reply(lambda asked=request: answer(tokenizer, asked), out, LEAST_REPLY + REPLY_PER_BYTE * len(line))
        limit_seconds(0)


if __name__ == "__main__":
    import signal

    for name in ("SIGINT", "SIGTERM"):  # meant for the run, which may want to finish its step
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    main(sys.argv[1], sys.argv[2] == "1", int(sys.argv[3]), float(sys.argv[4]))
