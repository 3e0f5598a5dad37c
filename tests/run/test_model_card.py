"""The card in a model's folder, and where a setting comes from: command line, card, default."""

import json
from dataclasses import fields, replace

import pytest

from grpo import model_card
from grpo.config import NOT_INHERITED, TrainConfig
from grpo.model_card import CARD, RECIPES, STARTER, model_folder, read_card, recipe_of, resolve
from tasks.common.prompts import STYLE_TOKENS, STYLES
from tasks.registry import make_task

FIELDS = {f.name: f for f in fields(TrainConfig)}


def folder_with_card(folder, card):
    """Make a model folder with nothing but a `grpo.json`: a text as it is, anything else as JSON."""
    folder.mkdir(exist_ok=True)
    (folder / CARD).write_text(card if isinstance(card, str) else json.dumps(card), encoding="utf-8")
    return str(folder)


def test_the_command_line_comes_before_the_models_card_and_that_before_the_default(tmp_path):
    model = folder_with_card(tmp_path / "m", {"settings": {"batch_size": 3, "beta": 0.5}})
    config = resolve({"model": model, "batch_size": 7})
    assert config.batch_size == 7  # the given value overrides the card
    assert config.beta == 0.5  # the value on the card
    assert config.epsilon == FIELDS["epsilon"].default  # neither given nor on the card
    assert config.model == model


def test_a_value_given_on_the_command_line_counts_even_where_it_is_the_default(tmp_path):
    model = folder_with_card(tmp_path / "m", {"settings": {"batch_size": 3, "beta": 0.5}})
    config = resolve({"model": model, "batch_size": FIELDS["batch_size"].default, "beta": FIELDS["beta"].default})
    assert config.batch_size == FIELDS["batch_size"].default
    assert config.beta == FIELDS["beta"].default


def test_a_folder_without_a_card_and_a_hub_id_have_the_defaults(tmp_path):
    (tmp_path / "m").mkdir()
    for model in (str(tmp_path / "m"), "Qwen/Qwen2.5-0.5B-Instruct"):
        assert resolve({"model": model}) == TrainConfig(model=model)


@pytest.mark.parametrize("card", [{}, {"settings": {}}, {"task": "arithmetic", "settings": {}, "more": [1]}])
def test_a_card_without_settings_leaves_the_defaults(tmp_path, card):
    model = folder_with_card(tmp_path / "m", card)
    assert resolve({"model": model}) == TrainConfig(model=model)


def test_the_starter_is_the_default_and_brings_settings_of_its_own():
    config = resolve({})
    assert config.model == "starter"
    assert config == resolve({"model": "starter"})
    own = json.loads((RECIPES / "starter.json").read_text(encoding="utf-8"))["settings"]
    assert own
    assert {name: getattr(config, name) for name in own} == own
    assert resolve({"num_iterations": 2}).num_iterations == 2
    assert model_folder("starter") == STARTER
    assert read_card("starter")["settings"] == own


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.json")), ids=lambda path: path.stem)
def test_a_recipe_is_for_the_models_it_names_and_the_command_line_overrides_it(path):
    recipe = json.loads(path.read_text(encoding="utf-8"))
    assert set(recipe) == {"models", "settings", "tried"}
    assert path.stem in recipe["models"]
    assert recipe["tried"]  # the other settings that were measured, with figures
    assert not set(recipe["settings"]) & set(NOT_INHERITED)
    for model in recipe["models"]:
        assert recipe_of(model) == path
        config = resolve({"model": model})
        assert {name: getattr(config, name) for name in recipe["settings"]} == recipe["settings"]
        assert resolve({"model": model, "num_iterations": 30}).num_iterations == 30
        assert resolve({"model": model, "prompt_style": "think"}).max_new_tokens == STYLE_TOKENS["think"]


def test_a_folder_has_no_recipe(tmp_path):
    model = folder_with_card(tmp_path / "smollm2", {"settings": {"batch_size": 3}})
    assert recipe_of(model) is None
    assert resolve({"model": model}).batch_size == 3


