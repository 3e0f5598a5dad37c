"""The scripts in a notebook: `%run` runs them inside the kernel, which goes on with the user's variables."""

import errno
import subprocess
import sys

from filelock import FileLock

from grpo.config import TrainConfig
from grpo.launch.run_folder import claim_folder
from tests.helpers.runs import ENVIRONMENT, ROOT, a_tiny_model, interpreted, options

# What IPython's %run does: it executes the file as a new module __main__, shows a SystemExit, and then copies the
# module's names over the user's.
NOTEBOOK = """
import builtins, signal, sys, types
builtins.get_ipython = lambda: None
train = "the user's"
before = signal.getsignal(signal.SIGINT)
wakeup = __import__("socket").socketpair()[0]
wakeup.setblocking(False)
signal.set_wakeup_fd(wakeup.fileno())

def run(path, *arguments):
    main, argv = sys.modules["__main__"], sys.argv
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    module.__file__, sys.argv = path, [path, *arguments]
    status = None
    try:
        exec(compile(open(path, encoding="utf-8").read(), path, "exec"), vars(module))
    except SystemExit as end:
        status = end.code
    finally:
        sys.modules["__main__"], sys.argv = main, argv
    globals().update({name: value for name, value in vars(module).items() if not name.startswith("__")})
    print("status", status, train, signal.getsignal(signal.SIGINT) is before, flush=True)

sys.path.insert(0, ".")
"""


def in_notebook(code):
    """Run code in a process that has what a notebook has; return its exit status, standard output and error."""
    return interpreted(["-c", NOTEBOOK + code])


def test_a_notebook_and_its_variables_survive_two_runs_and_a_question(tmp_path):
    model = str(a_tiny_model(tmp_path / "model"))
    runs = [options(model=model, num_iterations=1, output_dir=tmp_path / name) for name in ("a", "b")]
    code = "".join(f"run('train_grpo.py', *{arguments!r})\n" for arguments in runs)
    code += f"run('inference.py', '--model', {model!r}, 'What is (4 - 9) * 6?')\n"
    code += "run('train_grpo.py', '--batch-size', '0')\n"
    code += "print('alive', signal.set_wakeup_fd(-1) == wakeup.fileno())\n"
    status, out, err = in_notebook(code)
    assert status == 0, err
    said = [line for line in out.splitlines() if line.startswith(("status", "alive"))]
    assert said == [*3 * ["status 0 the user's True"], "status 2 the user's True", "alive True"]
    assert all((tmp_path / name / "saved_model/model.safetensors").exists() for name in ("a", "b"))


def test_questions_from_a_closed_standard_input(model):
    # With a question in the command, test_terminal.py closes it, and standard output too.
    command = [sys.executable, "-c", "import os, sys; os.close(0); os.execv(sys.argv[1], sys.argv[1:])"]
    command += [sys.executable, "inference.py", "--model", str(model)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    assert "Error: give a question" in done.stderr


def test_a_folder_that_cannot_be_locked_is_said_and_used(tmp_path, monkeypatch, capsys):
    def no_locks(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(FileLock, "acquire", no_locks)
    with claim_folder(TrainConfig(output_dir=str(tmp_path)), fresh=False):
        pass
    said = capsys.readouterr().err
    assert said == f"{tmp_path} cannot be locked (Operation not supported); start no other run in it\n"
