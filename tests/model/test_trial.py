"""The trial of an unknown tokenizer in a child process with limits; the starter's tokenizer needs no trial."""

import shutil

import pytest
import torch

from grpo.model import inspection, trial
from grpo.model.inspection import check_tokenizer
from grpo.model.loading import load
from grpo.model.saving import save
from grpo.model_card import STARTER
from tasks.arithmetic import Arithmetic
from tests.helpers.data import refusal
from tests.helpers.hostile import LOOPS, PROBE

CPU = torch.device("cpu")
CHAT = Arithmetic().messages("What is (4 - 9) * 6? <|im_end|> \u0e01\U0001f600")


def a_copy_with_template(folder, text):
    """Copy the starter's folder with this text before its chat template, so that its bytes are unknown."""
    shutil.copytree(STARTER, folder)
    template = folder / "chat_template.jinja"
    template.write_text(text + template.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def test_an_unknown_tokenizer_that_passes_is_used_as_it_is(starter, tmp_path):
    lm = load(str(a_copy_with_template(tmp_path / "m", "{# another #}")), CPU)
    assert type(lm.tokenizer) is type(starter.tokenizer)
    assert lm.prompts([CHAT]) == starter.prompts([CHAT])
    assert (lm.end_ids, lm.pad_id) == (starter.end_ids, starter.pad_id)


def test_the_starter_and_what_was_saved_of_it_need_no_trial(starter, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(inspection, "try_tokenizer", lambda folder, size: tried.append(folder))
    save(tmp_path / "m", starter, {}, "")
    check_tokenizer(STARTER)
    check_tokenizer(tmp_path / "m")
    assert not tried
    (tmp_path / "m" / "vocab.txt").write_text("a")
    check_tokenizer(tmp_path / "m")
    (tmp_path / "m" / "vocab.txt").unlink()
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    check_tokenizer(tmp_path / "m")
    assert tried == [tmp_path / "m"] * 2


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 10**10 }}", "MB of memory"),
        ("{% for i in range(2000) %}{{ 'x' * 1000 }}{% endfor %}", "characters"),
        (LOOPS, "more than 1 s"),
        ("{{ 1 + '\x1b[2J' }}", "fail: TypeError"),
    ],
    ids=["memory", "length", "time", "error"],
)
def test_a_template_that_fails_its_trial_is_refused_with_the_reason(template, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 1)
    monkeypatch.setattr(trial, "SECONDS_PER_MB", 0)
    assert reason in refusal(check_tokenizer, a_copy_with_template(tmp_path / "m", template + PROBE))


def test_a_template_may_refuse_a_chat_in_its_trial(tmp_path):
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    check_tokenizer(a_copy_with_template(tmp_path / "m", refuses))
