"""The settings of a run: each stands once, is checked, and comes from the right place."""

import json
import math
from dataclasses import FrozenInstanceError, fields

import pytest

from grpo.config import CARD, DEVICES, STARTER, TrainConfig, model_folder, read_card, resolve
from tasks.base import TASKS
from tasks.prompts import STYLE_TOKENS, STYLES

FIELDS = {f.name: f for f in fields(TrainConfig)}
GROUPS = {"Model", "Task", "Algorithm", "Variants and schedules", "Evaluation and output"}


def folder_with_card(folder, card):
    """A model folder with nothing but a `grpo.json`: text as it is, anything else as JSON."""
    folder.mkdir(exist_ok=True)
    (folder / CARD).write_text(card if isinstance(card, str) else json.dumps(card), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_has_a_group_a_meaning_and_a_default_that_passes_its_own_check(name):
    field = FIELDS[name]
    assert field.metadata["group"] in GROUPS
    assert len(field.metadata["meaning"]) > 5
    assert field.type in (int, float, str, bool, tuple[str, ...])
    assert isinstance(field.default, tuple if name == "reward" else field.type)
    assert getattr(TrainConfig(), name) == field.default
    if field.metadata["choices"]:
        assert field.default in field.metadata["choices"]


def test_the_defaults_are_the_published_ones():
    # DESIGN, section 4: the arithmetic experiment that this project rebuilds.
    config = TrainConfig()
    published = {"learning_rate": 1e-7, "batch_size": 4, "num_generations": 8, "max_new_tokens": 16}
    published |= {"num_iterations": 2000, "beta": 0.04, "epsilon": 0.2, "num_inner_updates": 5}
    published |= {"clip_grad_norm": 0.5, "temperature": 1.0, "max_operand": 10}
    assert {name: getattr(config, name) for name in published} == published


def test_a_configuration_cannot_be_changed_and_is_plain_json():
    config = TrainConfig(seed=3)
    with pytest.raises(FrozenInstanceError):
        config.seed = 4
    assert json.loads(json.dumps(config.to_dict(), allow_nan=False)) == config.to_dict()
    assert TrainConfig(**config.to_dict()) == config


def test_what_a_saved_model_hands_on_leaves_out_place_model_and_seed():
    passed = TrainConfig(seed=3, output_dir="here", num_generations=4).passed_on()
    assert set(FIELDS) - set(passed) == {"model", "device", "deterministic", "seed", "data", "track"} | {
        "cuda_graphs",
        "shard",
        "output_dir",
        "time_limit",
    }
    assert passed["num_generations"] == 4


# --- where a setting comes from ---


def test_the_command_line_comes_before_the_models_card_and_that_before_the_default(tmp_path):
    model = folder_with_card(tmp_path / "m", {"settings": {"batch_size": 3, "beta": 0.5}})
    config = resolve({"model": model, "batch_size": 7})
    assert config.batch_size == 7  # given, though the card has it
    assert config.beta == 0.5  # of the card
    assert config.epsilon == FIELDS["epsilon"].default  # of neither
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
    own = json.loads((STARTER / CARD).read_text(encoding="utf-8"))["settings"]
    assert own
    assert {name: getattr(config, name) for name in own} == own
    assert resolve({"num_iterations": 2}).num_iterations == 2
    assert model_folder("starter") == STARTER
    assert read_card("starter")["settings"] == own


def test_a_models_card_does_not_say_which_model_it_is_or_where_to_write(tmp_path):
    # A folder may come from somebody else: its card must not send the run's output elsewhere.
    for name, value in (("output_dir", str(tmp_path / "elsewhere")), ("model", "another")):
        model = folder_with_card(tmp_path / "m", {"settings": {name: value}})
        try:
            config = resolve({"model": model})
        except ValueError:
            continue  # refused is well too
        assert config.model == model
        assert config.output_dir == FIELDS["output_dir"].default


@pytest.mark.parametrize(
    ("style_of_card", "limit_of_card", "given", "expected"),
    [
        (None, None, {}, 16),
        (None, None, {"prompt_style": "think"}, 128),
        (None, None, {"prompt_style": "reasoning"}, 256),
        (None, None, {"prompt_style": "reasoning", "max_new_tokens": 9}, 9),  # given
        (None, 22, {}, 22),  # a card that names no style is of the first
        (None, 22, {"prompt_style": "think"}, 128),  # that limit was for another style
        ("think", 99, {}, 99),
        ("think", 99, {"prompt_style": "think"}, 99),
        ("think", 99, {"prompt_style": "answer"}, 16),
        ("think", None, {}, 128),
        ("think", 99, {"prompt_style": "answer", "max_new_tokens": 5}, 5),
    ],
)
def test_the_token_limit_follows_the_style_unless_it_is_said(tmp_path, style_of_card, limit_of_card, given, expected):
    settings = {"prompt_style": style_of_card, "max_new_tokens": limit_of_card}
    settings = {name: value for name, value in settings.items() if value is not None}
    model = folder_with_card(tmp_path / "m", {"settings": settings})
    assert resolve({"model": model, **given}).max_new_tokens == expected
    assert tuple(STYLE_TOKENS) == STYLES


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


def test_a_models_card_can_name_no_file_that_would_be_read_or_run(tmp_path):
    for settings in ({"data": "problems.jsonl"}, {"reward": ["exact=1", "evil.py:f=1"]}, {"reward": ["x:f=1"]}):
        model = folder_with_card(tmp_path / "m", {"settings": settings})
        with pytest.raises(ValueError, match=CARD) as caught:
            resolve({"model": model})
        assert "\n" not in str(caught.value)


def test_a_saved_model_hands_on_its_rewards_but_none_of_a_file(tmp_path):
    rewards = ("exact=1", "length=0.1")
    assert TrainConfig(reward=rewards).passed_on()["reward"] == list(rewards)
    assert TrainConfig(reward=(*rewards, "mine.py:f=1")).passed_on()["reward"] == []
    model = folder_with_card(tmp_path / "m", {"settings": TrainConfig(reward=rewards).passed_on()})
    assert resolve({"model": model}).reward == rewards
    assert resolve({"model": model, "reward": ("close=1",)}).reward == ("close=1",)


def test_a_setting_that_an_earlier_version_did_not_have_counts_as_its_default():
    earlier = {name: value for name, value in TrainConfig().to_dict().items() if name not in ("task", "reward")}
    assert TrainConfig().differences(earlier) == []
    assert TrainConfig(task="reverse").differences(earlier) == ["task arithmetic (now reverse)"]
    assert len(TrainConfig(reward=("exact=1",)).differences(earlier)) == 1
    assert TrainConfig(reward=("exact=1",)).differences({**earlier, "reward": ["exact=1"]}) == []


# --- what cannot be ---

BAD = [
    ("num_generations", 1),
    ("num_generations", 0),
    ("num_generations", -8),
    ("batch_size", 0),
    ("batch_size", -1),
    ("num_iterations", 0),
    ("num_iterations", -1),
    ("num_inner_updates", 0),
    ("max_new_tokens", 0),
    ("max_new_tokens", -16),
    ("max_operand", 0),
    ("max_operand", -1),
    ("micro_batch_size", -1),
    ("seed", -1),
    ("eval_every", 0),
    ("eval_problems", 0),
    ("eval_problems", -1),
    ("show_every", -1),
    ("temperature", 0),
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("learning_rate", -1e-7),
    ("beta", -0.01),
    ("epsilon", -0.2),
    ("clip_grad_norm", 0.0),
    ("clip_grad_norm", -0.5),
    ("device", "tpu"),
    ("device", "CUDA"),
    ("device", ""),
    ("prompt_style", "essay"),
    ("prompt_style", ""),
    ("task", "chess"),
    ("task", ""),
    ("min_operand", "0"),
    *(("reward", wrong) for wrong in ("exact=1", None, 5, (1,), [None], {"exact": 1})),
    *((name, number) for name, f in FIELDS.items() if f.type is float for number in (math.nan, math.inf, -math.inf)),
    *((name, 10**400) for name, f in FIELDS.items() if f.type is float),  # JSON can say it; a float cannot hold it
    *((name, wrong) for name, f in FIELDS.items() if f.type is float for wrong in ("1", "", None, [1.0], True)),
    *((name, wrong) for name, f in FIELDS.items() if f.type is int for wrong in ("1", 1.5, 2.0, None, [2], True)),
    *((name, wrong) for name, f in FIELDS.items() if f.type is str for wrong in (1, None, ["x"], True, b"x")),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{str(value)[:12]!r}" for name, value in BAD])
def test_a_value_that_cannot_be_is_refused_in_one_line_that_names_it(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        TrainConfig(**{name: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
def test_the_least_and_every_choice_are_allowed(name):
    metadata = FIELDS[name].metadata
    if metadata["least"] is not None:
        assert getattr(TrainConfig(**{name: FIELDS[name].type(metadata["least"])}), name) == metadata["least"]
    for choice in metadata["choices"]:
        assert getattr(TrainConfig(**{name: choice}), name) == choice


def test_the_choices_are_those_that_the_program_knows():
    assert FIELDS["device"].metadata["choices"] == DEVICES
    assert FIELDS["prompt_style"].metadata["choices"] == STYLES
    assert FIELDS["task"].metadata["choices"] == TASKS


def test_a_whole_number_will_do_where_a_fraction_is_asked_for():
    assert TrainConfig(beta=0, temperature=1, learning_rate=0).beta == 0


# --- a model's card that cannot be ---


def test_a_setting_that_this_version_does_not_know_is_refused_by_name(tmp_path):
    model = folder_with_card(tmp_path / "m", {"settings": {"learning_rat": 1e-5, "batch_size": 2}})
    with pytest.raises(ValueError, match="learning_rat") as caught:
        resolve({"model": model})
    assert CARD in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_value_in_a_card_is_refused_by_name_and_can_be_overruled(tmp_path):
    model = folder_with_card(tmp_path / "m", {"settings": {"num_generations": 1}})
    with pytest.raises(ValueError, match="num_generations"):
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
def test_a_card_that_is_not_even_text_or_nested_without_end_is_refused_too(tmp_path, content):
    model = folder_with_card(tmp_path / "m", "")
    (tmp_path / "m" / CARD).write_bytes(content)
    with pytest.raises(ValueError, match=CARD):
        resolve({"model": model})


@pytest.mark.parametrize("name", ["x" * 300, "a\x00b", "~"], ids=["too long", "NUL", "tilde"])
def test_a_name_that_no_folder_can_have_is_not_a_folder(name):
    # The system call itself refuses such a name; what the user should read is that there is no such model.
    assert model_folder(name) is None
    assert read_card(name) == {}
