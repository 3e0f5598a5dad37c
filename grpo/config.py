"""Every setting of a run: once, with its default, its unit and its meaning.

A field of `TrainConfig` is the option of the same name (`learning_rate` is `--learning-rate`) and an entry of
`config` in the metrics file. The options of the tasks are fields too, and each task declares its own
(`tasks/registry.py`). The defaults are the published settings of the arithmetic experiment that this project
rebuilds. A model's folder may carry better ones for it (`grpo/model_card.py`); the command line overrides both.
"""

from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields, make_dataclass
from typing import Any

from grpo.setting import as_typed, check_setting, parse_duration, parse_group_schedule, setting
from tasks.common.prompts import STYLES
from tasks.common.user_file import names_a_file
from tasks.registry import DEFAULT_TASK, TASKS, task_options, task_shares

SFT, VARIANTS, OUTPUT = "SFT before GRPO", "Variants and schedules", "Evaluation and output"
GROUPS = ("Model", "Task", "Algorithm", SFT, VARIANTS, OUTPUT)  # in the order of --help
DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "float32", "bfloat16")
# the choices of a variant; each is one function in algorithm/loss.py or algorithm/advantages.py
AVERAGES, RATIOS, SCALES = ("completion", "token", "constant"), ("token", "sequence"), ("group", "batch", "none")
SURROGATES, AGGREGATIONS = ("clip", "cispo", "gmpo"), ("sum_then_normalize", "normalize_then_sum")
KL_ESTIMATORS = ("k3", "k3-corrected")
DECAYS = ("none", "linear", "cosine")
TRACKERS = ("none", "trackio", "wandb")
MOST_ROWS = 10**6  # completions of a step
MOST_TOKENS = 10**6  # of a completion: no model has so many positions, and memory for all is taken at once
# settings of one run, which its saved model does not hand to the runs that start from it. A model's folder may come
# from anywhere, so it can name no file either
NOT_INHERITED = (
    *("model", "device", "deterministic", "cuda_graphs", "shard", "seed", "output_dir", "time_limit", "track"),
    "task_arg",
    "sft_steps",  # its model has been through them
    *(name for name, option in task_options().items() if not option.inheritable),
)
# settings that decide nothing about what is learned from a step
CHANGEABLE_ON_RESUME = (
    *("device", "precision", "deterministic", "cuda_graphs", "gradient_checkpointing", "micro_batch_size"),
    *("num_iterations", "output_dir", "save_every", "shard", "show_every", "track", "time_limit"),
    *("patience", "target_accuracy"),
)
OLD_NAMES = {
    "refresh_reference_every": "ref_model_sync_steps",
    "mask_truncated": "mask_truncated_completions",
}
REMOVED = "curriculum"  # a setting of older versions; False, its default, is what every run does today


TaskOptions = make_dataclass(
    "TaskOptions",
    [
        (name, option.type, setting(option.default, "Task", option.meaning, option.least))
        for name, option in task_options().items()
    ],
    frozen=True,
)


