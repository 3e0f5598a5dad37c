"""Shapes of real models from end to end: prompts, ends of turn, a step of training, a question, the saved folder."""

import json
from pathlib import Path

import pytest
import torch

import inference
import train_grpo
from grpo.model.language_model import encode_chat
from grpo.model.loading import load
from grpo.model.saving import save
from grpo.record.metrics import load_metrics
from tasks.arithmetic import Arithmetic
from tests.helpers import zoo
from tests.helpers.scripts import ask, invoke

CPU = torch.device("cpu")
QUESTION = "What is (4 - 9) * 6?"
SYSTEM = "Give the result as an integer in <answer>...</answer>."
CHAT = Arithmetic().messages(QUESTION)
ONE_STEP = ["--train-anyway", "--num-iterations", 1, "--batch-size", 2, "--num-generations", 2, "--eval-problems", 4]
ONE_STEP += ["--max-new-tokens", 12, "--num-inner-updates", 2, "--learning-rate", 1e-3]

# The prompt of each family of real models.
ASKED = {
    "qwen": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    "llama": f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": f"<bos><start_of_turn>user\n{SYSTEM}\n\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
    "phi": f"<|system|>\n{SYSTEM}<|end|>\n<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n",
    "gpt": f"{SYSTEM}\n\nUser: {QUESTION}\nAssistant:",
}
NOTES = {"gemma": "no system role", "gpt": "base model"}


def family(kind: str) -> str:
    """Return the name of a kind without its version."""
    return kind.rstrip("0123456789")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Write a model folder of each kind."""
    root = tmp_path_factory.mktemp("zoo")
    return {kind: zoo.build(root / kind, kind) for kind in zoo.KINDS}


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_prompts_and_ends_of_turn_are_those_of_the_model(kind, folders):
    lm = load(str(folders[kind]), CPU)
    ids = encode_chat(lm.tokenizer, CHAT)
    assert lm.tokenizer.decode(ids) == ASKED[family(kind)]
    # The control words of the template are single tokens, not spelled out.
    special = lm.tokenizer.convert_tokens_to_ids(
        [t for t in lm.tokenizer.all_special_tokens if t in ASKED[family(kind)]]
    )
    assert all(i in ids for i in special)
    assert set(lm.tokenizer.convert_ids_to_tokens(lm.end_ids)) == set(zoo.KINDS[kind][-1])
    assert (lm.tokenizer.pad_token_id is None) == (kind in ("llama", "llama3", "gpt2"))
    assert lm.pad_id < lm.model.config.vocab_size
    assert [NOTES[family(kind)] in note for note in lm.notes] == [True] * (family(kind) in NOTES)
    text = "Spell naïve ٤٢ 日本 \U0001f600\n backwards."
    assert lm.tokenizer.decode(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_one_step_of_training_and_one_question(kind, folders, tmp_path):
    result = invoke(train_grpo.main, "--model", folders[kind], *ONE_STEP, folder=tmp_path)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "In updates, " not in result.stdout, "all shortcuts of updates are used"
    assert (NOTES.get(family(kind), "\0") in result.stdout) == (family(kind) in NOTES)
    [step] = load_metrics(tmp_path)["steps"]
    assert 0 < step["ratio_min"] <= 1 <= step["ratio_max"]
    assert step["kl"] == pytest.approx(0, abs=1e-6)
    question, answer = ask(QUESTION, folder=tmp_path)
    assert question == QUESTION
    assert answer.endswith("]")

    before, after = load(str(folders[kind]), CPU), load(str(tmp_path / "saved_model"), CPU)
    assert encode_chat(after.tokenizer, CHAT) == encode_chat(before.tokenizer, CHAT)
    assert after.end_ids == before.end_ids
    assert after.notes == ()  # the folder has its chat template now
    assert after.dropout == before.dropout
    result = invoke(inference.main, "--model", "saved_model", "--compare", QUESTION, folder=tmp_path)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_the_saved_folder_says_what_other_programs_read(kind, folders, tmp_path):
    lm = load(str(folders[kind]), CPU)
    save(tmp_path / "m", lm, {}, "")
    before, config = (json.loads((f / "config.json").read_text()) for f in (folders[kind], tmp_path / "m"))
    assert {name: config[name] for name in before if name != "transformers_version"} == {
        name: before[name] for name in before if name != "transformers_version"
    }
    assert config["architectures"] == [type(lm.model).__name__]
    assert config["torch_dtype"] == "float32"
    assert config["vocab_size"] == len(lm.tokenizer)
    rope = config.get("rope_parameters")
    if kind == "gemma3":
        assert config["rope_theta"] == rope["full_attention"]["rope_theta"] == 1e5
        assert config["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"] == 5e3
        assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    elif rope:
        assert config["rope_theta"] == rope["rope_theta"]
    assert set(config.get("rope_scaling", {})) == {
        "llama3": {"rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "phi4": {"type", "short_factor", "long_factor"},
        "gemma3": {"rope_type", "factor"},
    }.get(kind, set())
    assert config.get("partial_rotary_factor") == {"phi3": 1.0, "phi4": 0.75}.get(kind)
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == (list(lm.end_ids) if len(lm.end_ids) > 1 else lm.end_ids[0])
    assert set(generation) <= {"eos_token_id", "bos_token_id", "pad_token_id", "transformers_version"}
    tokenizer = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] in (
        "Qwen2Tokenizer",
        "GemmaTokenizer",
        "GPT2Tokenizer",
        "PreTrainedTokenizerFast",
    )
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & set(tokenizer)

    again = load(str(tmp_path / "m"), CPU)
    ids = torch.tensor([encode_chat(lm.tokenizer, CHAT)])
    assert torch.equal(again.model(ids).logits, lm.model(ids).logits)
