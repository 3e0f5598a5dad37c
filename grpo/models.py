"""The policy, its tokenizer and its frozen reference: loading, prompts and texts, saving."""

import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from grpo import ranks
from grpo.chats import end_of_turn_ids, fit_chat_template, prompt_ids
from grpo.config import CARD, model_folder
from grpo.console import printable
from grpo.files import fsync, put_back, writing
from grpo.formats import SENTENCEPIECE, write_for_others
from grpo.greedy import greedy
from grpo.lora import has_adapter, merged, save_adapter, trainable
from grpo.sampling import Completions, concatenate, left_pad
from grpo.sharding import for_the_first, is_sharded
from tasks.base import Message

SAVED_MODEL = "saved_model"
ROWS = 256  # greedy completions at a time

# no bars for reading and writing weights; `disable_progress_bar` would take those of downloads away too
transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **(kwargs | {"disable": True})))


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with all that is needed to go from chats to texts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]  # every id that ends a turn
    pad_id: int
    notes: tuple[str, ...] = ()  # what a run says of the way the model is asked
    dropout: dict[str, float] = field(default_factory=dict)  # the rates of its config.json, which are 0 here

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def encode(self, chats: Sequence[Sequence[Message]]) -> tuple[Tensor, Tensor]:
        """Prompts for chats: (N, P) left-padded ids and bool mask. Control tokens in the text stay text."""
        return left_pad(self.prompts(chats), self.pad_id, self.device)

    def prompts(self, chats: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The prompt of each chat, as token ids."""
        return [prompt_ids(self.tokenizer, chat) for chat in chats]

    def decode(self, completions: Completions) -> list[str]:
        """The text of each completion, without the token that ended it; nothing else is left out."""
        lengths = (completions.lengths - completions.ended.long()).tolist()
        rows = [ids[:n] for ids, n in zip(completions.ids.tolist(), lengths, strict=True)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def greedy(self, chats: Sequence[Sequence[Message]], max_new_tokens: int, limit: int = ROWS) -> list[str]:
        """The greedy completion of each chat, `limit` of them at a time."""
        return self.decode(self.answer(self.prompts(chats), max_new_tokens, limit))

    def answer(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, limit: int = ROWS, together: bool = False
    ) -> Completions:
        """The greedy completion of each prompt; `together`, what prompts begin with in common is run once.

        Several processes share the prompts out, and all get all completions.
        """
        padded = ranks.padded(prompts)
        mine = padded[ranks.own(len(padded))]
        with precision(self.device):
            found = greedy(self.model, mine, max_new_tokens, self.end_ids, self.pad_id, limit, together)
        if ranks.count() == 1:
            return found
        return concatenate(ranks.gather(found.to("cpu"))).pick(range(len(prompts)))


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
    """A model of the Hub, of a folder, or the starter, with float32 weights, in eval mode, without dropout in any.

    `quantization` is that of `grpo.lora.four_bits`, if anything. Raises ValueError with one line where the model
    cannot be loaded, or has no prompts that it can be asked with.
    """
    folder = model_folder(name)
    source, not_there = folder or name, "" if folder else _why_not_on_the_hub(name)
    local = bool(folder or not_there)
    try:
        if not local and not isinstance(try_to_load_from_cache(name, "config.json"), str):
            print(f"Downloading {printable(name)} from the Hugging Face Hub", file=sys.stderr, flush=True)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch.float32,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=local,
            **quantization,
        )
    except Exception as error:  # the libraries raise a dozen kinds; all mean the same to the user
        raise ValueError(_why_not_loaded(name, not_there, error)) from error
    if loading["missing_keys"] or loading["mismatched_keys"]:  # random numbers stand there now
        lacking = ", ".join(sorted(map(str, {*loading["missing_keys"], *loading["mismatched_keys"]}))[:3])
        raise ValueError(f"cannot load the model in folder {name}: weights are missing ({lacking}, ...)")
    if not local:
        with suppress(Exception):  # few models have one, and only `save` passes it on
            hf_hub_download(name, SENTENCEPIECE)
    note = fit_chat_template(tokenizer)
    model = (model if quantization else model.to(device)).eval()
    ends = end_of_turn_ids(model, tokenizer)
    if not ends:
        raise ValueError(f"model {name} names no token that ends a turn; completions would never end")
    pad = tokenizer.pad_token_id
    pad = ends[0] if pad is None else pad
    return LanguageModel(model, tokenizer, ends, pad, (note,) if note else (), switch_off_dropout(model))


def _why_not_on_the_hub(name: str) -> str:
    """Why a model cannot be had from the Hub, or nothing where it seems that it can.

    One request, and another a second later: offline, `from_pretrained` alone tries twelve times in 50 s. A slow
    network has HF_HUB_ETAG_TIMEOUT seconds each time (10, or what the environment says).
    """
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    for pause in (1, 0):
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except GatedRepoError:
            return "its page on the Hugging Face Hub has terms to accept first; then log in: hf auth login"
        except RepositoryNotFoundError:
            return "the Hugging Face Hub has none either (misspelled, or private: hf auth login)"
        except HFValidationError:
            return "it is no name of the Hugging Face Hub either"
        except HfHubHTTPError:  # there is a Hub, and `from_pretrained` knows what to do next
            return ""
        except Exception:  # its HTTP library has changed, and with it the errors
            time.sleep(pause)
        else:
            return ""
    return "the Hugging Face Hub cannot be reached (offline?)"


def _why_not_loaded(name: str, not_there: str, error: Exception) -> str:
    folder, name = model_folder(name), printable(name)
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if folder is not None:
        return f"cannot load the model in folder {name}: {reason}"
    if os.path.sep in name and (name.startswith((".", os.path.sep)) or name.count("/") > 1):
        return f"cannot load model {name}: there is no such folder"
    if not_there:
        lacking = f"there is no such folder here, and {not_there}"
        return f"cannot load model {name}: {lacking}; --model starter needs no network"
    return f"cannot load model {name} of the Hugging Face Hub: {reason}"


def switch_off_dropout(model: PreTrainedModel) -> dict[str, float]:
    """Make train mode compute what eval mode does; returns the rates that the configuration had.

    GPT-2 has 0.1 in modules of their own, others have a number in a module or read the configuration.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in [name for name, value in vars(module).items() if "drop" in name and isinstance(value, float)]:
            setattr(module, name, 0.0)
    rates = {name: x for name, x in model.config.to_dict().items() if "drop" in name and isinstance(x, float) and x}
    for name in rates:
        setattr(model.config, name, 0.0)
    return rates


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The reference: a copy that is never trained."""
    return copy.deepcopy(model).requires_grad_(False)


def save(folder: Path, lm: LanguageModel, card: dict[str, Any], readme: str) -> None:
    """Write a model folder that transformers 4 and 5 load, with `grpo.json` and README.md; whole or not at all.

    Of several processes, all have to call it, and the first one writes; then all go on.
    """
    adapted = has_adapter(lm.model)
    adapter = for_the_first(trainable(lm.model)) if adapted else {}
    plain = merged(lm.model) if adapted or is_sharded(lm.model) else lm.model
    if ranks.is_first():
        _write(folder, lm, plain, adapter, card, readme)
    ranks.wait()


def _write(
    folder: Path,
    lm: LanguageModel,
    plain: PreTrainedModel,
    adapter: Mapping[str, Tensor],
    card: dict[str, Any],
    readme: str,
) -> None:
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    put_back(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with writing(folder, Exception):  # safetensors and tokenizers raise kinds of their own
            plain.save_pretrained(fresh)
            if adapter:
                save_adapter(lm.model, adapter, fresh)
            lm.tokenizer.save_pretrained(fresh)
        with writing(folder):
            write_for_others(fresh, lm.tokenizer.name_or_path, lm.end_ids, lm.dropout)
            (fresh / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
            (fresh / "README.md").write_text(readme, encoding="utf-8")
            for path in (*fresh.rglob("*"), fresh):
                fsync(path)
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
            fsync(folder.parent)
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        put_back(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