@dataclass(frozen=True)
class TrainConfig(TaskOptions):
    """The settings of a run. Raises ValueError for an impossible value."""

    model: str = setting("starter", "Model", "starter (bundled), smollm2, a Hub id, a folder, or a GGUF file")
    device: str = setting("auto", "Model", "device to compute on; auto takes cuda, then mps, then cpu", None, DEVICES)
    precision: str = setting(
        "auto", "Model", "of passes; auto: bfloat16 where the device multiplies it faster", None, PRECISIONS
    )
    deterministic: bool = setting(
        False, "Model", "compute the same bits each time on CUDA too, which is slower there"
    )
    cuda_graphs: bool = setting(False, "Model", "sample with CUDA graphs: faster, but not yet run on a GPU")
    lora_rank: int = setting(0, "Model", "train an adapter of this rank instead of all weights (peft); 0: all", 0)
    lora_alpha: float = setting(32.0, "Model", "LoRA scale: updates are multiplied by alpha / rank", 1e-9)
    lora_targets: str = setting("all-linear", "Model", "layers that get an adapter, such as q_proj,v_proj")
    load_in_4bit: bool = setting(False, "Model", "hold the frozen weights in 4 bits; needs LoRA (bitsandbytes)")
    gradient_checkpointing: bool = setting(False, "Model", "save memory: recompute activations in the backward pass")
    shard: bool = setting(False, "Model", "spread weights, gradients and optimizer over the processes of torchrun")

    task: tuple[str, ...] = setting(
        (DEFAULT_TASK,), "Task", f"{', '.join(TASKS)}, or FILE.py:NAME, one of your own; several: NAME=WEIGHT each"
    )
    task_arg: tuple[str, ...] = setting((), "Task", "key=value, an argument of the --task in your file")
    prompt_style: str = setting("answer", "Task", "form of the answer that the prompt asks for", None, STYLES)
    system_prompt: str = setting("", "Task", "system prompt instead of the style's own")
    shots: int = setting(0, "Task", "worked examples in the prompt, solved training problems as turns", 0, (), 10**4)
    reward: tuple[str, ...] = setting((), "Task", "NAME=WEIGHT or FILE.py:FUNCTION=WEIGHT, instead of the task's own")

    num_iterations: int = setting(
        2000,
        "Algorithm",
        "steps, of one rollout and its updates each (TRL's num_iterations is our num_inner_updates)",
        1,
    )
    batch_size: int = setting(4, "Algorithm", "prompts a step", 1)
    num_generations: int = setting(8, "Algorithm", "completions a prompt (G, the group)", 2)
    max_new_tokens: int = setting(
        16, "Algorithm", "longest completion, in tokens; think: 128, reasoning: 256", 1, (), MOST_TOKENS
    )
    temperature: float = setting(
        1.0, "Algorithm", "sampling temperature; log-probabilities are taken at it too", 1e-3, (), 100.0
    )
    learning_rate: float = setting(1e-7, "Algorithm", "learning rate of AdamW", 0.0)
    beta: float = setting(0.04, "Algorithm", "weight of the KL to the reference; 0 loads no reference", 0.0)
    epsilon: float = setting(0.2, "Algorithm", "the ratio is clipped to 1 ± this", 1e-6)
    num_inner_updates: int = setting(5, "Algorithm", "updates on one rollout (TRL calls this num_iterations)", 1)
    clip_grad_norm: float = setting(0.5, "Algorithm", "largest norm of the gradient", 1e-9)
    micro_batch_size: int = setting(0, "Algorithm", "prompts in one pass, to save memory; 0 takes all at once", 0)
    seed: int = setting(0, "Algorithm", "seed of problems and sampling", 0, (), 10**18)

    sft_steps: int = setting(0, SFT, "supervised steps on ideal completions before GRPO; 0: none", 0)
    sft_batch_size: int = setting(16, SFT, "problems, each with its completion, in such a step", 1)
    sft_learning_rate: float = setting(1e-5, SFT, "their learning rate, linear up to it and down to 0", 0.0)

    surrogate: str = setting(
        "clip", VARIANTS, "what the loss makes of ratio and advantage; cispo and gmpo: as published", None, SURROGATES
    )
    loss_average: str = setting(
        "completion", VARIANTS, "what the loss is averaged over; token: DAPO, constant: Dr. GRPO", None, AVERAGES
    )
    ratio: str = setting("token", VARIANTS, "level of ratio and clipping; sequence: GSPO", None, RATIOS)
    kl_estimator: str = setting(
        "k3", VARIANTS, "KL term of the loss; k3-corrected: times the ratio (DeepSeek-V3.2)", None, KL_ESTIMATORS
    )
    epsilon_high: float = setting(0.0, VARIANTS, "clip the ratio to 1 + this above (DAPO: 0.28); 0: as epsilon", 0.0)
    scale_rewards: str = setting(
        "group", VARIANTS, "std that advantages are divided by; none: Dr. GRPO", None, SCALES
    )
    multi_objective_aggregation: str = setting(
        "sum_then_normalize", VARIANTS, "order for several rewards; normalize_then_sum: GDPO", None, AGGREGATIONS
    )
    entropy_bonus: float = setting(0.0, VARIANTS, "weight of the entropy, nats a token, that the loss rewards")
    overlong_buffer: int = setting(
        0, VARIANTS, "tokens below the limit over which a reward of 0 falls to -1 (DAPO); 0: none", 0
    )
    mask_truncated_completions: bool = setting(
        False, VARIANTS, "leave completions that the token limit cut off out of the loss"
    )
    resample_tied: int = setting(0, VARIANTS, "redraw groups that are all right or all wrong, at most this often", 0)
    target_kl: float = setting(0.0, VARIANTS, "adapt beta towards this KL, nats a token; 0: beta is constant", 0.0)
    warmup_steps: int = setting(0, VARIANTS, "steps in which the learning rate rises linearly to its value", 0)
    learning_rate_decay: str = setting(
        "none", VARIANTS, "decay of the learning rate until the last step", None, DECAYS
    )
    group_schedule: str = setting("", VARIANTS, "completions a prompt from the first step to the last, such as 8:4")
    ref_model_sync_steps: int = setting(
        0, VARIANTS, "steps after which the reference becomes a copy of the policy; 0: never", 0
    )

    eval_every: int = setting(50, OUTPUT, "steps between evaluations on validation", 1)
    eval_problems: int = setting(500, OUTPUT, "validation problems in each evaluation", 1, (), 10**5)
    pass_at_k: int = setting(
        0, OUTPUT, "also measure pass@k and maj@k by sampling on the test problems; 0: do not", 0, (), 10**4
    )
    save_every: int = setting(25, OUTPUT, "steps between checkpoints", 1)
    patience: int = setting(0, OUTPUT, "stop after this many evaluations without a better one; 0: never", 0)
    target_accuracy: float = setting(0.0, OUTPUT, "stop at this validation accuracy, up to 1; 0: never", 0.0, (), 1.0)
    time_limit: str = setting("", OUTPUT, "end this launch within this time: 3h, 90m, 1h30m")
    show_every: int = setting(50, OUTPUT, "steps between printed completions; 0: never", 0)
    track: str = setting("none", OUTPUT, "experiment tracker that also gets the metrics", None, TRACKERS)
    output_dir: str = setting(".", OUTPUT, "folder that everything is written to")

    def __post_init__(self) -> None:
        if isinstance(self.task, str):  # one, as files have it
            object.__setattr__(self, "task", (self.task,))
        for name in ("task", "reward", "task_arg"):
            if isinstance(getattr(self, name), list):  # as JSON has it
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for f in fields(self):
            check_setting(f.name, getattr(self, f.name), f.type, f.metadata)
        shares = task_shares(self.task)
        object.__setattr__(self, "task", tuple(map(str, shares)))  # a weight has one spelling
        if self.task_arg and sum(names_a_file(share.spec) for share in shares) != 1:
            raise ValueError(
                f"--task-arg is for a task in a file, --task FILE.py:NAME, and for one; here is {' '.join(self.task)}"
            )
        if self.time_limit:
            parse_duration(self.time_limit)
        if self.group_schedule:
            parse_group_schedule(self.group_schedule)
        for name in ("target_kl", "ref_model_sync_steps"):
            if getattr(self, name) and not self.beta:
                raise ValueError(f"{as_typed(name)} is about the KL to the reference, which --beta 0 leaves out")
        if self.ref_model_sync_steps and self.lora_rank:
            raise ValueError("--ref-model-sync-steps cannot be with --lora-rank: the reference is the frozen base")
        if self.sft_steps and self.lora_rank and self.beta:
            raise ValueError(
                "--sft-steps cannot be with --lora-rank unless --beta is 0: the reference is the frozen base, which "
                "the fine-tuned adapter is not a part of"
            )
        if self.load_in_4bit and not self.lora_rank:
            raise ValueError(
                "--load-in-4bit needs --lora-rank: weights in 4 bits cannot be trained, an adapter over them can"
            )
        if self.shard and self.load_in_4bit:
            raise ValueError("--shard cannot be with --load-in-4bit: weights in 4 bits cannot be spread")
        if self.batch_size * self.num_generations > MOST_ROWS:
            raise ValueError(
                f"--batch-size {self.batch_size} and --num-generations {self.num_generations} make more than "
                f"{MOST_ROWS} completions a step; take fewer"
            )
        if self.overlong_buffer > self.max_new_tokens:
            raise ValueError(f"--overlong-buffer is {self.overlong_buffer}; it must be at most --max-new-tokens")
        if self.surrogate in ("cispo", "gmpo") and self.ratio != "token":
            raise ValueError(f"--surrogate {self.surrogate} needs --ratio token: it uses the ratio of each token")
        if self.warmup_steps >= self.num_iterations:
            raise ValueError(f"--warmup-steps is {self.warmup_steps}; it must be below --num-iterations")

    @property
    def depends_on_length(self) -> bool:
        """Return whether what a step does depends on the number of steps."""
        return bool(self.group_schedule) or self.learning_rate_decay != "none"

    def conflicting_settings(self, earlier: Mapping[str, Any]) -> list[str]:
        """List the settings that differ from an earlier launch of the run and may not."""
        earlier = {**TrainConfig().to_dict(), **with_new_names(earlier)}  # the run may lack a newer setting
        may_change = set(CHANGEABLE_ON_RESUME) - ({"num_iterations"} if self.depends_on_length else set())
        return [
            f"{as_typed(name)} {_shown(earlier[name])} (now {_shown(value)})"
            for name, value in self.to_dict().items()
            if name not in may_change and earlier[name] != value
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values: a task alone as a text, several as a list."""
        task = self.task[0] if len(self.task) == 1 else list(self.task)
        return {**asdict(self), "task": task, "reward": list(self.reward), "task_arg": list(self.task_arg)}

    def inheritable_settings(self) -> dict[str, Any]:
        """Return what a saved model hands to a run that starts from it: all but place, model, seed and files."""
        passed = {name: value for name, value in self.to_dict().items() if name not in NOT_INHERITED}
        return passed | {"reward": []} if any(map(names_a_file, self.reward)) else passed


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text or "none"


def with_new_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of an older version under today's names, without the removed one where it was False."""
    kept = {name: value for name, value in settings.items() if name != REMOVED or value is not False}
    return {OLD_NAMES.get(name, name): value for name, value in kept.items()}


def ordered_fields() -> list[Field]:
    """Return the fields of `TrainConfig` by group, a task's own options last in theirs."""
    own = task_options()
    return sorted(fields(TrainConfig), key=lambda f: (GROUPS.index(f.metadata["group"]), f.name in own))
