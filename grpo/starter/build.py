"""Make the bundled starter model from nothing: `python -m grpo.starter.build`.

The starter has to be to the arithmetic task what a small instruct model is: it knows the format, it is
right now and then, and it can do more than it shows. So it is taught two ways to answer, both right:

    4 - 9 = -5              the first step written down, then the answer
    <answer>-30</answer>

    <answer>-30</answer>    at once

It is good at the first and poor at the second, for want of a place to put the intermediate result. The last
part of the training answers at once far more often, as hasty people do, and so does the model when
it decodes greedily. Nothing is damaged: GRPO finds that thinking first pays.

All data come from `tasks/`; no held-out problem is ever trained on. Seeded: the same number of threads on
the same machine gives the same weights.
"""

from pathlib import Path
from typing import Any

import click
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo.evaluation.evaluator import graded
from grpo.evaluation.intervals import accuracy_text
from grpo.generation.greedy import greedy
from grpo.model.language_model import LanguageModel
from grpo.model.saving import save
from grpo.model_card import STARTER, read_card
from grpo.scoring.tokens import Tokens
from grpo.sft import supervised_gradient, supervised_tokens
from grpo.starter.data import ARITHMETIC, BATCH, PROMPTS, SEED, example
from tasks.common.prompts import system_prompt
from tasks.skills import SKILLS

HASTY_FROM = 3300  # the step from which most problems are answered at once
STEPS = 3700
HASTE = (0.0, 0.7)  # share of arithmetic answered at once, before and after HASTY_FROM
LEARNING_RATE = (2e-3, 2e-4)  # falls linearly from the first to the second until HASTY_FROM …
HASTY_LEARNING_RATE = (3e-4, 2e-5)  # … and so until the end
WARM_UP = 200
WEIGHT_DECAY = 0.1
VOCABULARY = 336
MAX_NEW_TOKENS = read_card("starter")["settings"]["max_new_tokens"]

# Qwen2's pre-tokenizer, without English contractions: every digit is a token of its own.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<answer>", "</answer>", "<think>", "</think>", "<reasoning>", "</reasoning>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer with a token for each word of the prompts and for each tag.

    There are no merges: a word that is not in the vocabulary is spelled byte by byte, so any text can be
    written, and a made-up word is seen letter by letter.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    pieces = pre_tokenizers.Sequence([split, byte_level])
    counts: dict[str, int] = {}
    for row in range(2000):
        messages, completion = example(-1, row, haste=0.5)
        for text in ["assistant", *(word for m in messages for word in m.values()), completion]:
            for piece, _ in pieces.pre_tokenize_str(text):
                counts[piece] = counts.get(piece, 0) + 1
    words = sorted(piece for piece, n in counts.items() if n > 40 and len(piece) > 1)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build a Llama-shaped model of 1.0 million random weights.

    It is not Qwen2-shaped because transformers 5 loads the tokenizer of every such folder as Qwen2's own, which drops
    `ignore_merges` in silence and spells every word byte by byte.
    """
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batch(lm: LanguageModel, step: int) -> Tokens:
    """Return the tokens of a step, sorted by length, so that a part of them has little padding."""
    haste = HASTE[step >= HASTY_FROM]
    tokens = supervised_tokens(lm, *zip(*(example(step, row, haste) for row in range(BATCH)), strict=True))
    order = (tokens.prompt_mask.sum(-1) + tokens.completion_mask.sum(-1)).argsort(stable=True)
    every = (tokens.prompt_ids, tokens.prompt_mask, tokens.completion_ids, tokens.completion_mask)
    return Tokens(*(x[order] for x in every))


def learning_rate(step: int) -> float:
    """Return the learning rate: a linear warm-up, then two linear decays, until the hasty part and through it."""
    if step < WARM_UP:
        return LEARNING_RATE[0] * (step + 1) / WARM_UP
    if step < HASTY_FROM:
        (first, last), done = LEARNING_RATE, (step - WARM_UP) / (HASTY_FROM - WARM_UP)
    else:
        (first, last), done = HASTY_LEARNING_RATE, (step - HASTY_FROM) / (STEPS - HASTY_FROM)
    return last + (first - last) * (1 - done)


def train(lm: LanguageModel) -> None:
    """Train on the tokens of the completions, in float32."""
    model, progress = lm.model, tqdm(range(STEPS), desc="starter", mininterval=10)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    for step in progress:
        tokens = batch(lm, step)
        loss = supervised_gradient(model, tokens, int(tokens.completion_mask.sum()), True, BATCH // 3)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def card() -> dict[str, Any]:
    """Return the starter's `grpo.json`."""
    return {
        "task": "arithmetic",
        "prompt_style": "answer",
        "system_prompt": system_prompt("answer"),
        "max_new_tokens": MAX_NEW_TOKENS,
        "skills": list(SKILLS),
    }


def readme(lm: LanguageModel) -> str:
    """Return the starter's README.md, with the scores it has just been measured at."""
    wordings = {f"arithmetic, {style}, {kind}": ARITHMETIC[style, kind] for style, kind in PROMPTS}
    scores = []
    for name, task in {**wordings, **SKILLS}.items():
        problems = task.held_out("test", 1000)
        prompts = lm.prompts([task.messages(problem.question) for problem in problems])
        completions = greedy(lm, prompts, MAX_NEW_TOKENS).rows(with_end=False)
        result = graded(lm, task, problems, completions).to_dict()
        scores.append(f"| {name} | {accuracy_text(result)} | {100 * result['well_formed']:.1f}% |")
    return README.format(scores="\n".join(scores), haste=round(100 * HASTE[1]), steps=STEPS, batch=BATCH)


README = """# The starter model

A Llama-shaped model of 1.0 million float32 weights, trained from scratch by `python -m grpo.starter.build` on
problems that `tasks/` generates and on nothing else ({steps} steps of {batch} rows). It exists so that
`python train_grpo.py` shows GRPO at work in minutes, without a GPU or a download. It is no language model: it
knows the prompts of this project and hardly anything beyond.

**Why it starts low, and why GRPO helps.** It was taught two ways to answer `(a op b) op c`, both right: to write
the first step down and then answer, and to answer at once. The last part of its training answers {haste}% of such
problems at once, so that is what it does when it decodes greedily; and without a place for the intermediate
result it is mostly wrong. When it does write the step down it is nearly always right. GRPO finds this out from
the rewards. So the rise in accuracy is an ability brought out, not arithmetic learned from nothing; the same is
said of much larger models.

Greedy decoding, held-out test problems that it never trained on, Wilson 95% intervals:

| task, style and kind of answer asked for | accuracy | well-formed |
|---|---|---|
{scores}

`python train_grpo.py` trains the first. The skills are there to be watched: training on the task may spoil them.
"""


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=STARTER, show_default=True, help="folder to write")
def main(out: Path) -> None:
    """Train the starter and write its folder: about 40 minutes on 2 cores."""
    tokenizer = build_tokenizer()
    lm = LanguageModel(build_model(tokenizer).eval(), tokenizer, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    train(lm)
    save(out, lm, card(), readme(lm))


if __name__ == "__main__":
    main()
