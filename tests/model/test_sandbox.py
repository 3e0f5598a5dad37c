"""Tokenizers of strangers in a process of their own: same ids, limits, and copies of the starter without one."""

import shutil

import pytest
import torch

from grpo.model.chat_template import render
from grpo.model.loading import load
from grpo.model.sandbox import tokenizer as sandbox
from grpo.model.sandbox.tokenizer import SandboxedTokenizer, child_of
from grpo.model.saving import save
from grpo.model_card import STARTER
from tasks.arithmetic import Arithmetic

CPU = torch.device("cpu")
CHAT = Arithmetic().messages("What is (4 - 9) * 6? <|im_end|> \u0e01\U0001f600")
# works but for a question with WAIT, GROW or SAY in it
MOODY = (
    "{% set q = messages[-1]['content'] %}{% if 'WAIT' in q %}"
    + "{% for a in range(99999) %}" * 3
    + "{% endfor %}" * 3
    + "{% elif 'GROW' in q %}{{ q * 10**9 }}{% elif 'LONG' in q %}{{ q * 10**6 }}"
    "{% elif 'SAY' in q %}{{ raise_exception('\x1b[2Jno\n\x07') }}{% endif %}"
)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """Load a copy of the starter with another template, so that it is a stranger's."""
    folder = tmp_path_factory.mktemp("stranger") / "m"
    shutil.copytree(STARTER, folder)
    text = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(MOODY + text, encoding="utf-8")
    return load(str(folder), CPU)


def test_a_strangers_tokenizer_gives_what_it_gives_here(stranger, starter):
    assert isinstance(stranger.tokenizer, SandboxedTokenizer)
    assert not isinstance(starter.tokenizer, SandboxedTokenizer)
    assert stranger.prompts([CHAT]) == starter.prompts([CHAT])
    text = "4 - 9 = -5\n<answer>-30</answer><|im_end|>"
    assert stranger.completion(text) == starter.completion(text)
    ids = stranger.prompts([CHAT])
    assert stranger.decode(ids) == starter.decode(ids)
    assert (stranger.end_ids, stranger.pad_id) == (starter.end_ids, starter.pad_id)
    assert len(stranger.tokenizer) == len(starter.tokenizer)


def test_what_was_saved_of_the_starter_needs_no_process(starter, tmp_path):
    save(tmp_path / "m", starter, {}, "")
    assert child_of(str(tmp_path / "m")) is None
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    assert child_of(str(tmp_path / "m")) is not None


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("SAY", r"refuses the prompt: \\x1b\[2Jno"),
        ("GROW", "MB of memory"),
        ("LONG", "characters"),
        ("WAIT", "takes more than 0.5 s"),
    ],
)
def test_a_template_that_waits_for_its_question_is_stopped_in_one_line(word, reason, stranger, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS_PER_TEXT", 0.5)
    with pytest.raises(ValueError, match=reason) as error:
        render(stranger.tokenizer, [{"role": "user", "content": word}])
    assert str(error.value).isprintable()


def test_a_process_that_was_stopped_says_why_and_the_next_load_has_a_new_one(stranger):
    source = stranger.tokenizer.name_or_path
    child = child_of(source)
    child.process.kill()
    for _ in range(2):
        with pytest.raises(ValueError, match="stopped"):
            child.ask("encode", "a")
    again = child_of(source)
    assert again is not child
    assert again.ask("encode", "a") == {"input_ids": load("starter", CPU).tokenizer("a")["input_ids"]}
