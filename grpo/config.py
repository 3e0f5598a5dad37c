"""Declare every setting of a run, with its default, its unit and its meaning.

A field of `TrainConfig` is the option of the same name (`learning_rate` is `--learning-rate`) and an entry of
`config` in the metrics file. Each task declares its own options (`tasks/registry.py`); they are fields too. The
defaults are the published settings of the arithmetic experiment that this project rebuilds. A model's card may change
defaults (`grpo/model_card.py`). The command line overrides the card and the defaults.
"""

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields, make_dataclass
from typing import Any

from grpo.setting import as_typed, check_setting, parse_duration, parse_group_schedule, parse_template_args, setting
from tasks.common.prompts import DEFAULT_WORDING, FIRST_WORDING, STYLES, WORDINGS
from tasks.common.user_file import names_a_file
from tasks.registry import DEFAULT_TASK, TASKS, task_options, task_shares

MODEL = "Model"
TASK = "Task"
ALGORITHM = "Algorithm"
SFT = "SFT before GRPO"
VARIANTS = "Variants and schedules"
OUTPUT = "Evaluation and output"
GROUPS = (MODEL, TASK, ALGORITHM, SFT, VARIANTS, OUTPUT)  # the headings of --help, in this order

DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "float32", "bfloat16")
# The variants, from AVERAGES to KL_ESTIMATORS, are implemented in algorithm/loss.py and algorithm/advantages.py.
AVERAGES = ("completion", "token", "constant")
RATIOS = ("token", "sequence")
SCALES = ("group", "batch", "none")
SURROGATES = ("clip", "cispo", "gmpo")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
KL_ESTIMATORS = ("k3", "k3-corrected")
DECAYS = ("none", "linear", "cosine")
TRACKERS = ("none", "trackio", "wandb", "tensorboard")

MAX_COMPLETIONS_PER_STEP = 10**6
MAX_NEW_TOKENS = 10**6  # Memory for the longest completion is allocated at once; a larger number is probably a typo.

MACHINE = ("device", "deterministic", "cuda_graphs", "shard")
COMPUTING = (*MACHINE, "precision", "gradient_checkpointing", "micro_batch_size")
STOPPING = ("num_iterations", "time_limit", "patience", "target_accuracy")
REPORTING = ("output_dir", "save_every", "show_every", "track")
# A launch that continues a run may change these settings: none of them defines what a step learns.
CHANGEABLE_ON_RESUME = (*COMPUTING, *STOPPING, *REPORTING)
# A run that starts from a saved model does not take these settings from the model's card. Anybody may have written
# the card, so it must not name a file. The supervised steps are already part of the weights, so they are not
# repeated.
NOT_INHERITED = (
    *(*MACHINE, "model", "task_arg", "seed", "sft_steps", "output_dir", "time_limit", "track"),
    *(name for name, option in task_options().items() if not option.inheritable),
)
OLD_NAMES = {"refresh_reference_every": "ref_model_sync_steps", "mask_truncated": "mask_truncated_completions"}
REMOVED = "curriculum"  # Only older versions had this setting. A run without it behaves as if it were False.


TaskOptions = make_dataclass(
    "TaskOptions",
    [
        (name, option.type, setting(option.default, TASK, option.meaning, least=option.least, common=option.common))
        for name, option in task_options().items()
    ],
    frozen=True,
)


