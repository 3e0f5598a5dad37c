"""An adapter's folder as --model: it is merged into its base model, or one line names the base and the way."""

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError

from grpo.config import TrainConfig
from grpo.model import loading
from grpo.model.loading import load, load_policy, tie_copies
from grpo.model.lora import ADAPTER, ADAPTER_CONFIG, trainable
from grpo.model.saving import save
from tests.helpers import zoo
from tests.helpers.models import tiny_model

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 3, 7]])


@pytest.fixture
def base(tmp_path):
    """Return the folder of a base model."""
    return zoo.build(tmp_path / "base", "qwen2")


def saved_adapter(base, folder, targets="q_proj,down_proj"):
    """Save a model with a random adapter; return the folders of the merged model and of the adapter."""
    pytest.importorskip("peft")
    lm = load_policy(TrainConfig(model=str(base), lora_rank=4, lora_targets=targets), CPU)
    with torch.no_grad():
        for weight in trainable(lm.model).values():
            weight.normal_(std=0.1)
    save(folder / "merged", lm, {}, "")
    return folder / "merged", folder / "merged" / ADAPTER


def refusal(name):
    """Return the error, one line, of a model that cannot be loaded."""
    with pytest.raises(ValueError, match="cannot load") as caught:
        load(str(name), CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder, **entries):
    """Change entries of an adapter's configuration."""
    path = folder / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_an_adapter_is_merged_into_its_base(base, tmp_path):
    merged, adapter = saved_adapter(base, tmp_path)
    expected = load(str(merged), CPU).model(IDS).logits
    torch.testing.assert_close(load(str(adapter), CPU).model(IDS).logits, expected, atol=1e-5, rtol=0)
    assert (load(str(base), CPU).model(IDS).logits - expected).abs().max() > 0.1


def test_an_adapter_without_its_base_names_it(base, tmp_path):
    _, adapter = saved_adapter(base, tmp_path)
    base.rename(tmp_path / "moved")
    line = refusal(adapter)
    assert f"it is an adapter of {base}, which is needed too" in line
    change(adapter, base_model_name_or_path=None)
    assert "does not name its base model" in refusal(adapter)


@pytest.mark.parametrize(
    "entry", [{"use_dora": True}, {"rank_pattern": {"q_proj": 2}}, {"peft_type": "IA3"}], ids=str
)
def test_another_kind_of_adapter_names_the_way_to_merge_it(base, tmp_path, entry):
    _, adapter = saved_adapter(base, tmp_path)
    change(adapter, **entry)
    assert "merge it with peft: PeftModel.from_pretrained" in refusal(adapter)


def test_an_adapter_of_the_hub_is_found_by_its_configuration(base, tmp_path, monkeypatch):
    merged, adapter = saved_adapter(base, tmp_path)

    def download(name, file, **_):
        if not (adapter / file).exists():
            raise EntryNotFoundError("404")
        return str(adapter / file)

    monkeypatch.setattr(loading, "_why_not_on_the_hub", lambda name: "")
    monkeypatch.setattr(loading, "hf_hub_download", download)
    monkeypatch.setattr(loading, "snapshot_download", lambda *args, **options: str(adapter))
    found = load("someone/adapter", CPU).model(IDS).logits
    torch.testing.assert_close(found, load(str(merged), CPU).model(IDS).logits, atol=1e-5, rtol=0)
    shutil.move(base, tmp_path / "moved")
    assert f"it is an adapter of {base}" in refusal("someone/adapter")


def test_an_output_layer_that_repeats_the_embedding_is_tied():
    model = tiny_model("llama")
    inputs = model.get_input_embeddings()
    outputs = model.get_output_embeddings()
    tie_copies(model)
    assert inputs.weight is not outputs.weight  # two different weights
    with torch.no_grad():
        inputs.weight.copy_(outputs.weight + 0.02 * torch.randn_like(outputs.weight))
    expected = outputs.weight.clone()
    tie_copies(model)
    assert inputs.weight is outputs.weight
    assert model.config.tie_word_embeddings
    assert torch.equal(outputs.weight, expected)
