"""Hostile model folders: each is the starter's folder with one change.

Tokenizers and chat templates are tried once, when the model is loaded. One that misbehaves only later, for a question
of the data that the trial has not seen, is not stopped. So no such folder is listed here.
"""

import json
import os
import shutil
import struct

import torch
from safetensors.torch import load_file, save_file

from grpo.model_card import STARTER

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}" * 1
LOOPS += "{% endfor %}{% endfor %}"
PROBE = "{% for m in messages %}{{ m['role'] + m['content'] }}<|im_end|>{% endfor %}"  # a template that works
DOUBLED = "{% set n = namespace(x=[1]) %}{% for i in range(64) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
SAME = "{% set o = namespace(x=[1]) %}{% for i in range(64) %}{% set o.x = [o.x, o.x] %}{% endfor %}"


def template(text):
    """Give the folder another chat template."""
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / "chat_template.jinja").write_bytes(content)


def edit(name, **changes):
    """Change entries of a JSON file, or of the parts of the tokenizer in it."""

    def change(folder):
        content = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(content | changes), encoding="utf-8")

    return change


def put(name, content):
    """Write a file of the folder."""
    return lambda folder: (folder / name).write_bytes(content)


def config(**changes):
    """Change entries of config.json."""
    return edit("config.json", **changes)


def tokenizer(**changes):
    """Change entries of tokenizer.json."""
    return edit("tokenizer.json", **changes)


def tokenizer_config(**changes):
    """Change entries of tokenizer_config.json."""
    return edit("tokenizer_config.json", **changes)


