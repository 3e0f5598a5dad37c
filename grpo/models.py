"""The policy, its tokenizer and its frozen reference: loading, prompts and texts, saving."""

import copy
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from grpo.config import CARD, model_folder
from grpo.console import printable
from grpo.files import fsync, put_back
from grpo.lora import has_adapter, merged, save_adapter
from grpo.sampling import Completions, generate, left_pad
from tasks.base import Message

SAVED_MODEL = "saved_model"
ROWS = 256  # greedy completions at a time

transformers_logging.disable_progress_bar()


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with all that is needed to go from chats to texts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]  # every id that ends a turn
    pad_id: int

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def encode(self, chats: Sequence[Sequence[Message]]) -> tuple[Tensor, Tensor]:
        """Prompts for chats: (N, P) left-padded ids and bool mask. Control tokens in the text stay text."""
        prompts = [prompt_ids(self.tokenizer, chat) for chat in chats]
        return left_pad(prompts, self.pad_id, self.device)

    def decode(self, completions: Completions) -> list[str]:
        """The text of each completion, without the token that ended it; nothing else is left out."""
        lengths = (completions.lengths - completions.ended.long()).tolist()
        rows = [ids[:n] for ids, n in zip(completions.ids.tolist(), lengths, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def greedy(self, chats: Sequence[Sequence[Message]], max_new_tokens: int, limit: int = ROWS) -> list[str]:
        """The greedy completion of each chat, `limit` of them at a time."""
        texts: list[str] = []
        for start in range(0, len(chats), limit):
            ids, mask = self.encode(chats[start : start + limit])
            with precision(self.device):
                completions = generate(
                    self.model,
                    ids,
                    mask,
                    num_generations=1,
                    max_new_tokens=max_new_tokens,
                    end_ids=self.end_ids,
                )
            texts += self.decode(completions)
        return texts


def choose_device(name: str) -> torch.device:
    """The device of that name, `auto` being the best there is; raises ValueError where it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if name not in there:
        raise ValueError(f"device {name!r} is not known; use auto, cuda, mps or cpu")
    if not there[name]:
        raise ValueError(f"device {name} is not available on this machine; use --device auto")
    return torch.device(name)


def be_deterministic(wanted: bool) -> None:
    """Have CUDA compute the same bits each time, or in the fastest way; to be called before it is first used."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(wanted)


def precision(device: torch.device) -> AbstractContextManager:
    """bf16 autocast over the float32 weights on CUDA cards that have it (capability 8 and up); else float32.

    `torch.cuda.is_bf16_supported()` would count emulation.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


def load(name: str, device: torch.device, **quantization: Any) -> LanguageModel:
    """A model of the Hub, of a folder, or the starter, with float32 weights, in eval mode (no dropout).

    `quantization` is that of `grpo.lora.four_bits`, if anything.

    Raises ValueError with one line where it cannot be loaded.
    """
    source = model_folder(name) or name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **quantization,
        )
    except Exception as error:  # the libraries raise a dozen kinds; all mean the same to the user
        raise ValueError(_why_not_loaded(name, error)) from error
    if loading["missing_keys"] or loading["mismatched_keys"]:  # random numbers stand there now
        lacking = ", ".join(sorted(map(str, {*loading["missing_keys"], *loading["mismatched_keys"]}))[:3])
        raise ValueError(f"cannot load the model in folder {name}: weights are missing ({lacking}, ...)")
    if not tokenizer.chat_template:
        raise ValueError(f"model {name} has no chat template, so it is a base model; take its instruct version")
    model = (model if quantization else model.to(device)).eval()
    ends = end_of_turn_ids(model, tokenizer)
    if not ends:
        raise ValueError(f"model {name} names no token that ends a turn; completions would never end")
    pad = tokenizer.pad_token_id
    return LanguageModel(model, tokenizer, ends, ends[0] if pad is None else pad)


def _why_not_loaded(name: str, error: Exception) -> str:
    folder, name = model_folder(name), printable(name)
    if folder is not None:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        return f"cannot load the model in folder {name}: {reason}"
    if os.path.sep in name and (name.startswith((".", os.path.sep)) or name.count("/") > 1):
        return f"cannot load model {name}: there is no such folder"
    return (
        f"cannot load model {name}: there is no such folder here, and it could not be had from the Hugging Face Hub "
        "(offline, misspelled or private?); --model starter needs no network"
    )


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a turn: the tokenizer's, the generation config's, and the chat template's own.

    The last is found by rendering an assistant's turn and looking at what follows it (Gemma 3 ends a turn on
    <end_of_turn>, which is not its EOS).
    """
    ids = {tokenizer.eos_token_id}
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids.update(configured if isinstance(configured, list) else [configured])
    if tokenizer.chat_template:
        said = "c0mpl3ti0n"
        turn = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said}]
        after = tokenizer.apply_chat_template(turn, tokenize=False).rpartition(said)[2].strip()
        following = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        added = tokenizer.added_tokens_decoder
        ids.update(i for i in following if i in added and added[i].special)
    return tuple(sorted(i for i in ids if i is not None))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, chat: Sequence[Message]) -> list[int]:
    """The prompt that asks for the assistant's turn; control tokens in the messages are encoded as text."""
    try:
        encoded = tokenizer.apply_chat_template(
            list(chat), add_generation_prompt=True, return_dict=True, sanitize_control_tokens=True
        )
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the prompt: {error}") from None
    return encoded["input_ids"]


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The reference: a copy that is never trained."""
    return copy.deepcopy(model).requires_grad_(False)


def save(folder: Path, lm: LanguageModel, card: dict[str, Any], readme: str) -> None:
    """Write a model folder that transformers 4 and 5 load, with `grpo.json` and README.md; whole or not at all."""
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    put_back(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        if has_adapter(lm.model):
            merged(lm.model).save_pretrained(fresh)
            save_adapter(lm.model, fresh)
        else:
            lm.model.save_pretrained(fresh)
    except SafetensorError as error:
        raise OSError(f"cannot write {fresh}: {error}") from None
    lm.tokenizer.save_pretrained(fresh)
    _write_for_older_versions(fresh)
    (fresh / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (fresh / "README.md").write_text(readme, encoding="utf-8")
    for path in (*fresh.rglob("*"), fresh):
        fsync(path)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write_for_older_versions(folder: Path) -> None:
    """Add what transformers 4 looks for: without it, it falls back to other values in silence."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "rope_theta" in (config.get("rope_parameters") or {}):
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
