"""Mistakes in a call of train_grpo.py: one line that names them, and nothing is written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import inference
import train_grpo
from grpo.model_card import CARD
from tests.helpers.scripts import QUESTION, TINY, a_model, invoke, names_in, refusal, snapshot

# One call of each kind. Which values a setting refuses is tested in tests/run/test_config.py
BAD_CALLS = [
    (["--device", "tpu"], "--device"),
    (["--num-generations", "1"], "--num-generations"),
    (["--num-iterations", "-5"], "--num-iterations"),
    (["--num-iterations", "many"], "--num-iterations"),
    (["--num-iterations", "1.5"], "--num-iterations"),
    (["--num-iterations"], "--num-iterations"),
    (["--num-iterations", "1" + "0" * 25], "--num-iterations"),
    (["--learning-rate", "fast"], "--learning-rate"),
    (["--learning-rate", "nan"], "--learning-rate"),
    (["--learning-rate", "-1e-7"], "--learning-rate"),
    (["--task", "chess"], "--task"),
    (["--min-operand", "low"], "--min-operand"),
    (["--learnig-rate", "1"], "--learnig-rate"),
    (["--num-generations", "100000", "--batch-size", "100000"], "--num-generations"),
    (["--warmup-steps", "3", "--num-iterations", "3"], "--warmup-steps"),
    (["--time-limit", "soon"], "--time-limit"),
    (["--load-in-4bit"], "--lora-rank"),
    (["a stray word"], "stray"),
]


@pytest.mark.parametrize(("args", "word"), BAD_CALLS, ids=[" ".join(args) for args, _ in BAD_CALLS])
def test_a_bad_setting_is_refused_by_name_before_anything_is_written(args, word, tmp_path):
    result = invoke(train_grpo.main, *args, folder=tmp_path)
    assert word in refusal(result)
    assert result.exit_code == 2
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_named_with_what_to_do(device, tmp_path):
    if {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip(f"this machine has {device}")
    for result in (
        invoke(train_grpo.main, "--device", device, folder=tmp_path),
        invoke(inference.main, "--device", device, QUESTION, folder=tmp_path),
    ):
        line = refusal(result)
        assert device in line
        assert "--device auto" in line
        assert result.exit_code == 1
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize("place", ["taken", "taken/below", "taken/far/below"])
def test_an_output_folder_that_cannot_be_made_is_named(place, tmp_path):
    (tmp_path / "taken").write_text("a file of the user", encoding="utf-8")
    result = invoke(train_grpo.main, *TINY, "--output-dir", place, folder=tmp_path)
    assert "taken" in refusal(result)
    assert snapshot(tmp_path) == {"taken": b"a file of the user"}


@pytest.mark.parametrize("max_operand", ["10000000", "1" + "0" * 30])
def test_a_range_that_is_too_large_is_refused_or_works(max_operand, tmp_path):
    result = invoke(train_grpo.main, *TINY, "--max-operand", max_operand, folder=tmp_path)
    if result.exit_code:
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1, repr(result.exception)
        assert "--max-operand" in errors[0]


@pytest.mark.parametrize("option", ["--learning-rate", "--epsilon", "--beta", "--clip-grad-norm", "--temperature"])
def test_a_number_too_large_for_float32_is_no_traceback(option, tmp_path):
    result = invoke(train_grpo.main, *TINY, "--num-inner-updates", 1, option, 1e300, folder=tmp_path)
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    if result.exit_code:
        assert len([line for line in result.stderr.splitlines() if line.startswith("Error: ")]) == 1


@pytest.mark.parametrize("name", ["no-such-model", "no-such-owner/no-such-model", "a b", "x" * 300], ids=range(4))
def test_a_model_that_is_neither_here_nor_to_be_had_is_answered_with_the_starter(name, tmp_path):
    for command, args in ((train_grpo.main, TINY), (inference.main, [QUESTION])):
        line = refusal(invoke(command, *args, "--model", name, folder=tmp_path))
        assert name in line
        assert "--model starter" in line
    assert names_in(tmp_path) == set()


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def drop_a_layer(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in sorted(weights) if "mlp" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled_weights(folder):
    # The pickle would run code when it is loaded; only safetensors are.
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGE = {
    "nothing in it": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut short": cut_weights,
    "a layer missing": drop_a_layer,  # transformers would put random numbers in its place
    "pickled weights": pickled_weights,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "an empty config": lambda folder: (folder / "config.json").write_text("{}", encoding="utf-8"),
    "a config cut short": lambda folder: (folder / "config.json").write_text('{"model_type": "ll', encoding="utf-8"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_model_folder_is_refused_by_name(damage, tmp_path):
    damage(a_model(tmp_path / "m"))
    line = refusal(invoke(inference.main, "--model", "m", QUESTION, folder=tmp_path))
    assert "folder m" in line
    assert not line.endswith((":", ": "))  # the reason follows the colon


@pytest.mark.parametrize("card", ["{", '{"max_new_tokens": "x"}', '{"prompt_style": 5}'])
def test_a_malformed_card_is_refused_by_all_who_read_it(card, tmp_path):
    (a_model(tmp_path / "m") / CARD).write_text(card, encoding="utf-8")
    assert CARD in refusal(invoke(train_grpo.main, *TINY, "--model", "m", folder=tmp_path))
    assert CARD in refusal(invoke(inference.main, "--model", "m", QUESTION, folder=tmp_path))
    assert CARD in refusal(invoke(inference.main, "--model", "m", "--compare", QUESTION, folder=tmp_path))


@pytest.mark.parametrize(("shots", "reason"), [(40, "lower --shots"), (10**3, "different training problems")])
def test_more_examples_than_fit_or_than_there_are_get_one_line(shots, reason, tmp_path):
    line = refusal(invoke(train_grpo.main, *TINY, "--max-operand", 2, "--shots", shots, folder=tmp_path))
    assert reason in line
