"""What the scripts print fits the terminal: no line is longer, and none breaks in the middle of a word."""

import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import click
import pytest

import inference
import plot_metrics
import train_grpo
from grpo.launch.command import errors_that_fit, run_script
from tests.helpers.runs import ENVIRONMENT, ROOT, forked
from tests.helpers.scripts import QUESTION, TINY, ask, invoke, train

SCRIPTS = [train_grpo.main, inference.main, plot_metrics.main]


@pytest.fixture(params=[60, 80, 140])
def columns(request, monkeypatch):
    """Return the columns of the terminal, as the scripts see them."""
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def longest(text):
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("command", SCRIPTS, ids=lambda c: c.callback)
def test_help_has_the_same_words_at_every_width_and_fits(command, columns, monkeypatch):
    context = command.make_context("script", [], resilient_parsing=True)  # the test runner of click has 80 columns
    text = command.get_help(context)
    monkeypatch.setenv("COLUMNS", "200")
    assert longest(text) <= columns
    assert text.split() == command.get_help(context).split()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (train_grpo.main, ["--device", "tpu"]),
        (train_grpo.main, ["--task", "chess"]),
        (train_grpo.main, ["--load-in-4bit"]),
        (inference.main, ["--compare", QUESTION]),
        (inference.main, ["What", "is", "3", "+", "4?"]),
        (plot_metrics.main, []),
    ],
)
def test_errors_fit_and_have_the_same_words(command, arguments, columns, tmp_path, monkeypatch):
    result = invoke(command, *arguments, folder=tmp_path)
    monkeypatch.delenv("COLUMNS")
    assert longest(result.stderr) <= columns
    assert result.exit_code
    assert result.stderr.split() == invoke(command, *arguments, folder=tmp_path).stderr.split()


def test_an_error_that_begins_with_a_word_longer_than_the_line_says_error_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(click.ClickException) as error, errors_that_fit():
        raise click.ClickException(f"/{'a' * 70} is no folder")
    assert error.value.message.split() == [f"/{'a' * 70}", "is", "no", "folder"]


def test_a_run_and_questions_to_its_model_fit_a_narrow_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    result = train("--show-every", 1, "--beta", 0, folder=tmp_path)
    assert longest(result.stdout) < 60
    assert longest(result.stderr) < 60
    assert "grpo_kl_divergence" not in result.stdout  # there is no reference
    command = " ".join(result.stdout[result.stdout.index("Next:") :].replace("\\\n", " ").split()[1:])
    assert shlex.split(command) == ["python", "inference.py", "--compare", QUESTION]
    for arguments in ([QUESTION, "--compare"], ["--evaluate", "--compare"]):
        assert longest(invoke(inference.main, *arguments, folder=tmp_path).stdout) < 60


# --- questions on a terminal ---


@pytest.fixture
def on_terminal(monkeypatch):
    """Make standard input a terminal, as far as the script sees."""
    monkeypatch.setattr(inference, "on_terminal", lambda: True)


@pytest.mark.usefixtures("on_terminal")
@pytest.mark.parametrize("end", ["", "\n", "   \nWhat is never asked?\n"], ids=["Ctrl-D", "empty", "blank"])
def test_questions_are_asked_for_and_answered_until_an_empty_line(end, tmp_path, monkeypatch):
    loaded, load = [], inference.load_model
    monkeypatch.setattr(inference, "load_model", lambda *args: loaded.append(args[0]) or load(*args))
    result = invoke(inference.main, folder=tmp_path, input=f"{QUESTION}\nWhat is (1 + 2) + 3?\n{end}")
    assert result.exit_code == 0
    assert loaded == ["starter"]  # the model is loaded only once
    answers = [line.removeprefix("> ") for line in result.stdout.splitlines()[:2]]
    assert answers == ask(QUESTION, "What is (1 + 2) + 3?", folder=tmp_path)[1::2]
    assert "An empty line or Ctrl-D ends" in result.stderr


@pytest.mark.usefixtures("on_terminal")
def test_a_question_that_is_too_long_does_not_end_the_conversation(tmp_path):
    result = invoke(inference.main, folder=tmp_path, input=f"{'1 + ' * 600}1\n{QUESTION}\n")
    assert result.exit_code == 0
    assert "Error: the longest prompt has" in result.stderr
    assert "[answer " in result.stdout


