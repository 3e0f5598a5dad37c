"""Saved models have the same prompts, logits and greedy tokens in transformers 4.57.

The tests need a second Python with transformers 4.57 and torch: GRPO_OLD_PYTHON has its path. Without that variable,
they make a virtual environment with the torch of this Python, and download transformers (about 60 MB).
"""

import json
import os
import subprocess
import venv
from pathlib import Path

import pytest
import torch

from grpo.generation.greedy import greedy
from grpo.model.language_model import LanguageModel, encode_chat
from grpo.model.loading import load
from grpo.model.saving import save
from tasks.arithmetic import Arithmetic
from tests.helpers import zoo
from tests.helpers.smollm2 import IS_THERE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CHAT = Arithmetic().messages("What is (4 - 9) * 6?")
CPU = torch.device("cpu")
TOKENS = 24
NAMES = ("starter", *zoo.KINDS, *["smollm2"] * IS_THERE)

# Prints as JSON, for each model folder: prompt, logits after it, greedy tokens, ids that end a turn.
SCRIPT = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {"version": transformers.__version__}
for folder in sys.argv[3:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = tokenizer.apply_chat_template(json.loads(sys.argv[1]), add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(chat, add_special_tokens=False)["input_ids"]])
    mask, limit = torch.ones_like(ids), int(sys.argv[2])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[0, -1]
    greedy = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, do_sample=False)
    found[folder] = {
        "prompt": ids[0].tolist(),
        "logits": logits.tolist(),
        "greedy": greedy[0, ids.shape[1]:].tolist(),
        "ends": model.generation_config.eos_token_id,
        "dtype": str(model.dtype),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory) -> str:
    """Return a Python with transformers 4.57."""
    if given := os.environ.get("GRPO_OLD_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([python, "-m", "pip", "install", "-q", "transformers==4.57.*"], check=True, timeout=800)
    [packages] = folder.rglob("site-packages")
    (packages / "torch_of_the_other.pth").write_text(str(Path(torch.__file__).parents[1]), encoding="utf-8")
    return str(python)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[Path, LanguageModel]]:
    """Save each model; return its folder and the model, by name."""
    root = tmp_path_factory.mktemp("models")
    models = {name: load(str(zoo.build(root / name, name)) if name in zoo.KINDS else name, CPU) for name in NAMES}
    for name, lm in models.items():
        save(root / f"saved-{name}", lm, {}, "")
    return {name: (root / f"saved-{name}", lm) for name, lm in models.items()}


@pytest.fixture(scope="module")
def found(old_python, saved) -> dict[str, dict]:
    """Return the output of SCRIPT with transformers 4.57 for each saved model, by name."""
    command = [
        old_python,
        "-c",
        SCRIPT,
        json.dumps(CHAT),
        str(TOKENS),
        *(str(folder) for folder, _ in saved.values()),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["version"].startswith("4.57."), f"{old_python} has transformers {result['version']}"
    return {name: result[str(folder)] for name, (folder, _) in saved.items()}


@pytest.mark.parametrize("name", NAMES)
def test_transformers_4_gives_the_same_prompt_logits_and_greedy_tokens(name, saved, found):
    lm, old = saved[name][1], found[name]
    assert old["prompt"] == encode_chat(lm.tokenizer, CHAT)
    assert old["dtype"] == "torch.float32"
    assert old["ends"] == (list(lm.end_ids) if len(lm.end_ids) > 1 else lm.end_ids[0])
    ids = torch.tensor([old["prompt"]])
    with torch.no_grad():
        logits = lm.model(ids).logits[0, -1]
    torch.testing.assert_close(torch.tensor(old["logits"]), logits, atol=1e-4, rtol=0)
    assert old["greedy"] == greedy(lm, ids.tolist(), TOKENS).ids[0].tolist()
    assert len(set(old["greedy"])) > 3, "too uniform to say anything"
