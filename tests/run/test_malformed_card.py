"""Cards (grpo.json) of a model that are not as this program writes them: refused in one line that names the file."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import inference
from grpo.model_card import CARD
from tests.helpers.malformed import HUGE, refusal, train
from tests.helpers.runs import a_tiny_model

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny model."""
    return a_tiny_model(tmp_path_factory.mktemp("malformed") / "model")


CARDS = {
    "settings of wrong types": {"settings": {"batch_size": "2"}},
    "settings that are fractions": {"settings": {"num_iterations": 2.5}},
    "settings that are lists": {"settings": {"beta": [0.1]}},
    "settings that are true": {"settings": {"num_generations": True}},
    "settings of the run itself": {"settings": {"output_dir": "/"}},
    "a seed": {"settings": {"seed": 1}},
    "NaN": '{"settings": {"beta": NaN}}',
    "infinity": '{"settings": {"learning_rate": Infinity}}',
    "a huge number": '{"settings": {"beta": ' + HUGE + "}}",
    "nested": '{"settings": ' + '{"a":' * 100_000,
    "two": "{}{}",
    "a byte order mark": "\ufeff{}",
    "tokens that are true": {"max_new_tokens": True},
    "tokens without number": {"max_new_tokens": 10**12},
    "tokens beyond 64 bits": {"max_new_tokens": 10**30},
    "tokens that are a fraction": {"max_new_tokens": 2.5},
    "skills that are numbers": {"skills": [1]},
    "a prompt style that is a list": {"prompt_style": ["answer"]},
    "a base model that is null": {"base_model": None},
    "examples that are a text": {"examples": "2 + 2 = 4"},
    "examples without content": {"examples": [{"role": "user"}]},
    "examples of another role": {"examples": [{"role": ["user"], "content": "x"}]},
    "examples that are numbers": {"examples": [{"role": "user", "content": 4}]},
}


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_malformed_card_is_refused_by_name_in_training(card, model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / CARD).write_text(card if isinstance(card, str) else json.dumps(card), encoding="utf-8")
    # a given setting overrides the card's, so leave out those that the card may have
    left_out = dict.fromkeys(("batch_size", "num_generations", "learning_rate", "num_inner_updates"))
    if "num_iterations" in str(card):
        left_out["num_iterations"] = None
    refusal(train(copy, tmp_path / "out", **left_out), CARD)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("[!.]*"))


@pytest.mark.parametrize("kind", ["a folder", "a link to itself"])
def test_a_card_that_is_not_a_file_is_ignored_or_refused_by_name(kind, model, tmp_path):
    copy = Path(shutil.copytree(model, tmp_path / "model"))
    (copy / CARD).unlink()
    (copy / CARD).mkdir() if kind == "a folder" else (copy / CARD).symlink_to(copy / CARD)
    result = CliRunner().invoke(inference.main, ["--model", str(copy), "--max-new-tokens", "3", "What is 1 + 1?"])
    assert result.exit_code == 0 or refusal(result, CARD)
