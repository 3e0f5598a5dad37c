"""Inspect the files of a model before it is built, and its weights after: a few bytes could ask for all memory.

What config.json (or the header of a GGUF file) describes is held against the weights that are there. Nothing is
guessed about a kind of model: torch itself counts, while transformers builds the model, and the count has a limit.
"""

import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers.utils import logging as transformers_logging

from grpo.runtime.console import printable, suppress_warnings

MOST_BYTES = 16 * 2**20  # of a JSON file, or of a header
MOST_LAYERS = 10_000
MOST = 10**10  # of any number; the largest in use, rope_theta aside, are context lengths of some 10^7
PACKED = 8  # weights in an element of a file: formats of 4 bits have up to so many in 32
SPARE_NUMBERS, SPARE_PARTS = 50_000_000, 20_000  # tables that are in no file; modules without weights
PARTS = 100  # modules and weights that are made for each tensor in the files, at most: layers may share theirs
# the first bytes of a value in a GGUF file say of which type it is: its struct format; 8 is a text, 9 an array
GGUF_TYPES = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
GGUF_TEXT, GGUF_ARRAY = 8, 9


def check_folder(folder: Path) -> None:
    """Raise ValueError, in one line, if the JSON files of a model's folder are not what they should be."""
    for path in folder.iterdir():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ValueError(f"{path.name!a} is no file; a pipe or a device may never end")
    if (folder / "adapter_config.json").exists():
        raise ValueError("it is an adapter (adapter_config.json), not a model; merge it into its model first")
    for name in ("config.json", "generation_config.json"):
        if name == "config.json" or (folder / name).exists():
            check_config(_read_json(folder / name), name)
    read_headers(folder)


def check_config(value: Any, place: str) -> None:
    """Raise ValueError if a configuration has a number that no model has, or names code to fetch."""
    if isinstance(value, dict):
        for name, item in value.items():
            if "layer" in name and _is_int(item) and not 0 <= item <= MOST_LAYERS and item != -1:
                raise ValueError(f"{place} has {item} as {name!r}; at most {MOST_LAYERS} layers are built")
            if name.endswith("attn_implementation") and isinstance(item, str) and not re.fullmatch(r"\w+", item):
                raise ValueError(f"{place} has {item[:80]!r} as {name!r}: code of the model's own is never run")
            check_config(item, f"{place}: {name!r}" if isinstance(item, (dict, list)) else place)
            if _is_int(item) and abs(item) > MOST:
                raise ValueError(f"{place} has {str(item)[:40]} as {name!r}, which is too large")
    elif isinstance(value, list):
        for item in value:
            check_config(item, place)


def read_headers(folder: Path) -> tuple[int, int]:
    """Return how many tensors, and how many numbers in them, the safetensors files of a folder have.

    Raises ValueError if a file is damaged, or if an index leads to another kind of file or out of the folder.
    """
    for path in folder.glob("*.safetensors.index.json"):
        names = _read_json(path).get("weight_map")
        for name in set(names.values()) if isinstance(names, dict) else {None}:
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{path.name} names {str(name)[:80]!a}, no safetensors file of the folder")
    tensors = numbers = 0
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(size - 8, 100_000_000):
                raise ValueError(f"{path.name} is cut short, or no safetensors file")
            header = _parse(file.read(length), path.name)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                begin, end = entry["data_offsets"]
                count = 1
                for side in entry["shape"]:
                    count *= side
                fits = 0 <= begin <= end <= size - 8 - length and count <= 8 * (end - begin)
            except (TypeError, KeyError, ValueError):
                fits = False
            if not fits:
                raise ValueError(f"{path.name} has no such tensor as its header says: {name[:80]!r}")
            tensors, numbers = tensors + 1, numbers + count
    return tensors, numbers


@contextmanager
def limited_size(sizes: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """Raise ValueError while a model is built as soon as it is too large for its files.

    `sizes` returns how many tensors and numbers they have. It is called when the first part is made: those of the Hub
    have been downloaded by then.
    """
    parts = sized = tensors = numbers = 0

    def count(module: nn.Module, name: str, made: nn.Module | Tensor | None) -> None:
        nonlocal parts, sized, tensors, numbers
        if not parts:
            tensors, numbers = sizes()
        parts += 1
        sized += made.numel() if isinstance(made, Tensor) else 0
        if parts > PARTS * tensors + SPARE_PARTS or sized > PACKED * numbers + SPARE_NUMBERS:
            raise ValueError(
                f"its configuration describes a model of more than {sized:,} numbers in {parts:,} parts; its files "
                f"have {numbers:,} in {tensors:,}"
            )

    hooks = [
        register(count)
        for register in (
            register_module_module_registration_hook,
            register_module_parameter_registration_hook,
            register_module_buffer_registration_hook,
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def silent() -> Iterator[None]:
    """Suppress what transformers logs: it quotes a stranger's files, with escape sequences if they have any."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        with suppress_warnings():
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def check_finite(model: nn.Module) -> None:
    """Raise ValueError with the name of the first weight that is not finite, if there is one."""
    for name, weight in model.named_parameters():
        # the sum is one pass without a copy; that of large finite numbers may overflow
        if weight.is_floating_point() and not weight.sum().isfinite() and not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise ValueError(f"{bad:,} of {weight.numel():,} numbers of the weight {name} are NaN or infinite")


def check_gguf(path: Path) -> tuple[int, int]:
    """Return how many tensors a GGUF file has, and how many numbers they may have at most.

    Raises ValueError, in one line, if its header is longer than the file, or has a number that no model has.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, tensors, entries = _unpack(file, "IQQ")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}, which is not read here")
        if tensors > size / 24 or entries > size / 12:  # bytes that the shortest takes
            raise ValueError(f"it is cut short: {tensors} tensors and {entries} entries in {size} bytes")
        for _ in range(entries):
            name = _gguf_text(file, size)
            check_config({name: _gguf_value(file, size)}, "its header")
    return tensors, size


def _gguf_value(file: BinaryIO, size: int) -> Any:
    """Return a number of the header; None for a text or an array, which is passed over."""
    (kind,) = _unpack(file, "I")
    if kind in GGUF_TYPES:
        return _unpack(file, GGUF_TYPES[kind])[0]
    if kind == GGUF_TEXT:
        _gguf_text(file, size)
        return None
    of, length = _unpack(file, "IQ") if kind == GGUF_ARRAY else (None, 0)
    if of in GGUF_TYPES and length <= size:
        file.seek(length * struct.calcsize(GGUF_TYPES[of]), os.SEEK_CUR)
    elif of == GGUF_TEXT and length <= size / 8:
        for _ in range(length):
            _gguf_text(file, size)
    else:
        raise ValueError(f"its header has a value of type {kind} that is not read here, or that is cut short")
    if file.tell() > size:
        raise ValueError("it is cut short")
    return None


def _gguf_text(file: BinaryIO, size: int) -> str:
    (length,) = _unpack(file, "Q")
    if length > size - file.tell():
        raise ValueError("it is cut short")
    return file.read(length).decode(errors="replace")


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    found = file.read(struct.calcsize(f"<{form}"))
    if len(found) < struct.calcsize(f"<{form}"):
        raise ValueError("it is cut short")
    return struct.unpack(f"<{form}", found)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"it has no {path.name}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.name} is larger than {MOST_BYTES // 2**20} MB")
    return _parse(path.read_bytes(), path.name)


def _parse(text: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({printable(str(error))[:120]})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} is not a JSON object")
    return found


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
