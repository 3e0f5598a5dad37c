"""Prompt styles: what the model is told about the form of its answer.

A style is a system message and the form of an ideal completion. Only `tasks/parsing.py` decides whether
a completion has that form.
"""

from tasks.base import Message

SYSTEM_PROMPTS = {
    "answer": "Give the result as an integer in <answer>...</answer>.",
    "think": "Think in <think>...</think>, then give the result as an integer in <answer>...</answer>.",
}
STYLES = tuple(SYSTEM_PROMPTS)


def chat(question: str, system_prompt: str) -> list[Message]:
    """The messages that ask a question; the model's chat template turns them into a prompt."""
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]


def ideal_completion(answer: str, style: str, working: str = "") -> str:
    """A completion that the style asks for, with or without working before the answer.

    >>> ideal_completion("-30", "answer", "4 - 9 = -5")
    '4 - 9 = -5\\n<answer>-30</answer>'
    >>> ideal_completion("-30", "think", "4 - 9 = -5")
    '<think>4 - 9 = -5</think><answer>-30</answer>'
    """
    block = f"<answer>{answer}</answer>"
    if style == "think":
        return f"<think>{working}</think>{block}"
    return f"{working}\n{block}" if working else block