def test_a_setting_that_does_not_go_with_those_of_the_recipe_is_refused_in_one_line(tmp_path, monkeypatch):
    recipe = {"models": ["some/model"], "settings": {"warmup_steps": 5, "num_iterations": 9}, "tried": []}
    (tmp_path / "some.json").write_text(json.dumps(recipe), encoding="utf-8")
    monkeypatch.setattr(model_card, "RECIPES", tmp_path)
    assert resolve({"model": "some/model"}).warmup_steps == 5
    with pytest.raises(ValueError, match=r"--warmup-steps is 5.*some\.json") as caught:
        resolve({"model": "some/model", "num_iterations": 3})
    assert "\n" not in str(caught.value)


def test_a_models_card_does_not_say_which_model_it_is_or_where_to_write(tmp_path):
    # A folder may come from somebody else: its card must not send the run's output elsewhere.
    for name, value in (("output_dir", str(tmp_path / "elsewhere")), ("model", "another")):
        model = folder_with_card(tmp_path / "m", {"settings": {name: value}})
        try:
            config = resolve({"model": model})
        except ValueError:
            continue  # a refusal is also right
        assert config.model == model
        assert config.output_dir == FIELDS["output_dir"].default


@pytest.mark.parametrize(
    ("style_of_card", "limit_of_card", "given", "expected"),
    [
        (None, None, {}, 16),
        (None, None, {"prompt_style": "think"}, 128),
        (None, None, {"prompt_style": "reasoning"}, 256),
        (None, None, {"prompt_style": "reasoning", "max_new_tokens": 9}, 9),  # given
        (None, 22, {}, 22),  # a card without a style has the default style
        (None, 22, {"prompt_style": "think"}, 128),  # the limit on the card belongs to another style
        ("think", 99, {}, 99),
        ("think", 99, {"prompt_style": "think"}, 99),
        ("think", 99, {"prompt_style": "answer"}, 16),
        ("think", None, {}, 128),
        ("think", 99, {"prompt_style": "answer", "max_new_tokens": 5}, 5),
    ],
)
def test_the_token_limit_follows_the_style_unless_it_is_given(
    tmp_path, style_of_card, limit_of_card, given, expected
):
    settings = {"prompt_style": style_of_card, "max_new_tokens": limit_of_card}
    settings = {name: value for name, value in settings.items() if value is not None}
    model = folder_with_card(tmp_path / "m", {"settings": settings})
    assert resolve({"model": model, **given}).max_new_tokens == expected
    assert tuple(STYLE_TOKENS) == STYLES


@pytest.mark.parametrize(
    ("model", "given", "expected"),
    [
        ("some/model", {}, 256),
        ("some/model", {"prompt_style": "think"}, 256),
        ("some/model", {"max_new_tokens": 16}, 16),
        ("some/model", {"task": ("gsm8k=0.5", "arithmetic=0.5")}, 256),
        ("some/model", {"task": ("jsonl=0.5", "arithmetic=0.5")}, 16),
        ("smollm2", {}, 256),  # the limit of its recipe belongs to another task
        ("starter", {}, 22),  # it has 512 positions
    ],
)
def test_gsm8k_has_a_token_limit_that_holds_its_workings(model, given, expected, tmp_path):
    config = resolve({"model": model, "task": "gsm8k", **given})
    assert config.max_new_tokens == expected
    own = folder_with_card(tmp_path / "m", {"settings": {"task": "gsm8k", "max_new_tokens": 99}})
    assert resolve({"model": own}).max_new_tokens == resolve({"model": own, "task": "gsm8k"}).max_new_tokens == 99
    assert resolve({"model": own, "task": "reverse"}).max_new_tokens == 99


def test_a_system_prompt_and_rewards_of_a_card_are_for_its_own_style_and_task(tmp_path):
    own = {"system_prompt": "Say it.", "reward": ["exact=1"]}
    model = folder_with_card(tmp_path / "m", {"settings": own})
    for given, kept in (
        ({}, True),
        ({"seed": 1}, True),
        ({"prompt_style": "think"}, False),
        ({"task": "reverse"}, False),
    ):
        config = resolve({"model": model, **given})
        assert (config.system_prompt, config.reward) == (("Say it.", ("exact=1",)) if kept else ("", ()))


