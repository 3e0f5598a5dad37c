"""Save a model folder in the form that transformers 4 and 5, vLLM and llama.cpp's converters read."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import PreTrainedModel

from grpo.model.language_model import LanguageModel
from grpo.model.lora import ADAPTER, has_adapter, merged, trainable
from grpo.model_card import CARD, model_folder
from grpo.runtime.atomic_io import fsync, name_in_errors, restore_interrupted_swap
from grpo.runtime.ranks import ONE, Ranks
from grpo.runtime.sharding import is_sharded

SAVED_MODEL = "saved_model"
SENTENCEPIECE = "tokenizer.model"
KEPT_GENERATION = ("bos_token_id", "pad_token_id", "transformers_version")  # entries of generation_config.json


def save(folder: Path, lm: LanguageModel, card: dict[str, Any], readme: str, ranks: Ranks = ONE) -> None:
    """Write a model folder with its `grpo.json` and README.md, completely or not at all.

    All ranks must call this; rank 0 writes, and the other ranks wait.
    """
    adapted = has_adapter(lm.model)
    adapter = ranks.collect(trainable(lm.model).items()) if adapted else {}
    plain = merged(lm.model, ranks) if adapted or is_sharded(lm.model) else lm.model
    if ranks.is_main:
        _replace_folder(folder, lm, plain, adapter, {CARD: json.dumps(card, indent=2) + "\n", "README.md": readme})
    ranks.barrier()


def _replace_folder(
    folder: Path, lm: LanguageModel, plain: PreTrainedModel, adapter: Mapping[str, Tensor], texts: Mapping[str, str]
) -> None:
    """Write the new folder beside the old one, then exchange the two."""
    fresh = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    restore_interrupted_swap(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with name_in_errors(folder, Exception):  # safetensors and tokenizers raise exceptions of their own
            plain.save_pretrained(fresh)
            if adapter:
                lm.model.save_pretrained(fresh / ADAPTER, state_dict=dict(adapter))
                (fresh / ADAPTER / "README.md").unlink(missing_ok=True)  # peft writes a template without content
            lm.tokenizer.save_pretrained(fresh)
        with name_in_errors(folder):
            _complete_files(fresh, lm.tokenizer.name_or_path, lm.end_ids, lm.dropout)
            for name, text in texts.items():
                (fresh / name).write_text(text, encoding="utf-8")
            for path in (*fresh.rglob("*"), fresh):
                fsync(path)
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
            fsync(folder.parent)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        restore_interrupted_swap(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _complete_files(folder: Path, source: str, end_ids: Sequence[int], dropout: Mapping[str, float]) -> None:
    """Write entries that other programs would silently replace by their own defaults if they were missing.

    The tokenizer comes from `source`, a folder or Hub model. `end_ids` has every id that ends a turn. `dropout` has
    the rates that go back into config.json.
    """
    config = _read_json(folder / "config.json")
    for part in (config, config.get("text_config") or {}):
        part.update(_older_rope(part))
    _write_json(folder / "config.json", config | {"torch_dtype": "float32"} | dropout)

    path = folder / "generation_config.json"
    generation = _read_json(path) if path.is_file() else {}
    # Settings of the base model, such as a repetition penalty, would change the answers that were measured.
    generation = {name: value for name, value in generation.items() if name in KEPT_GENERATION}
    generation["eos_token_id"] = list(end_ids) if len(end_ids) > 1 else end_ids[0]
    _write_json(path, generation)

    tokenizer = _read_json(folder / "tokenizer_config.json")
    for name in ("is_local", "local_files_only"):  # These entries say how the tokenizer was loaded here.
        tokenizer.pop(name, None)
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    _write_json(folder / "tokenizer_config.json", tokenizer)

    if pieces := _sentencepiece(source):
        shutil.copyfile(pieces, folder / SENTENCEPIECE)


def _sentencepiece(source: str) -> Path | None:
    """Return the path of a model's tokenizer.model, which llama.cpp needs for Gemma and Phi-3; None if missing."""
    if folder := model_folder(source):
        path = folder / SENTENCEPIECE
        return path if path.is_file() else None
    try:
        cached = try_to_load_from_cache(source, SENTENCEPIECE)
    except ValueError:  # `source` is not the name of a Hub model
        return None
    return Path(cached) if isinstance(cached, str) else None


def _older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings in `rope_parameters` of config.json, under their names in transformers 4."""
    rope = config.get("rope_parameters") or {}
    sliding = rope.get("sliding_attention")  # Gemma 3 has separate settings for full and for sliding attention.
    rope = rope.get("full_attention", rope)
    older = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if sliding:
        older["rope_local_base_freq"] = sliding["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in rope.items() if name not in older}
        if config.get("model_type") == "phi3":  # transformers 4 accepts exactly these three entries
            scaling = {"type": rope["rope_type"]} | {x: rope[x] for x in ("short_factor", "long_factor")}
        older["rope_scaling"] = scaling
    return older


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