@pytest.mark.usefixtures("on_terminal")
def test_samples_of_a_conversation_are_those_of_questions_given_together(tmp_path):
    options = ["--samples", 2, "--temperature", 2]
    together = ask(*options, QUESTION, QUESTION, folder=tmp_path)
    asked = invoke(inference.main, *options, folder=tmp_path, input=f"{QUESTION}\n{QUESTION}\n").stdout
    assert [line.removeprefix("> ") for line in asked.splitlines()[:4]] == together[1:3] + together[4:]


@pytest.mark.usefixtures("on_terminal")
def test_ctrl_c_ends_a_conversation_with_130_and_no_traceback(tmp_path, monkeypatch):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    result = invoke(inference.main, folder=tmp_path)
    assert result.exit_code == 130
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("words", [["What", "is", "3", "+", "4?"], ["What", "is", "3", "+", "-4?"], ["5", "+", "-5"]])
def test_a_question_without_quotes_is_recognised(words, tmp_path):
    result = invoke(inference.main, *words, folder=tmp_path)
    assert result.exit_code == 2
    assert f"python inference.py {shlex.quote(' '.join(words))}" in result.stderr


def test_files_that_the_shell_put_in_the_place_of_an_asterisk_are_not_suggested(tmp_path):
    (tmp_path / "mine.py").touch()
    result = invoke(inference.main, "What", "is", "3", "mine.py", "4?", folder=tmp_path)
    assert shlex.quote(QUESTION) in result.stderr
    assert "mine.py" not in result.stderr


def test_comparing_without_a_trained_model_says_to_train_first(tmp_path):
    for arguments in ([QUESTION], ["--evaluate"]):
        assert "Train first" in invoke(inference.main, "--compare", *arguments, folder=tmp_path).stderr


# --- --check ---


def test_check_says_what_a_run_would_do_and_writes_nothing(tmp_path):
    options = ["--sft-steps", 1, "--pass-at-k", 1, "--output-dir", "out"]
    text = invoke(train_grpo.main, *TINY, *options, "--check", folder=tmp_path).stdout
    assert list(tmp_path.iterdir()) == []
    assert "learning_rate=3e-06" in text
    assert re.search(r"A prompt, \d+ tokens:\n  <\|im_start\|>system\n", text)
    assert re.search(r"A solution, \d+ tokens.*, reward 1\.00 \(format 0\.20, close 0\.20, exact 0\.60\)", text)
    assert re.search(r"A wrong answer, \d+ tokens, reward 0\.\d0 \(format 0\.20, close", text)
    for part in ("steps", "validation", "test", "SFT", "pass@k", "MiB", "nothing was written"):
        assert part in text


def test_check_and_seeds_do_not_go_together(tmp_path):
    result = invoke(train_grpo.main, "--check", "--seeds", "0,1", folder=tmp_path)
    assert result.exit_code == 2
    assert "--seed" in result.stderr


def test_check_of_problems_without_a_known_solution(tmp_path, monkeypatch):
    def unknown(*args):
        raise ValueError("the task knows no right completion for any of 50 training problems")

    monkeypatch.setattr("grpo.launch.check.solved_problem", unknown)
    result = invoke(train_grpo.main, *TINY, "--check", folder=tmp_path)
    assert result.exit_code == 0, result.output
    assert "A solution to this problem is not known" in result.stdout


QUESTION_IN_CHINESE = "北京 4 + 3 是多少?"


def test_a_terminal_without_the_letters_of_a_text_gets_them_escaped(model):
    def as_a_script(arguments, prog_name):
        sys.argv = [prog_name, *arguments]
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="cp1252")
        run_script(inference.main)

    script = SimpleNamespace(main=as_a_script)
    status, out, err = forked(script, ["--model", model, QUESTION_IN_CHINESE])
    assert (status, err) == (0, f"Model: {model}\n")
    assert r"\u5317\u4eac 4 + 3" in out


@pytest.mark.parametrize("streams", [(0, 1), (2,)], ids=str)
def test_closed_streams_do_not_end_a_script(streams, model):
    close = f"import os, sys; [os.close(n) for n in {streams}]; os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", close, sys.executable, "inference.py", "--model", str(model), "4 + 3"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert bool(done.stdout) == (1 not in streams)


@pytest.mark.parametrize("status", [0, 3])
def test_a_script_ends_with_its_status_when_all_is_written_and_done(status, tmp_path):
    code = (
        "import atexit, sys, click\n"
        "from grpo.launch.command import run_script\n"
        "atexit.register(print, 'at exit')\n"
        f"run_script(click.Command('c', callback=lambda: print('said') or sys.exit({status})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split("\n"), done.stderr) == (status, ["said", "at exit", ""], "")
