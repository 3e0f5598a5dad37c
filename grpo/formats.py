"""What transformers 4, vLLM and the converters of llama.cpp look for in a folder that transformers 5 wrote."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from grpo.config import model_folder

SENTENCEPIECE = "tokenizer.model"


def write_for_others(folder: Path, source: str, end_ids: Sequence[int], dropout: Mapping[str, float]) -> None:
    """Add to a saved model what they would otherwise take other values for, in silence.

    `source` is the folder or Hub model that the tokenizer came from, `end_ids` is every id that ends a turn, and
    `dropout` the rates that go back into config.json.
    """
    config = _read(folder / "config.json")
    for part in (config, config.get("text_config") or {}):
        part.update(_older_rope(part))
    _write(folder / "config.json", config | {"torch_dtype": "float32"} | dropout)

    if (folder / "generation_config.json").is_file():
        generation = _read(folder / "generation_config.json")
        generation.pop("_from_model_config", None)  # with it, transformers makes it anew from config.json
        generation["eos_token_id"] = list(end_ids) if len(end_ids) > 1 else end_ids[0]
        _write(folder / "generation_config.json", generation)

    tokenizer = _read(folder / "tokenizer_config.json")
    for name in ("is_local", "local_files_only"):  # how it was loaded here
        tokenizer.pop(name, None)
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    _write(folder / "tokenizer_config.json", tokenizer)

    if pieces := _sentencepiece(source):
        shutil.copyfile(pieces, folder / SENTENCEPIECE)


def _sentencepiece(source: str) -> Path | None:
    """The original's tokenizer.model, where it has one; llama.cpp converts Gemma and Phi-3 by it."""
    if folder := model_folder(source):
        path = folder / SENTENCEPIECE
        return path if path.is_file() else None
    try:
        cached = try_to_load_from_cache(source, SENTENCEPIECE)
    except ValueError:  # not the name of a Hub model
        return None
    return Path(cached) if isinstance(cached, str) else None


def _older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings of a config.json, kept in `rope_parameters`, as transformers 4 has them."""
    rope = config.get("rope_parameters") or {}
    sliding, rope = rope.get("sliding_attention"), rope.get("full_attention", rope)  # Gemma 3 has both
    older = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if sliding:
        older["rope_local_base_freq"] = sliding["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in rope.items() if name not in older}
        if config.get("model_type") == "phi3":  # takes three entries and no more
            scaling = {"type": rope["rope_type"]} | {x: rope[x] for x in ("short_factor", "long_factor")}
        older["rope_scaling"] = scaling
    return older


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