@dataclass(frozen=True)
class TrainConfig(TaskOptions):
    """Hold the settings of a run. Raises ValueError for an impossible value."""

    model: str = setting("starter", MODEL, "starter, smollm2, a Hub id, a folder, or a GGUF file", common=True)
    device: str = setting(
        "auto", MODEL, "device; auto: the first available of cuda, mps and cpu", choices=DEVICES, common=True
    )
    precision: str = setting(
        "auto",
        MODEL,
        "precision of forward and backward; auto: bfloat16 where the hardware supports it",
        choices=PRECISIONS,
    )
    deterministic: bool = setting(False, MODEL, "give the same bits each time a run is repeated on CUDA; slower")
    cuda_graphs: bool = setting(False, MODEL, "sample with CUDA graphs, to launch fewer kernels; not tested on a GPU")
    lora_rank: int = setting(0, MODEL, "rank of a LoRA adapter (peft); 0: train all weights", least=0, common=True)
    lora_alpha: float = setting(32.0, MODEL, "LoRA scale: updates are multiplied by alpha / rank", least=1e-9)
    lora_targets: str = setting("all-linear", MODEL, "layers that get an adapter, such as q_proj,v_proj")
    load_in_4bit: bool = setting(False, MODEL, "keep the frozen weights in 4 bits (bitsandbytes); needs --lora-rank")
    gradient_checkpointing: bool = setting(False, MODEL, "save memory: recompute activations in the backward pass")
    shard: bool = setting(False, MODEL, "split weights, gradients and optimizer state over the processes of torchrun")

    chat_template_arg: tuple[str, ...] = setting(
        (), MODEL, "NAME=VALUE, a variable of the chat template, such as enable_thinking=false; repeatable"
    )

    task: tuple[str, ...] = setting(
        (DEFAULT_TASK,),
        TASK,
        f"{', '.join(TASKS)}, or FILE.py:NAME for your own; for a mixture, one --task NAME=WEIGHT each",
        common=True,
    )
    task_arg: tuple[str, ...] = setting((), TASK, "KEY=VALUE, an argument for the task in your file; repeatable")
    prompt_style: str = setting("answer", TASK, "answer format that the prompt asks for", choices=STYLES, common=True)
    prompt_wording: str = setting(
        DEFAULT_WORDING, TASK, "built-in wording of the prompt style; the starter uses plain", choices=WORDINGS
    )
    system_prompt: str = setting("", TASK, "system prompt, instead of the prompt style's")
    shots: int = setting(0, TASK, "solved training problems in the prompt", least=0, most=10**4, common=True)
    reward: tuple[str, ...] = setting(
        (), TASK, "NAME=WEIGHT or FILE.py:FUNCTION=WEIGHT, instead of the task's rewards; repeatable", common=True
    )

    num_iterations: int = setting(
        2000,
        ALGORITHM,
        "number of steps; each is one rollout and its updates (TRL's num_iterations is --num-inner-updates)",
        least=1,
        common=True,
    )
    batch_size: int = setting(4, ALGORITHM, "prompts per step", least=1, common=True)
    num_generations: int = setting(8, ALGORITHM, "completions per prompt: the group size G", least=2, common=True)
    max_new_tokens: int = setting(
        16,
        ALGORITHM,
        "token limit of a completion; with --prompt-style think 128, with reasoning or --task gsm8k 256",
        least=1,
        most=MAX_NEW_TOKENS,
        common=True,
    )
    temperature: float = setting(
        1.0, ALGORITHM, "sampling temperature, also used for log-probabilities", least=1e-3, most=100.0
    )
    learning_rate: float = setting(1e-7, ALGORITHM, "learning rate of AdamW", least=0.0, common=True)
    beta: float = setting(0.04, ALGORITHM, "weight of the KL to the reference; 0: no KL", least=0.0, common=True)
    epsilon: float = setting(0.2, ALGORITHM, "clip range: the ratio is clipped to 1 ± epsilon", least=1e-6)
    num_inner_updates: int = setting(5, ALGORITHM, "updates per rollout (TRL: num_iterations)", least=1, common=True)
    clip_grad_norm: float = setting(0.5, ALGORITHM, "largest gradient norm; larger ones are scaled down", least=1e-9)
    micro_batch_size: int = setting(0, ALGORITHM, "prompts per forward pass, to save memory; 0: all at once", least=0)
    seed: int = setting(0, ALGORITHM, "seed of problems and sampling", least=0, most=10**18, common=True)

    sft_steps: int = setting(0, SFT, "supervised steps before GRPO; 0: none", least=0, common=True)
    sft_batch_size: int = setting(16, SFT, "problems per supervised step, each with a correct completion", least=1)
    sft_learning_rate: float = setting(
        1e-5, SFT, "peak of the supervised learning rate, which rises and falls linearly", least=0.0
    )

    surrogate: str = setting("clip", VARIANTS, "policy-gradient term: PPO clip, CISPO or GMPO", choices=SURROGATES)
    loss_average: str = setting(
        "completion",
        VARIANTS,
        "how token losses are averaged: per completion, over all tokens (DAPO), or over a constant length (Dr. GRPO)",
        choices=AVERAGES,
        common=True,
    )
    ratio: str = setting("token", VARIANTS, "one ratio per token, or per completion (sequence: GSPO)", choices=RATIOS)
    kl_estimator: str = setting(
        "k3", VARIANTS, "KL term; k3-corrected: multiplied by the ratio (DeepSeek-V3.2)", choices=KL_ESTIMATORS
    )
    epsilon_high: float = setting(
        0.0, VARIANTS, "upper clip range, such as 0.28 (DAPO); 0: same as --epsilon", least=0.0
    )
    scale_rewards: str = setting(
        "group", VARIANTS, "standard deviation that advantages are divided by; none: Dr. GRPO", choices=SCALES
    )
    multi_objective_aggregation: str = setting(
        "sum_then_normalize",
        VARIANTS,
        "order of adding and normalizing several rewards; normalize_then_sum: GDPO",
        choices=AGGREGATIONS,
    )
    entropy_bonus: float = setting(
        0.0, VARIANTS, "weight of the entropy bonus in the loss; the entropy is in nats per token"
    )
    overlong_buffer: int = setting(
        0, VARIANTS, "reward falling from 0 to -1 over this many tokens before the limit (DAPO); 0: none", least=0
    )
    mask_truncated_completions: bool = setting(
        False, VARIANTS, "compute the loss without completions that the token limit cut off"
    )
    resample_tied: int = setting(
        0, VARIANTS, "redraw groups whose rewards are all equal, at most this many times", least=0, common=True
    )
    target_kl: float = setting(
        0.0, VARIANTS, "adapt beta to reach this KL, in nats per token; 0: constant beta", least=0.0
    )
    warmup_steps: int = setting(0, VARIANTS, "steps of linear warm-up of the learning rate", least=0)
    learning_rate_decay: str = setting(
        "none", VARIANTS, "decay of the learning rate until the last step", choices=DECAYS, common=True
    )
    group_schedule: str = setting("", VARIANTS, "completions per prompt in the first and the last step, such as 8:4")
    ref_model_sync_steps: int = setting(
        0, VARIANTS, "steps between copies of the policy into the reference; 0: never", least=0
    )

    eval_every: int = setting(50, OUTPUT, "steps between evaluations on validation problems", least=1, common=True)
    eval_problems: int = setting(500, OUTPUT, "validation problems per evaluation", least=1, most=10**5)
    pass_at_k: int = setting(
        0, OUTPUT, "k of pass@k and maj@k, measured by sampling on the test problems; 0: neither", least=0, most=10**4
    )
    save_every: int = setting(25, OUTPUT, "steps between checkpoints", least=1)
    patience: int = setting(0, OUTPUT, "stop after this many evaluations without a new best; 0: never", least=0)
    target_accuracy: float = setting(
        0.0, OUTPUT, "stop at this validation accuracy, from 0 to 1; 0: never", least=0.0, most=1.0
    )
    time_limit: str = setting("", OUTPUT, "end this launch within this time, such as 3h, 90m or 1h30m", common=True)
    show_every: int = setting(50, OUTPUT, "steps between printed completions; 0: never", least=0)
    track: str = setting("none", OUTPUT, "experiment tracker that also gets the metrics", choices=TRACKERS)
    output_dir: str = setting(".", OUTPUT, "folder that everything is written to", common=True)

    def __post_init__(self) -> None:
        if isinstance(self.task, str):  # JSON files may hold a single task as a string
            object.__setattr__(self, "task", (self.task,))
        for name in ("task", "reward", "task_arg", "chat_template_arg"):
            if isinstance(getattr(self, name), list):  # JSON has no tuples
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for f in fields(self):
            check_setting(f.name, getattr(self, f.name), f.type, f.metadata)
        shares = task_shares(self.task)
        object.__setattr__(self, "task", tuple(map(str, shares)))  # 0.50 becomes 0.5
        if self.task_arg and sum(names_a_file(share.spec) for share in shares) != 1:
            raise ValueError(f"--task-arg needs one --task FILE.py:NAME; --task is {' '.join(self.task)}")
        parse_template_args(self.chat_template_arg)
        if self.time_limit:
            parse_duration(self.time_limit)
        if self.group_schedule:
            parse_group_schedule(self.group_schedule)
        for name in ("target_kl", "ref_model_sync_steps"):
            if getattr(self, name) and not self.beta:
                raise ValueError(f"{as_typed(name)} needs --beta above 0: with --beta 0 there is no reference")
        if self.ref_model_sync_steps and self.lora_rank:
            raise ValueError("--ref-model-sync-steps cannot be combined with --lora-rank: LoRA's reference is frozen")
        if self.sft_steps and self.lora_rank and self.beta:
            raise ValueError(
                "--sft-steps cannot be combined with --lora-rank unless --beta is 0: the reference is the frozen "
                "base, without the fine-tuned adapter"
            )
        if self.load_in_4bit and not self.lora_rank:
            raise ValueError("--load-in-4bit needs --lora-rank: only an adapter on 4-bit weights can be trained")
        if self.shard and self.load_in_4bit:
            raise ValueError("--shard cannot be combined with --load-in-4bit: 4-bit weights cannot be split")
        if self.batch_size * self.num_generations > MAX_COMPLETIONS_PER_STEP:
            raise ValueError(
                f"--batch-size {self.batch_size} times --num-generations {self.num_generations} is more than "
                f"{MAX_COMPLETIONS_PER_STEP} completions per step; lower --batch-size or --num-generations"
            )
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError(f"--overlong-buffer is {self.overlong_buffer}; it must be at most --max-new-tokens")
        if self.surrogate in ("cispo", "gmpo") and self.ratio != "token":
            raise ValueError(f"--surrogate {self.surrogate} needs --ratio token: it uses the ratio of each token")
        if self.warmup_steps >= self.num_iterations:
            raise ValueError(f"--warmup-steps is {self.warmup_steps}; it must be below --num-iterations")

    def conflicting_settings(self, earlier: Mapping[str, Any]) -> list[str]:
        """Return, in words, the changed settings that prevent this launch from continuing an earlier one."""
        # If an older version did not record a setting, its default applies; these versions had one prompt wording.
        earlier = {**TrainConfig().to_dict(), "prompt_wording": FIRST_WORDING, **with_new_names(earlier)}
        may_change = set(CHANGEABLE_ON_RESUME)
        if self.group_schedule or self.learning_rate_decay != "none":  # both depend on the number of steps
            may_change.remove("num_iterations")
        return [
            f"{as_typed(name)} {_shown(earlier[name])} (now {_shown(value)})"
            for name, value in self.to_dict().items()
            if name not in may_change and earlier[name] != value
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values: a single task as a string, several tasks as a list."""
        task = self.task[0] if len(self.task) == 1 else list(self.task)
        lists = {name: list(getattr(self, name)) for name in ("reward", "task_arg", "chat_template_arg")}
        return {**asdict(self), "task": task, **lists}

    def inheritable_settings(self) -> dict[str, Any]:
        """Return the settings that a run takes from the card of the saved model that it starts from."""
        settings = {name: value for name, value in self.to_dict().items() if name not in NOT_INHERITED}
        return settings | {"reward": []} if any(map(names_a_file, self.reward)) else settings


def _shown(value: Any) -> str:
    """Return a value as an error message shows it."""
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text or "none"
    return text if text.isprintable() else ascii(text)


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of an older version under today's names, without the removed setting if it was False."""
    kept = {name: value for name, value in settings.items() if name != REMOVED or value is not False}
    return {OLD_NAMES.get(name, name): value for name, value in kept.items()}


def ordered_fields() -> list[Field]:
    """Return the fields of `TrainConfig` in the order of `GROUPS`; the options of tasks come last in their group."""
    options = task_options()
    return sorted(fields(TrainConfig), key=lambda f: (GROUPS.index(f.metadata["group"]), f.name in options))