def test_a_trained_model_keeps_the_wording_that_it_was_trained_with(tmp_path):
    assert resolve({"model": "starter"}).prompt_wording == "plain"
    assert make_task(resolve({"model": "starter"})).system_prompt == read_card("starter")["system_prompt"]
    of_older_version = folder_with_card(tmp_path / "older", {"system_prompt": "Say it.", "settings": {}})
    assert resolve({"model": of_older_version}).prompt_wording == "plain"
    of_this_version = folder_with_card(
        tmp_path / "this", {"system_prompt": "Say it.", "settings": {"prompt_wording": "example"}}
    )
    assert resolve({"model": of_this_version}).prompt_wording == "example"
    untrained = tmp_path / "hub"
    untrained.mkdir()
    config = resolve({"model": str(untrained)})
    assert (
        make_task(config).system_prompt == "Answer with the result inside <answer> tags, like <answer>...</answer>."
    )
    assert make_task(replace(config, system_prompt="Say it.")).system_prompt == "Say it."


def test_a_run_of_an_older_version_has_the_first_wording():
    older = {name: value for name, value in TrainConfig().to_dict().items() if name != "prompt_wording"}
    assert TrainConfig(prompt_wording="plain").conflicting_settings(older) == []
    assert TrainConfig().conflicting_settings(older) == ["--prompt-wording plain (now form)"]


def test_a_models_card_can_name_no_file_that_would_be_read_or_run(tmp_path):
    for settings in ({"data": "problems.jsonl"}, {"reward": ["exact=1", "evil.py:f=1"]}, {"reward": ["x:f=1"]}):
        model = folder_with_card(tmp_path / "m", {"settings": settings})
        with pytest.raises(ValueError, match=CARD) as caught:
            resolve({"model": model})
        assert "\n" not in str(caught.value)


def test_a_saved_model_hands_on_its_rewards_but_none_in_a_file(tmp_path):
    rewards = ("exact=1", "length=0.1")
    assert TrainConfig(reward=rewards).inheritable_settings()["reward"] == list(rewards)
    assert TrainConfig(reward=(*rewards, "mine.py:f=1")).inheritable_settings()["reward"] == []
    model = folder_with_card(tmp_path / "m", {"settings": TrainConfig(reward=rewards).inheritable_settings()})
    assert resolve({"model": model}).reward == rewards
    assert resolve({"model": model, "reward": ("close=1",)}).reward == ("close=1",)


# --- a card that cannot be used ---


def test_a_setting_that_this_version_does_not_know_is_refused_by_name(tmp_path):
    model = folder_with_card(tmp_path / "m", {"settings": {"learning_rat": 1e-5, "batch_size": 2}})
    with pytest.raises(ValueError, match="learning_rat") as caught:
        resolve({"model": model})
    assert CARD in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_value_in_a_card_is_refused_by_name_and_can_be_overridden(tmp_path):
    model = folder_with_card(tmp_path / "m", {"settings": {"num_generations": 1}})
    with pytest.raises(ValueError, match="--num-generations"):
        resolve({"model": model})
    assert resolve({"model": model, "num_generations": 2}).num_generations == 2


@pytest.mark.parametrize(
    "card",
    ["", "{", '{"settings": {"batch_size": 2}', "not JSON", "[]", "5", "null", '"settings"', "\x00"]
    + [{"settings": wrong} for wrong in ([], None, 5, "batch_size", [["batch_size", 2]])],
    ids=str,
)
def test_a_damaged_card_is_refused_in_one_line_that_names_the_file(tmp_path, card):
    model = folder_with_card(tmp_path / "m", card)
    with pytest.raises(ValueError, match=CARD) as caught:
        resolve({"model": model})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", bytes(range(256)), b"[" * 100_000])
def test_a_card_that_is_not_text_or_is_nested_without_end_is_refused_too(tmp_path, content):
    model = folder_with_card(tmp_path / "m", "")
    (tmp_path / "m" / CARD).write_bytes(content)
    with pytest.raises(ValueError, match=CARD):
        resolve({"model": model})


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "~"], ids=["too long", "NUL", "tilde"])
def test_a_name_that_no_folder_can_have_is_that_of_no_folder(name):
    # The system call itself refuses such a name; the user should read that there is no such model.
    assert model_folder(name) is None
    assert read_card(name) == {}
