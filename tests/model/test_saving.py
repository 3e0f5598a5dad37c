"""Saved folders: they load again with the same output, replace older folders, and suit other programs."""

import json

import torch

from grpo.model.loading import load
from grpo.model.saving import SENTENCEPIECE, save
from grpo.model_card import read_card
from tasks.arithmetic import Arithmetic
from tests.helpers import zoo
from tests.helpers.generation import greedy_texts

CPU = torch.device("cpu")
CHAT = Arithmetic().messages("What is (4 - 9) * 6?")


def test_a_saved_model_loads_again_with_the_same_output(starter, tmp_path):
    card = {"settings": {"learning_rate": 1e-5}}
    save(tmp_path / "m", starter, card, "# card\n")
    again = load(str(tmp_path / "m"), CPU)
    for (name, a), (_, b) in zip(starter.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert greedy_texts(again, [CHAT], 22) == greedy_texts(starter, [CHAT], 22)
    assert again.end_ids == starter.end_ids
    assert read_card(str(tmp_path / "m")) == card
    assert (tmp_path / "m" / "README.md").read_text() == "# card\n"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_saved_folder_says_what_older_versions_look_for(starter, tmp_path):
    save(tmp_path / "m", starter, {}, "")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["torch_dtype"] == "float32"
    tokenizer = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in tokenizer


def test_saving_again_replaces_the_folder(starter, tmp_path):
    save(tmp_path / "m", starter, {"a": 1}, "")
    save(tmp_path / "m", starter, {"a": 2}, "")
    assert read_card(str(tmp_path / "m")) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_saving_passes_on_the_file_that_llama_cpp_converts_gemma_by(tmp_path):
    folder = zoo.build(tmp_path / "m", "gemma3")
    (folder / SENTENCEPIECE).write_bytes(b"pieces")
    save(tmp_path / "saved", load(str(folder), CPU), {}, "")
    assert (tmp_path / "saved" / SENTENCEPIECE).read_bytes() == b"pieces"
