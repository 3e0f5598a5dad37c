"""Try the tokenizer and chat template of an unknown model in a child process with limits of time and memory.

A chat template is a program, and a tokenizer's chain of replacements works like one. A few bytes of either can use
up all time and memory. A tokenizer that passes the trial is used in the training process from then on.

The child process runs this file as a script. It does not import torch, so it starts in a second and takes 70 MB.
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 5  # seconds of CPU time that the whole trial may take
SECONDS_PER_MB = 4  # seconds of CPU time added for each MB of the tokenizer's files
MEMORY = 600 * 2**20  # bytes that the trial may use
MEMORY_PER_BYTE = 12  # bytes of memory added for each byte of the tokenizer's files
MAX_FILE_BYTES = 512 * 2**20  # A larger tokenizer is refused; Gemma 3's has 33 MB.
MAX_CHAT_CHARACTERS = 2**20  # A template is refused if it renders a chat as a longer text.
MAX_TOKENS_PER_CHARACTER = 100
TEXT = "What is (4 - 9) * 6? a\u0301 \u5317\u4eac \U0001f600\n\t<answer>-30</answer>  " + "word " * 200
QUESTION = [{"role": "system", "content": "Answer in one line."}, {"role": "user", "content": TEXT}]
CHATS = [QUESTION, QUESTION[1:], [*QUESTION[1:], {"role": "assistant", "content": TEXT}]]
# The child uses one thread, because each thread takes address space, which is limited.
ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
ONE_THREAD |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def try_tokenizer(folder: Path, size: int) -> None:
    """Load and use the tokenizer of a folder in a child process; its files have `size` bytes in all.

    Raises ValueError, in one line, if the tokenizer or its chat template fails or reaches a limit.
    """
    if size > MAX_FILE_BYTES:
        raise ValueError(f"the tokenizer's files have {size / 2**20:,.0f} MB, more than {MAX_FILE_BYTES / 2**20:.0f}")
    memory = MEMORY + MEMORY_PER_BYTE * size
    seconds = SECONDS + SECONDS_PER_MB * size / 1e6
    child = subprocess.run(
        [sys.executable, "-P", __file__, str(folder), str(memory), str(seconds)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **ONE_THREAD},
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # Ctrl-C then reaches the training process only.
        check=False,
    )
    if child.returncode == -getattr(signal, "SIGPROF", 0):
        reason = f"take more than {seconds:.2g} s for a few texts, so they were stopped"
    elif child.returncode != 1 or child.stdout.startswith("MemoryError"):
        reason = f"need more than {memory / 2**20:.0f} MB of memory, or crash, so they were stopped"
    else:
        reason = f"fail: {child.stdout}"
    if child.returncode:
        raise ValueError(f"the model's tokenizer and chat template {reason}")


def use(tokenizer: Any) -> None:
    """Encode, decode and render a few texts, as training does; the template may refuse a chat.

    Raises ValueError if a result is far too long, and whatever else the tokenizer raises.
    """
    from jinja2 import TemplateError

    ids = tokenizer(TEXT)["input_ids"]
    if len(ids) > MAX_TOKENS_PER_CHARACTER * len(TEXT):
        raise ValueError(f"{len(TEXT)} characters become {len(ids):,} tokens, which is too many")
    tokenizer(TEXT, add_special_tokens=False, split_special_tokens=True)
    tokenizer.batch_decode([ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for chat in CHATS if tokenizer.chat_template else ():
        with suppress(TemplateError):  # a template may refuse a system message, see `ensure_chat_template`
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            if len(text) > MAX_CHAT_CHARACTERS:
                raise ValueError(f"a chat becomes a text of {len(text):,} characters, which is too long")
            options = {"tokenize": True, "return_dict": True, "sanitize_control_tokens": True}
            tokenizer.apply_chat_template(chat, add_generation_prompt=True, **options)


def main(folder: str, memory: int, seconds: float) -> None:
    """Try the tokenizer of a folder; exit with status 1 after printing the reason if it fails."""
    out = os.dup(1)
    os.dup2(2, 1)  # standard output carries the reason only, not what libraries print
    sys.modules["torch"] = None  # importing torch fails now, and transformers works without it
    from transformers import AutoTokenizer

    set_limits(memory, seconds)
    try:
        use(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
    except BaseException as error:  # a panic inside tokenizers is not an Exception
        os.write(out, f"{type(error).__name__}: {error}"[:2000].encode(errors="replace"))
        os._exit(1)


def set_limits(memory: int, seconds: float) -> None:
    """Limit how many more bytes of memory, and how many more seconds of CPU time, this process may use."""
    with suppress(ImportError, OSError, ValueError):  # only Linux reports and limits the address space
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
    if hasattr(signal, "setitimer"):  # Windows has no timers
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF ends the child, even if the training process is gone


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
