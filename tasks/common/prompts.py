"""Prompt styles: what the model is told about the form of its answer.

A style defines a system message and the form of an ideal completion. Only `tasks/common/parsing.py` decides whether
a completion has that form.
"""

# The token limit of a completion, unless the task, the command line or the model's card sets another one.
STYLE_TOKENS = {"answer": 16, "think": 128, "reasoning": 256}
STYLES = tuple(STYLE_TOKENS)

THINK = "<think>"  # Some chat templates end each prompt with it.

_ASKED = {"integer": "the result as an integer", "number": "the result as a number", "text": "the answer"}
_EXAMPLE = "Answer with the {short} inside <answer> tags, like <answer>...</answer>."
_REASONING = (
    "Respond in the following format, with {} between the answer tags:\n"
    "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
)
_REASONING_FORM = _REASONING.replace("...", "steps", 1).replace("...", "{placeholder}", 1)
# The system prompts by wording and style. The starter was trained with "plain". tasks/README.md shows how well real
# models follow each wording.
_FORMS = {
    "form": {
        "answer": _EXAMPLE,
        "think": "Solve the problem. Answer only in this form: <think>steps</think><answer>{placeholder}</answer>",
        "reasoning": _REASONING_FORM,
    },
    "example": {
        "answer": _EXAMPLE,
        "think": "Think in <think>...</think>, then give {} in <answer>...</answer>.",
        "reasoning": _REASONING,
    },
    "plain": {
        "answer": "Give {} in <answer>...</answer>.",
        "think": "Think in <think>...</think>, then give {} in <answer>...</answer>.",
        "reasoning": _REASONING,
    },
}
WORDINGS = tuple(_FORMS)
DEFAULT_WORDING = "form"  # The default of --prompt-wording.
FIRST_WORDING = "plain"  # The starter, and models and runs of older versions, have this wording.


def system_prompt(style: str, kind: str = "integer", wording: str = FIRST_WORDING) -> str:
    """Return the system prompt for a prompt style, a kind of answer and a wording.

    >>> system_prompt("answer")
    'Give the result as an integer in <answer>...</answer>.'
    >>> system_prompt("answer", wording="form")
    'Answer with the result inside <answer> tags, like <answer>...</answer>.'
    """
    names = {"short": "answer", "placeholder": "..."} if kind == "text" else {"short": "result", "placeholder": kind}
    return _FORMS[wording][style].format(_ASKED[kind], **names)


def after_opening(completion: str, opening: str) -> str:
    """Return a completion without the `opening` that its prompt ends with: "<think>" and white space, or "".

    If the completion does not begin with <think>, the result begins with </think>, to close the prompt's <think>.

    >>> after_opening("<think>4 - 9 = -5</think><answer>-30</answer>", "<think>")
    '4 - 9 = -5</think><answer>-30</answer>'
    >>> after_opening("<answer>-30</answer>", "<think>")
    '</think><answer>-30</answer>'
    """
    tag = opening.strip()
    if completion.startswith(tag):
        return completion.removeprefix(tag)
    return tag.replace("<", "</") + completion


def ideal_completion(answer: str, style: str, working: str = "") -> str:
    """Return a completion in the form that the style asks for, with or without working before the answer.

    >>> ideal_completion("-30", "answer", "4 - 9 = -5")
    '4 - 9 = -5\\n<answer>-30</answer>'
    >>> ideal_completion("-30", "think", "4 - 9 = -5")
    '<think>4 - 9 = -5</think><answer>-30</answer>'
    >>> ideal_completion("-30", "reasoning", "4 - 9 = -5")
    '<reasoning>\\n4 - 9 = -5\\n</reasoning>\\n<answer>\\n-30\\n</answer>\\n'
    """
    if style == "reasoning":
        return f"<reasoning>\n{working}\n</reasoning>\n<answer>\n{answer}\n</answer>\n"
    block = f"<answer>{answer}</answer>"
    if style == "think":
        return f"<think>{working}</think>{block}"
    return f"{working}\n{block}" if working else block
