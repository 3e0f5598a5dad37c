"""Compose the README.md of the model that a run saves."""

import json
from collections.abc import Mapping
from typing import Any

from grpo.config import TrainConfig
from grpo.evaluation.intervals import accuracy_text
from grpo.record.schema import few_categories
from grpo.report.ending import drifted, sampled
from tasks.base import Task, prompt_of

# This text shows how to ask the model in other programs with the prompt and settings of the evaluations.
ELSEWHERE = """\
## Ask it in other programs

These lines ask the model as it was measured: greedily, with no repetition penalty, top-k or top-p, and with the same
prompt. Save the question as `request.json` in this folder, and run the lines there:

```json
{request}
```

transformers:

```python
import json
from transformers import pipeline

request = json.load(open("request.json", encoding="utf-8"))
model = pipeline("text-generation", ".", dtype="float32")
answers = model(request["messages"], max_new_tokens=request["max_tokens"], do_sample=False)
print(answers[0]["generated_text"][-1]["content"])
```

vLLM, with the second command in another terminal:

```
vllm serve . --served-model-name grpo --dtype float32
curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d @request.json
```

Ollama, for the architectures that it can import:

```
printf 'FROM .\\nPARAMETER temperature 0\\nPARAMETER repeat_penalty 1\\n' > Modelfile
ollama create grpo -f Modelfile
curl localhost:11434/v1/chat/completions -H "Content-Type: application/json" -d @request.json
```

The lines for vLLM and Ollama have not been tried. If Ollama does not know the chat template, write it into
`Modelfile` as `TEMPLATE`. To sample as in training, set the temperature to {temperature} and top-k to 0 (in vLLM -1).
"""


def saved_readme(
    config: TrainConfig,
    task: Task,
    best: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any] | None,
) -> str:
    """Return the text of saved_model/README.md: accuracies with n and interval, settings, and how to ask the model.

    `best` is an evaluation on validation problems; `before` and `after` are on test problems. `after` is None until
    the run ends.
    """
    lines = [
        f"# A model trained with GRPO on {' and '.join(config.task)}",
        "",
        f"Trained from `{config.model}`. The policy of step {best['step']} was the best on validation problems: "
        + (f"mean reward {best['reward']:.3f}, accuracy " if "reward" in best else "")
        + f"{accuracy_text(best)}.",
        "",
        "Accuracy in greedy decoding, with Wilson's 95% interval, on problems that were not trained on:",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    rows = [("test problems", before, after or {})]
    for name, was in few_categories(before).items():
        rows.append((f"category `{name}`", was, (after or {}).get("categories", {}).get(name, {})))
    for name, was in before.get("skills", {}).items():
        rows.append((f"skill `{name}`", was, (after or {}).get("skills", {}).get(name, {})))
    for name, was, now in rows:
        lines.append(f"| {name} | {accuracy_text(was)} | {accuracy_text(now) if now else 'not measured yet'} |")
    if config.sft_steps:
        lines += ["", f'"Before" was measured after {config.sft_steps} supervised steps on ideal completions.']
    if after:
        lines += ["", *(f"{line}.  " for line in drifted(after) + sampled(before, after))]
    lines += ["", "Settings:", "", "```"]
    lines += [f"{name} = {value}" for name, value in config.to_dict().items() if name != "output_dir"]
    lines += [
        "```",
        "",
        "`inference.py` reads the task, the prompt and the token limit from `grpo.json`.",
        "",
    ]
    request = {
        "model": "grpo",
        "temperature": 0,
        "max_tokens": config.max_new_tokens,
        "messages": prompt_of(task, task.held_out("validation", 1)[0]),
    }
    text = json.dumps(request, indent=2, ensure_ascii=False)
    lines.append(ELSEWHERE.format(request=text, temperature=config.temperature))
    return "\n".join(lines)
