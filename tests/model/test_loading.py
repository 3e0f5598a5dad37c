"""Loading: the bundled starter, folders and Hub models that are not there, dropout switched off."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import are_progress_bars_disabled
from transformers import FalconConfig, FalconForCausalLM
from transformers.utils import logging as transformers_logging

from grpo.algorithm.reference import frozen_copy
from grpo.model import loading
from grpo.model.language_model import encode_chat
from grpo.model.loading import load, switch_off_dropout
from grpo.model_card import STARTER
from tasks.arithmetic import Arithmetic
from tests.helpers import zoo

CPU = torch.device("cpu")
CHAT = Arithmetic().messages("What is (4 - 9) * 6?")


def test_the_starter_is_float32_small_and_without_dropout(starter):
    assert {p.dtype for p in starter.model.parameters()} == {torch.float32}
    assert not starter.model.training
    assert sum(f.stat().st_size for f in STARTER.iterdir()) < 6_000_000


def test_the_loaded_tokenizer_is_the_one_it_was_trained_with(starter):
    # transformers may silently load another class than the saved one, as it does for Qwen2-shaped folders.
    tokens = starter.tokenizer.convert_ids_to_tokens(encode_chat(starter.tokenizer, CHAT))
    assert "assistant" in tokens
    assert "<answer>" in tokens
    assert len(tokens) < 45
    text = "Spell naïve ٤٢ 日本 \U0001f600\n backwards."
    assert starter.tokenizer.decode(starter.tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", ["Qwen/no-such-model", "no-such-folder", "./no/such/folder", "/no/such/folder"])
def test_a_model_that_is_not_there_gets_one_line(name):
    with pytest.raises(ValueError, match="cannot load model") as error:
        load(name, CPU)
    assert "\n" not in str(error.value)
    assert "no such folder" in str(error.value)


def test_a_folder_without_a_model_gets_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot load the model in folder") as error:
        load(str(tmp_path), CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["gpt2", "falcon"])
def test_train_mode_computes_what_eval_mode_does(kind):
    if kind == "gpt2":  # it has dropout modules
        model = zoo.random_model("gpt2", vocab_size=50)
    else:  # it reads its configuration in each forward pass
        config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
        model = FalconForCausalLM(FalconConfig(**config, hidden_dropout=0.5, attention_dropout=0.5))
    ids = torch.arange(12)[None]
    expected = model.eval()(ids).logits
    assert not torch.equal(model.train()(ids).logits, expected)
    rates = switch_off_dropout(model)
    assert torch.equal(model.train()(ids).logits, expected)
    assert torch.equal(frozen_copy(model).train()(ids).logits, expected)
    assert {"attn_pdrop", "embd_pdrop", "resid_pdrop"} <= set(rates) or rates["attention_dropout"] == 0.5


# --- the Hub ---


def hub_error(kind, status):
    """Return an error as the Hub's client raises it."""
    return kind("said the Hub", response=SimpleNamespace(status_code=status, headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "word", "requests"),
    [
        (ConnectionError("no route"), "cannot be reached", 2),
        (TimeoutError(), "cannot be reached", 2),
        (hub_error(GatedRepoError, 403), "hf auth login", 1),
        (hub_error(RepositoryNotFoundError, 404), "misspelled", 1),
    ],
    ids=["offline", "slow", "gated", "missing"],
)
def test_why_a_model_is_unavailable_takes_few_requests_and_one_line(error, word, requests, monkeypatch):
    requests_made = []

    def answer(url, timeout):
        requests_made.append((url, timeout))
        raise error

    monkeypatch.setattr(loading, "is_offline_mode", lambda: False)
    monkeypatch.setattr(loading, "get_hf_file_metadata", answer)
    monkeypatch.setattr(loading.time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="cannot load model owner/model") as line:
        load("owner/model", CPU)
    assert word in str(line.value)
    assert "\n" not in str(line.value)
    assert len(requests_made) == requests
    assert requests_made[0][0].endswith("/owner/model/resolve/main/config.json")


def test_a_hub_in_trouble_is_left_to_the_library(monkeypatch, capsys):
    def answer(url, timeout):
        raise hub_error(HfHubHTTPError, 503)

    monkeypatch.setattr(loading, "is_offline_mode", lambda: False)
    monkeypatch.setattr(loading, "get_hf_file_metadata", answer)
    with pytest.raises(ValueError, match="from the Hugging Face Hub: "):
        load("owner/model", CPU)
    assert capsys.readouterr().err == "Downloading owner/model from the Hugging Face Hub\n"


def test_bars_are_shown_for_downloads_and_not_for_weights():
    assert not are_progress_bars_disabled()
    assert transformers_logging.tqdm(range(3)).disable
