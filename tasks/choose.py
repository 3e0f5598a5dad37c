"""From settings to a task: what --task, --data and the rest of them ask for."""

from typing import Protocol

from tasks import gsm8k, jsonl
from tasks.arithmetic import Arithmetic
from tasks.base import Task
from tasks.reverse import Reverse


class TaskSettings(Protocol):
    """The settings that a task is made from; `grpo.config.TrainConfig` has them."""

    task: str
    data: str
    prompt_style: str
    system_prompt: str
    min_operand: int
    max_operand: int


def choose_task(settings: TaskSettings) -> Task:
    """The task of the settings; raises ValueError, in one line, where its data are missing or malformed."""
    form = {"style": settings.prompt_style, "system_prompt": settings.system_prompt}
    if settings.task == "gsm8k":
        return gsm8k.load(settings.data, **form)
    if settings.task == "jsonl":
        if not settings.data:
            raise ValueError("--task jsonl needs --data FILE: JSON Lines with question and answer")
        return jsonl.load(settings.data, **form)
    if settings.data:
        raise ValueError(f"--task {settings.task} makes its own problems; --data is for --task jsonl and gsm8k")
    if settings.task == "reverse":
        return Reverse(**form)
    return Arithmetic(settings.max_operand, settings.min_operand, **form)