def weights(change):
    """Change the tensors of the model by a function of their dictionary."""

    def changed(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return changed


def poisoned(value):
    """Put a number into one place of one tensor."""

    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    return weights(change)


def replaced(name, make):
    """Replace a tensor."""
    return weights(lambda tensors: tensors.update({name: make(tensors[name])}))


def pickled(folder):
    """Put the weights into a pickle."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def header(content, length=None):
    """Replace the header of the weights."""
    return put("model.safetensors", struct.pack("<Q", len(content) if length is None else length) + content)


def a_folder_for(name):
    """Put a folder where a file should be."""

    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def a_pipe_for(name):
    """Put a pipe that nobody writes to where a file should be."""

    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def sharded(shard, make=None):
    """Name this file as the file of all weights; `make` writes it from the tensors."""

    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        (make or save_file)(tensors, folder / shard)
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    return change


def replace_chain(factor, times, pattern=None):
    """Return a chain of replacements, each of a letter by many letters."""
    parts = [
        {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": "a" * factor} for _ in range(times)
    ]
    return {"type": "Sequence", "normalizers": parts}


def gguf(entries, tensors=0, count=None):
    """Return the bytes of a GGUF file with these entries: a key, a type and the bytes of a value."""
    body = b"".join(
        struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value for key, kind, value in entries
    )
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(entries) if count is None else count) + body


LLAMA = (b"general.architecture", 8, struct.pack("<Q", 5) + b"llama")
SPLIT = {"type": "Split", "pattern": {"Regex": "(e|ee)+$|(o+o+)+y"}, "behavior": "Isolated", "invert": False}
MANY_A = replace_chain(10**5, 3)["normalizers"]
DEEP = b"[" * 200_000
BIG = 10**6

MODELS = {
    "template: escape sequences": template("{{ raise_exception('\x1b[2J\x1b]0;owned\x07') }}"),
    "template: 3 GB of x": template("{{ 'x' * 3000000000 }}" + PROBE),
    "template: a range of 10**9": template("{% for i in range(10**9) %}{% endfor %}" + PROBE),
    "template: nested loops": template(LOOPS + PROBE),
    "template: a power tower": template("{{ 9 ** (9 ** 9) }}" + PROBE),
    "template: a power tower that is not constant": template(
        "{% set n = messages|length + 8 %}{{ n ** (n ** n) }}" + PROBE
    ),
    "template: centred in 10**10": template("{{ 'x'.center(10**10) }}" + PROBE),
    "template: filters to 10**10": template("{{ 'x\n'|indent(10**10) }}{{ 'x'|center(10**10) }}" + PROBE),
    "template: JSON indented by 10**9": template("{{ messages|tojson(indent=10**9) }}" + PROBE),
    "template: lists of lists compared": template(DOUBLED + SAME + "{% if n.x == o.x %}{% endif %}" + PROBE),
    "template: lists of lists printed": template(DOUBLED + "{{ n.x }}" + PROBE),
    "template: a macro that calls itself": template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}" + PROBE),
    "template: a broken escape sequence": template("{{ '\x1b[31m "),
    "template: nested 20,000 deep": template("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}" + PROBE),
    "template: what is not there": template("{{ messages.a.b.c }}" + PROBE),
    "template: out of the sandbox": template("{{ ''.__class__.__mro__[1].__subclasses__() }}" + PROBE),
    "template: another file": template("{% include '/etc/passwd' %}" + PROBE),
    "template: 100 MB of text": template("{% for i in range(9999) %}{{ 'x' * 10000 }}{% endfor %}" + PROBE),
    "template: not UTF-8": template(b"\xff\xfe\x00{{ messages }}"),
    "template: the message left out": template("hello"),
    "tokenizer: chained replacements": tokenizer(normalizer=replace_chain(1000, 4)),
    "tokenizer: replaced nothing": tokenizer(normalizer=replace_chain(1000, 3, {"Regex": ""})),
    "tokenizer: a pattern of all time": lambda folder: (
        tokenizer(pre_tokenizer=SPLIT)(folder),
        template("{{ 'e' * 60 + 'b' }}" + PROBE)(folder),
    ),
    "tokenizer: decoded to 10**15": tokenizer(decoder={"type": "Sequence", "decoders": MANY_A}),
    "tokenizer: cut short": put("tokenizer.json", (STARTER / "tokenizer.json").read_bytes()[:5000]),
    "tokenizer: nested": put("tokenizer.json", DEEP),
    "tokenizer: of no kind": tokenizer(model={"type": "Nothing"}),
    "tokenizer: huge ids": tokenizer(model={"type": "WordLevel", "vocab": {"a": 2**62}, "unk_token": "a"}),
    "tokenizer: code of its own": tokenizer_config(
        tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}
    ),
    "tokenizer: its configuration a list": put("tokenizer_config.json", b"[]"),
    "tokenizer: its configuration nested": put("tokenizer_config.json", DEEP),
    "tokenizer: an end that is a number": tokenizer_config(eos_token=5),
    "tokenizer: more tokens than the embedding": lambda folder: (
        config(vocab_size=316)(folder),
        replaced("model.embed_tokens.weight", lambda tensor: tensor[:316].clone())(folder),
        template("{% for m in messages %}{{ m['role'] + m['content'] }}<think><reasoning><|im_end|>{% endfor %}")(
            folder
        ),
    ),
    "tokenizer: no end": lambda folder: (
        tokenizer_config(eos_token=None)(folder),
        config(eos_token_id=None)(folder),
        edit("generation_config.json", eos_token_id=None)(folder),
        template("{% for m in messages %}{{ m['content'] }}{% endfor %}")(folder),
    ),
    "config: 10**6 layers": config(num_hidden_layers=BIG),
    "config: 9999 layers": config(num_hidden_layers=9999),
    "config: a size of 10**9": config(hidden_size=10**9),
    "config: a vocabulary of 10**12": config(vocab_size=10**12),
    "config: no heads": config(num_attention_heads=0, num_key_value_heads=0),
    "config: a negative size": config(hidden_size=-128),
    "config: a size that is a text": config(hidden_size="\x1b[2J"),
    "config: of an unknown kind": config(model_type="\x1b[2J\x07"),
    "config: code of its own": config(model_type="evil", auto_map={"AutoModelForCausalLM": "evil.Evil"}),
    "config: attention from elsewhere": config(attn_implementation="evil/kernel"),
    "config: nested": put("config.json", DEEP),
    "config: a list": put("config.json", b"[1, 2]"),
    "config: odd rotary settings": config(rope_parameters={"rope_type": "\x1b[2J", "factor": "x"}),
    "config: quantised": config(quantization_config={"quant_method": "gptq", "bits": 4, "x": "\x1b[2J"}),
    "config: four positions": config(max_position_embeddings=4),
    "config: wide layers": config(intermediate_size=10**8),
    "config: an end out of the vocabulary": edit("generation_config.json", eos_token_id=[314, 10**6]),
    "config: ends that are texts": edit("generation_config.json", eos_token_id=["\x1b[2J"]),
    "weights: not a number": poisoned(float("nan")),
    "weights: infinite": poisoned(float("-inf")),
    "weights: too large for float32": replaced(
        "model.layers.1.mlp.up_proj.weight", lambda tensor: tensor.double() * 1e300
    ),
    "weights: a header of 2**60 bytes": header(b"{}", 2**60),
    "weights: a header that is no JSON": header(DEEP),
    "weights: a tensor out of the file": header(
        json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [128], "data_offsets": [0, 512]}}).encode()
    ),
    "weights: cut short": put("model.safetensors", (STARTER / "model.safetensors").read_bytes()[:100_000]),
    "weights: empty": put("model.safetensors", b""),
    "weights: of another shape": replaced("model.norm.weight", lambda tensor: torch.zeros(64)),
    "weights: one missing": weights(lambda tensors: tensors.pop("model.norm.weight")),
    "weights: names with escape sequences": weights(
        lambda tensors: tensors.update({"\x1b[2J": tensors.pop("model.norm.weight")})
    ),
    "weights: pickled": pickled,
    "weights: in a folder": a_folder_for("model.safetensors"),
    "weights: from a pipe": a_pipe_for("model.safetensors"),
    "config: from a pipe": a_pipe_for("config.json"),
    "tokenizer: from a pipe": a_pipe_for("tokenizer.json"),
    "weights: outside the folder": sharded("../outside.safetensors"),
    "weights: pickled shards": sharded("model-1.bin", torch.save),
    "weights: an index that is a list": put("model.safetensors.index.json", b'{"weight_map": [1]}'),
    "an adapter": put("adapter_config.json", b'{"base_model_name_or_path": "../other", "peft_type": "LORA"}'),
}
GGUFS = {
    "no end of entries": gguf([LLAMA], count=2**60),
    "no end of tensors": gguf([LLAMA], tensors=2**60),
    "an array of 2**60": gguf([LLAMA, (b"a", 9, struct.pack("<IQ", 4, 2**60))]),
    "an array of texts without end": gguf([LLAMA, (b"a", 9, struct.pack("<IQ", 8, 2**60))]),
    "a text of 2**60": gguf([(b"general.architecture", 8, struct.pack("<Q", 2**60))]),
    "10**6 layers": gguf([LLAMA, (b"llama.block_count", 4, struct.pack("<I", 10**6))]),
    "arrays in arrays": gguf([LLAMA, (b"a", 9, struct.pack("<IQ", 9, 3) + bytes(40))]),
    "nothing in it": gguf([]),
}


def a_hostile_model(folder, name):
    """Write a copy of the starter that is hostile in this way; return its folder."""
    shutil.copytree(STARTER, folder)
    MODELS[name](folder)
    return folder
