"""Inspect the files of an unknown model before it is built, because a few bytes in them could claim all memory.

The model that config.json or a GGUF header describes is compared with the headers of the weights.
"""

import copy
import filecmp
import json
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from grpo.model.lora import ADAPTER_CONFIG
from grpo.model.trial import try_tokenizer
from grpo.model_card import CARD, STARTER
from grpo.runtime.console import printable, suppress_warnings

MAX_JSON_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 100_000_000  # The safetensors library has the same limit on a file's header.
MAX_NUMBER = 10**10  # A larger integer in a configuration is refused; context lengths reach 10^7.
SPARE_LAYERS = 500  # There may be this many more layers or experts than tensors, because experts can share a tensor.
NUMBERS_PER_ELEMENT = 8  # A 32-bit element of a file can hold 8 weights of 4 bits.
SPARE_NUMBERS = 50_000_000  # A model may compute tables of this size that no file holds.
NOT_TOKENIZER_FILES = {"config.json", "generation_config.json", CARD, "README.md"}


def check_folder(folder: Path) -> int:
    """Check config.json and the weights' headers in a model's folder; return how many elements the weights have.

    Raises ValueError, in one line, if a file is missing or damaged, or if config.json does not fit the weights.
    """
    check_files(folder)
    shapes = read_headers(folder)
    check_config(_read_json(folder / "config.json"), "config.json", len(shapes))
    return sum(map(prod, shapes))


def check_files(folder: Path) -> None:
    """Raise ValueError if a file in a folder is a pipe or a device."""
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path.name!a} is a pipe or a device, which may never end, not a file")


def check_config(value: Any, place: str, tensors: int) -> None:
    """Raise ValueError if a configuration has a number too large for `tensors` tensors, or names code to run."""
    if isinstance(value, dict):
        for name, item in value.items():
            is_int = type(item) is int  # This excludes bool, which is a subclass of int in Python.
            is_count = is_int and re.search("(layers?|experts)$", name)
            if is_count and not -1 <= item <= tensors + SPARE_LAYERS:
                raise ValueError(f"{place} has {str(item)[:40]} as {name!r}, which does not fit {tensors} tensors")
            if name.endswith("attn_implementation") and isinstance(item, str) and not re.fullmatch(r"\w+", item):
                raise ValueError(
                    f"{place} sets {name!r} to {item[:80]!r}, which would run code; a model's own code is never run"
                )
            if is_int and abs(item) > MAX_NUMBER:
                raise ValueError(f"{place} has {str(item)[:40]} as {name!r}, which is too large")
            check_config(item, f"{place}: {name!r}" if isinstance(item, (dict, list)) else place, tensors)
    elif isinstance(value, list):
        for item in value:
            check_config(item, place, tensors)


def read_headers(folder: Path) -> list[list[int]]:
    """Return the shape of each tensor in the safetensors files of a folder.

    Raises ValueError if there is no such file, if a file is damaged, or if an index names another kind of file.
    """
    for path in folder.glob("*.safetensors.index.json"):
        names = _read_json(path).get("weight_map")
        for name in set(names.values()) if isinstance(names, dict) else {None}:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{path.name} names {str(name)[:80]!a}, which is not a safetensors file here")
    shapes = [shape for path in sorted(folder.glob("*.safetensors")) for shape in _read_header(path)]
    if not shapes:
        raise ValueError("it has no weights in safetensors files")
    return shapes


def _read_header(path: Path) -> list[list[int]]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - 8
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(size, MAX_HEADER_BYTES):
            raise ValueError(f"{path.name} is cut short, or is no safetensors file")
        header = _parse(file.read(length), path.name)
    header.pop("__metadata__", None)
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            fits = 0 <= begin <= end <= size - length and prod(entry["shape"]) <= NUMBERS_PER_ELEMENT * (end - begin)
        except (TypeError, KeyError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f"{path.name} does not hold the tensor that its header describes: {name[:80]!r}")
    return [entry["shape"] for entry in header.values()]


def base_of_adapter(folder: Path) -> str:
    """Check the files of an adapter's folder; return the name of its base model. Raises ValueError, in one line."""
    check_files(folder)
    read_headers(folder)
    config = _read_json(folder / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"it is an adapter, but {ADAPTER_CONFIG} does not name its base model; add the name there")
    return base


def read_gguf(path: Path) -> tuple[PreTrainedConfig, int]:
    """Return the configuration in a GGUF file, and the file's size in bytes, taken as its number of elements.

    Raises ValueError, in one line, if the header has a number that is too large for the file.
    """
    with open(path, "rb") as file:
        _, tensors = struct.unpack("<QQ", file.read(16).ljust(16, b"\0"))
    values, _ = PreTrainedConfig.get_config_dict(str(path.parent), gguf_file=path.name)
    check_config(values, "its header", tensors)
    return AutoConfig.for_model(**values), path.stat().st_size


def check_size(config: PreTrainedConfig, numbers: int) -> None:
    """Raise ValueError if a configuration describes a model far too large for files with `numbers` elements.

    The model is built on the meta device, where tensors have shapes but take no memory. Names and shapes of
    single weights are not compared here, because transformers renames and merges the weights of older files.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False)
    described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if described > NUMBERS_PER_ELEMENT * numbers + SPARE_NUMBERS:
        raise ValueError(
            f"its configuration describes a model of {described:,} numbers, but its files hold only {numbers:,}"
        )


@contextmanager
def silent() -> Iterator[None]:
    """Suppress the log of transformers, because it quotes a model's files with any escape sequences in them."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with suppress_warnings():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def check_finite(model: nn.Module) -> None:
    """Raise ValueError if a weight has a NaN or an infinite number; the error names the first such weight."""
    for name, weight in model.named_parameters():
        # The sum takes one pass and no copy. If it is not finite, it may have overflowed, so each number is checked.
        if weight.is_floating_point() and not weight.sum().isfinite() and not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise ValueError(f"{bad:,} of {weight.numel():,} numbers of the weight {name} are NaN or infinite")


def check_tokenizer(folder: Path) -> None:
    """Try the tokenizer in a folder in a child process, unless its files are the bundled starter's, byte for byte.

    Raises ValueError, in one line, if the tokenizer or its chat template fails or reaches a limit.
    """
    files = _tokenizer_files(folder)
    names = [path.name for path in _tokenizer_files(STARTER)]
    same, _, _ = filecmp.cmpfiles(folder, STARTER, names, shallow=False)
    has_more = len(files) > len(same) or (folder / "additional_chat_templates").exists()
    if same != names or has_more:
        try_tokenizer(folder, sum(path.stat().st_size for path in files))


def _tokenizer_files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".safetensors"]
    return [path for path in files if path.name not in NOT_TOKENIZER_FILES]


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"it has no {path.name}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_JSON_BYTES // 2**20} MB")
    return _parse(path.read_bytes(), path.name)


def _parse(text: bytes, name: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({printable(str(error))[:120]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not a JSON object")
    return content
