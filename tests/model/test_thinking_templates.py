"""Chat templates of thinking models: variables, a <think> at the end of each prompt, removed thinking, a date."""

import inspect
import json
import shutil
from datetime import datetime

import pytest
import torch
from click.testing import CliRunner

import inference
import train_grpo
from grpo.diagnostics.groups import nothing_to_learn
from grpo.diagnostics.snapshot import RunSnapshot
from grpo.launch.check import wrong_answer
from grpo.model.chat_template import check_template_args, fix_date, opening_of, task_for
from grpo.model.language_model import render
from grpo.model.loading import load
from grpo.model_card import read_card
from grpo.setting import RESERVED_TEMPLATE_ARGS, parse_template_args
from tasks.arithmetic import Arithmetic
from tasks.base import asked
from tasks.common.shots import solved_problem, with_shots
from tests.helpers.runs import a_tiny_model, options
from tests.tasks.test_mixture import mixture

CPU = torch.device("cpu")
CHAT = Arithmetic().messages("What is (4 - 9) * 6?")
TURNS = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' -}}{%- endfor -%}"
)
ASSISTANT = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
OPENS = TURNS + ASSISTANT + "{{- '<think>\n' -}}{%- endif -%}"
SWITCH = "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
OPENS_UNLESS = OPENS.replace(
    "{{- '<think>\n' -}}", "{%- if enable_thinking | default(true) -%}{{- '<think>\n' -}}{%- endif -%}"
)
SWITCHES = TURNS + ASSISTANT + SWITCH + "{%- endif -%}"
REMOVES = SWITCHES.replace(
    "m['content']", "(m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'])"
)
REMOVES_ALL = SWITCHES.replace("m['content']", "m['content'].split('</think>')[-1]")
DATED = "{{- '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '<|im_end|>\n' -}}" + SWITCHES


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Make folders of one tiny model with each of the chat templates, by name."""
    root = tmp_path_factory.mktemp("thinking")
    made = {}
    for name, template in {
        "opens": OPENS,
        "opens_unless": OPENS_UNLESS,
        "switches": SWITCHES,
        "removes": REMOVES,
        "dated": DATED,
    }.items():
        made[name] = shutil.copytree(made["opens"], root / name) if made else a_tiny_model(root / name)
        (made[name] / "chat_template.jinja").write_text(template, encoding="utf-8")
    return made


def thinking(**settings):
    """Return the arithmetic task in the style that asks for thinking."""
    return Arithmetic(style="think", **settings)


# --- variables of the template ---


def test_a_variable_of_the_template_reaches_every_prompt(folders):
    for args, end in (((), "assistant\n"), (("enable_thinking=false",), "</think>\n\n")):
        lm = load(str(folders["switches"]), CPU, template_args=args)
        assert lm.decode(lm.prompts([CHAT]))[0].endswith(end)


def test_a_run_keeps_the_variables_and_inference_asks_alike(folders, tmp_path, monkeypatch):
    args = options(output_dir=tmp_path, model=folders["switches"], num_iterations=2)
    result = CliRunner().invoke(train_grpo.main, [*args, "--chat-template-arg", "enable_thinking=false"])
    assert result.exit_code == 0, result.output
    saved = str(tmp_path / "saved_model")
    card = read_card(saved)
    assert card["settings"]["chat_template_arg"] == ["enable_thinking=false"]
    loaded = []
    monkeypatch.setattr(
        "grpo.model.loading.load", lambda *args, **more: loaded.append(load(*args, **more)) or loaded[-1]
    )
    monkeypatch.setattr(
        "grpo.evaluation.model_comparison.load", lambda *a, **m: loaded.append(load(*a, **m)) or loaded[-1]
    )
    for words in (["What is (1 + 0) - 1?", "--compare"], ["--evaluate"]):
        result = CliRunner().invoke(inference.main, ["--model", saved, *words])
        assert result.exit_code == 0, result.output
    assert len(loaded) == 3
    assert all(lm.template_args == {"enable_thinking": False} for lm in loaded)


def test_values_are_json_words_and_numbers_or_texts():
    items = ["a=false", "b=True", "c=3", "d=0.5", "e=null", "f=low", 'g={"x": 1}', "h=", "i=x=y"]
    values = {"a": False, "b": True, "c": 3, "d": 0.5, "e": None, "f": "low", "g": '{"x": 1}', "h": "", "i": "x=y"}
    assert parse_template_args(items) == values


def test_the_names_that_render_a_prompt_are_reserved(starter):
    parameters = inspect.signature(type(starter.tokenizer).apply_chat_template).parameters
    assert set(parameters) - {"kwargs"} <= RESERVED_TEMPLATE_ARGS
    for name in ("messages", "add_generation_prompt", "no name", ""):
        with pytest.raises(ValueError, match="--chat-template-arg"):
            parse_template_args([f"{name}=1"])
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_template_args(["enable_thinking"])


def test_a_variable_that_the_template_does_not_have_ends_the_run_in_one_line(starter, model, tmp_path):
    check_template_args(starter.tokenizer, [])
    args = options(output_dir=tmp_path, model=model)
    result = CliRunner().invoke(train_grpo.main, [*args, "--chat-template-arg", "enable_thinking=false"])
    assert result.exit_code == 1
    assert "sets enable_thinking, but the model's chat template does not use it" in result.stderr


@pytest.mark.parametrize("value", ["enable_thinking=false", [3], {"a": 1}])
def test_a_card_with_bad_variables_is_refused(folders, tmp_path, value):
    folder = shutil.copytree(folders["switches"], tmp_path / "m")
    (folder / "grpo.json").write_text(json.dumps({"settings": {"chat_template_arg": value}}), encoding="utf-8")
    result = CliRunner().invoke(inference.main, ["--model", str(folder), "What is (1 + 0) - 1?"])
    assert result.exit_code == 1
    assert "has an invalid 'settings'" in result.stderr


# --- a <think> at the end of each prompt ---


def test_the_think_that_ends_the_prompt_is_a_part_of_the_form(folders):
    lm = load(str(folders["opens"]), CPU)
    assert opening_of(lm) == "<think>\n"
    task = task_for(lm, thinking())
    problem, completion = solved_problem(task, 0, 1, 0)
    assert completion == f"{problem.working}</think><answer>{problem.answer}</answer>"  # SFT trains on it
    assert task.grade(problem, completion).well_formed
    assert not task.grade(problem, f"<think>{completion}").well_formed  # two tags
    assert not thinking().grade(problem, completion).well_formed  # as for another template
    assert not task.grade(problem, wrong_answer(task, problem)).correct
    assert asked(task)["opening"] == "<think>\n"
    assert inference.parsed(completion, "think", "integer", "<think>\n") == f"answer {problem.answer}"


@pytest.mark.parametrize("style", ["answer", "reasoning"])
def test_another_style_begins_after_the_thinking_that_the_prompt_has_begun(folders, style):
    task = task_for(load(str(folders["opens"]), CPU), Arithmetic(style=style))
    problem, completion = solved_problem(task, 0, 1, 0)
    assert completion.startswith("</think>")
    assert task.grade(problem, "Hm." + completion).well_formed
    assert task.grade(problem, completion.removeprefix("</think>")).well_formed == (style == "answer")


def test_a_task_stays_as_it_is_if_the_template_changes_nothing(folders, starter):
    for lm in (starter, load(str(folders["switches"]), CPU), load(str(folders["removes"]), CPU)):
        for task in (thinking(), with_shots(Arithmetic(), 2)):
            assert task_for(lm, task) is task
    switched_off = load(str(folders["switches"]), CPU, template_args=["enable_thinking=false"])
    assert opening_of(switched_off) == ""  # the prompt ends with thinking that is closed already


def test_a_look_names_thinking_and_tries_the_template_without_it(folders, tmp_path):
    for name, more in (("opens_unless", {}), ("opens", {}), ("opens_unless", {"prompt_style": "think"})):
        args = options(output_dir=tmp_path / name, model=folders[name], max_new_tokens=4, **more)
        result = CliRunner().invoke(train_grpo.main, [*args, "--check"])
        assert result.exit_code == 0, result.output
        rows = [line for line in result.stdout.splitlines() if line.startswith("  enable_thinking=false")]
        assert len(rows) == (name == "opens_unless" and not more)


@pytest.mark.parametrize("truncated", [0.0, 1.0])
def test_the_finding_names_the_switch_if_completions_begin_with_think(truncated):
    shares = {"teaching": 0.0, "all_right": 0.0, "well_formed": 0.0, "truncated": truncated, "thinking": 0.75}
    outlook = {"groups": 8, "num_generations": 8, **shares}

    def text(outlook, style="answer"):
        run = RunSnapshot({"prompt_style": style}, [], [], [], "float32", outlook, before_sft=None)
        return nothing_to_learn(run)[1]

    assert "75% of the completions begin with <think>" in text(outlook)
    assert "--chat-template-arg enable_thinking=false" in text(outlook)
    assert "enable_thinking" not in text(outlook, "think")
    assert "enable_thinking" not in text({**outlook, "thinking": 0.25})
    assert "enable_thinking" not in text({name: share for name, share in outlook.items() if name != "thinking"})


# --- thinking that is removed from earlier turns ---


def test_examples_that_the_template_changes_go_into_the_system_prompt(folders):
    lm = load(str(folders["removes"]), CPU)
    meant = with_shots(thinking(), 2)
    task = task_for(lm, meant)
    assert task.examples == ()
    [note] = task.notes
    assert "system prompt" in note
    prompt = render(lm.tokenizer, task.messages("What is (4 - 9) * 6?"), add_generation_prompt=True)
    for message in meant.examples:
        assert message["content"] in prompt
        assert message["content"] not in render(lm.tokenizer, meant.messages("?")) or message["role"] == "user"
    assert prompt.count("<|im_start|>user") == 1
    assert task_for(lm, task) is task
    lm.tokenizer.chat_template = REMOVES_ALL
    assert task_for(lm, meant).examples == meant.examples
    assert "and in the system prompt" in task_for(lm, meant).notes[0]


def test_each_task_of_a_mixture_has_its_opening_and_its_examples(folders):
    for name, settings in (("opens", {}), ("removes", {"shots": 2})):
        before = mixture("arithmetic=1", "reverse=1", prompt_style="think", **settings)
        task = task_for(load(str(folders[name]), CPU), before)
        if name == "opens":
            assert {part.opening for part in (task, *task.parts.values())} == {"<think>\n"}
            assert task.notes == before.notes
        else:
            assert [part.examples for part in (task, *task.parts.values())] == [()] * 3
            assert [note.partition(":")[0] for note in task.notes] == ["arithmetic", "reverse"]


def test_a_saved_model_is_asked_with_the_examples_in_its_system_prompt(folders, tmp_path):
    args = options(output_dir=tmp_path, model=folders["removes"], num_iterations=2, prompt_style="think", shots=1)
    result = CliRunner().invoke(train_grpo.main, args)
    assert result.exit_code == 0, result.output
    assert "so they are in the system prompt instead" in " ".join(result.output.split())
    card = read_card(str(tmp_path / "saved_model"))
    assert card["examples"] == []
    assert card["system_prompt"].count("Example:\n") == 1


# --- a date ---


def test_a_prompt_is_the_same_on_every_day(folders, monkeypatch):
    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 5, 6)

    def prompt():
        lm = load(str(folders["dated"]), CPU)
        assert [note for note in lm.notes if "always 2026-01-01" in note]
        return lm.decode(lm.prompts([CHAT]))[0]

    before = prompt()
    assert "Today is 01 January 2026" in before
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    assert prompt() == before
    tokenizer = load(str(folders["dated"]), CPU).tokenizer
    assert "strftime_now" not in tokenizer.chat_template  # so a saved model has the same prompts everywhere
    assert fix_date(tokenizer) == ""
