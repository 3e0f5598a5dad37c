"""Rewards of a user, each wrong in one way: the text of the file, with `f` in it, and a word of its refusal."""

REWARDS = {
    "os.chdir": ("import os\ndef f(**c):\n    os.chdir('/')\n    return [1.0] * len(c['prompts'])", "current folder"),
    "os.chdir at import": ("import os\nos.chdir('/')\ndef f(**c):\n    return [1.0]", "current folder"),
    "sys.exit": ("import sys\ndef f(**c):\n    sys.exit('bye')", "SystemExit: bye"),
    "a class": ("class f:\n    pass", "is a class"),
    "a coroutine function": ("async def f(**c):\n    return [1.0]", "1 numbers for"),
    "an asynchronous generator": ("async def f(**c):\n    yield 1.0", "async"),
    "an object with an asynchronous call": ("class F:\n    async def __call__(self, **c): 0\nf = F()", "TypeError"),
    "a number": ("f = 5", "no function 'f'"),
    "no arguments": ("def f():\n    return []", "TypeError"),
    "raises": ("def f(**c):\n    raise KeyError('no\\nsuch')", "KeyError"),
    "endless recursion": ("def f(**c):\n    return f(**c)", "RecursionError"),
    "memory": ("def f(**c):\n    raise MemoryError", "MemoryError"),
    "an exception that cannot be printed": (
        "class E(Exception):\n    def __str__(self): return 1 / 0\ndef f(**c):\n    raise E", "E",
    ),
    "control characters": ("def f(**c):\n    raise ValueError('\\x1b[2J\\r\\x07')", "ValueError"),
    "an exception of no kind": ("class B(BaseException): pass\ndef f(**c):\n    raise B('oh')", "B: oh"),
    "one number for all": ("def f(**c):\n    return [1.0]", "1 numbers for"),
    "NaN": ("def f(**c):\n    return [float('nan')] * len(c['prompts'])", "finite number"),
    "a text": ("def f(**c):\n    return ['1'] * len(c['prompts'])", "finite number"),
    "breaks on an empty completion": (
        "def f(completions, **c):\n    return [float(x[0]['content'][0] == '<') for x in completions]", "IndexError",
    ),
    "a value that cannot be shown": (
        "class V:\n    def __repr__(self): return 1 / 0\ndef f(**c):\n    return [V()] * len(c['prompts'])", "finite",
    ),
}  # fmt: skip
