"""Test `train_grpo.py --config FILE.json`: the command line overrides the file, and mistakes in it are named."""

import json

import pytest

import train_grpo
from grpo.config import TrainConfig
from grpo.model_card import resolve
from tests.helpers.scripts import invoke, names_in, refusal


@pytest.fixture
def resolved(monkeypatch, tmp_path):
    """Return a function that calls train_grpo.py with a file, without training, and returns the settings."""
    seen = []
    monkeypatch.setattr(
        train_grpo, "train", lambda launched, check, anyway, accept, trust, config: seen.append(config) or 0
    )

    def call(content, *args):
        (tmp_path / "c.json").write_text(json.dumps(content), encoding="utf-8")
        result = invoke(train_grpo.main, "--config", "c.json", *args, folder=tmp_path)
        assert result.exit_code == 0, result.output
        return seen.pop()

    return call


def test_the_command_line_overrides_the_file_and_the_file_the_recipe(resolved):
    config = resolved({"batch_size": 3, "learning_rate": 1, "reward": ["exact=1"]}, "--batch-size", 5)
    assert config == resolve({"batch_size": 5, "learning_rate": 1, "reward": ("exact=1",)})
    assert config.num_iterations == resolve({}).num_iterations  # the setting of the starter


def test_the_settings_of_a_run_and_its_metrics_file_are_a_file_of_settings(resolved):
    settings = resolve({"max_operand": 7, "task_arg": ()}).to_dict()
    assert resolved(settings).to_dict() == settings
    assert resolved({"schema_version": 1, "config": settings, "steps": []}).to_dict() == settings
    assert resolved({"refresh_reference_every": 4}).ref_model_sync_steps == 4  # as an older version wrote it


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 10**5, "not JSON"),
        ("[1]", "object of settings"),
        ('{"schema_version": 1}', "object of settings"),
        ('{"learnig_rate": 1}', "learnig_rate"),
        ('{"fresh": true}', "fresh"),
        ('{"batch_size": "8"}', "--batch-size"),
        ('{"batch_size": 8.5}', "--batch-size"),
        ('{"batch_size": true}', "--batch-size"),
        ('{"batch_size": null}', "--batch-size"),
        ('{"beta": NaN}', "beta"),
        ('{"seed": -1}', "seed"),
        ('{"model": 5}', "model"),
        ('{"model": ["a"]}', "model"),
        ('{"reward": "exact=1"}', "reward"),
        ('{"reward": [1]}', "reward"),
        ('{"prompt_style": "essay"}', "--prompt-style"),
        ('{"load_in_4bit": true}', "--load-in-4bit"),
        ('{"warmup_steps": 60}', "--warmup-steps"),
        ('{"\\u001b[2J": 1}', "not a setting"),
        (b"\xff\xfe", "not JSON"),
        (None, "cannot be read"),
        (..., "cannot be read"),
    ],
    ids=str,
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(text, said, tmp_path):
    path = tmp_path / "c.json"
    if text is ...:
        path.mkdir()
    elif text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refusal(invoke(train_grpo.main, "--config", "c.json", folder=tmp_path))
    assert said in line
    assert "c.json" in line
    assert line.isprintable()
    assert names_in(tmp_path) <= {"c.json"}


def test_a_mistake_on_the_command_line_is_not_the_files(tmp_path):
    (tmp_path / "c.json").write_text('{"num_iterations": 10}', encoding="utf-8")
    line = refusal(invoke(train_grpo.main, "--config", "c.json", "--warmup-steps", 10, folder=tmp_path))
    assert "--warmup-steps" in line
    assert "c.json" not in line


def test_several_seeds_override_the_one_of_the_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("grpo.launch.seeds.run_seeds", lambda script, *args: seen.append(args) or 0)
    (tmp_path / "c.json").write_text(json.dumps(TrainConfig().to_dict()), encoding="utf-8")
    assert invoke(train_grpo.main, "--config", "c.json", "--seeds", "1,2", folder=tmp_path).exit_code == 0
    [(seeds, given, *flags)] = seen
    assert (seeds, given["batch_size"], "seed" in given) == ([1, 2], 4, False)
    assert flags == [False, False, False, False]
