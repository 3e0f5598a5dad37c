"""Train the bundled starter model from scratch: `python -m grpo.starter.build`.

It learns two ways to answer (4 - 9) * 6: to write the first step `4 - 9 = -5` and then the answer, or to give the
answer directly. The last part of the training has mostly direct answers. README.md beside this file says why.

All data come from the training problems of `tasks/`. On one machine, the same number of threads gives the same
weights.
"""

import re
from pathlib import Path

import click
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo.evaluation.evaluator import TEST_PROBLEMS, graded
from grpo.evaluation.intervals import accuracy_text
from grpo.generation.greedy import greedy
from grpo.model.language_model import LanguageModel
from grpo.model.saving import save
from grpo.model_card import STARTER, read_card
from grpo.scoring.attention.packed import enable
from grpo.scoring.scorer import Scorer
from grpo.scoring.tokens import Tokens, tokens_of
from grpo.sft import supervised_gradient
from grpo.starter.data import ARITHMETIC, BATCH, PROMPTS, SEED, example
from tasks.common.prompts import system_prompt
from tasks.skills import SKILLS

STEPS = 3700
DIRECT_FROM = 3300  # the first training step that has direct answers
DIRECT_SHARE = 0.7  # share of the arithmetic problems with direct answers from then on
WARM_UP = 200  # The learning rate rises during this many steps.
LEARNING_RATE = (2e-3, 2e-4)  # first and last; it falls linearly from step WARM_UP to step DIRECT_FROM
DIRECT_LEARNING_RATE = (3e-4, 2e-5)  # first and last; it falls linearly from step DIRECT_FROM to the end
WEIGHT_DECAY = 0.1
VOCABULARY = 336
MAX_NEW_TOKENS = read_card("starter")["settings"]["max_new_tokens"]

# This is Qwen2's pre-tokenizer without English contractions. Each digit is one token.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<answer>", "</answer>", "<think>", "</think>", "<reasoning>", "</reasoning>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer with a token for each frequent word of the training data and for each tag.

    There are no merges: a word that is not in the vocabulary is spelled byte by byte. So the tokenizer can encode any
    text, and each letter of an invented word is a token.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    pieces = pre_tokenizers.Sequence([split, byte_level])
    counts: dict[str, int] = {}
    for row in range(2000):
        messages, completion = example(-1, row, direct_share=0.5)
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
    """Build a Llama-shaped model with 1.0 million random weights."""
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
    """Return the tokens of a step, with rows sorted by length so that a micro-batch has little padding."""
    direct_share = DIRECT_SHARE if step >= DIRECT_FROM else 0.0
    examples = [example(step, row, direct_share) for row in range(BATCH)]
    prompts = lm.prompts([chat for chat, _ in examples])
    completions = [lm.completion(text) for _, text in examples]
    order = sorted(range(BATCH), key=lambda row: len(prompts[row]) + len(completions[row]))
    return tokens_of([prompts[row] for row in order], [completions[row] for row in order], lm.pad_id, lm.model.device)


def learning_rate(step: int) -> float:
    """Return the rate of a step: a linear rise, a linear fall to step DIRECT_FROM, a second fall to the end."""
    if step < WARM_UP:
        return LEARNING_RATE[0] * (step + 1) / WARM_UP
    is_direct = step >= DIRECT_FROM
    first, last = DIRECT_LEARNING_RATE if is_direct else LEARNING_RATE
    start, end = (DIRECT_FROM, STEPS) if is_direct else (WARM_UP, DIRECT_FROM)
    return last + (first - last) * (1 - (step - start) / (end - start))


def train(lm: LanguageModel) -> None:
    """Train on the tokens of the completions, in float32."""
    model = lm.model
    enable(model)
    scorer = Scorer(shares_prompts=True)
    progress = tqdm(range(STEPS), desc="starter", mininterval=10)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    for step in progress:
        tokens = batch(lm, step)
        loss = supervised_gradient(model, tokens, int(tokens.completion_mask.sum()), scorer, BATCH // 3)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def readme(lm: LanguageModel) -> str:
    """Return the README.md of the bundled starter with the scores of this model in its table."""
    text = (STARTER / "README.md").read_text(encoding="utf-8")
    arithmetic = {f"arithmetic, {style}, {kind}": ARITHMETIC[style, kind] for style, kind in PROMPTS}
    for name, task in {**arithmetic, **SKILLS}.items():
        problems = task.held_out("test", TEST_PROBLEMS)
        prompts = lm.prompts([task.messages(problem.question) for problem in problems])
        completions = greedy(lm, prompts, MAX_NEW_TOKENS).rows(with_end=False)
        result = graded(lm, task, problems, completions).to_dict()
        row = f"| {name} | {accuracy_text(result)} | {100 * result['well_formed']:.1f}% |"
        text = re.sub(rf"^\| {name} \|.*", row, text, flags=re.MULTILINE)
    return text


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=STARTER, show_default=True, help="folder to write")
def main(out: Path) -> None:
    """Train the starter and write its folder: about 40 minutes on 2 cores."""
    tokenizer = build_tokenizer()
    lm = LanguageModel(build_model(tokenizer).eval(), tokenizer, (tokenizer.eos_token_id,), tokenizer.pad_token_id)
    train(lm)
    card = {
        "task": "arithmetic",
        "prompt_style": "answer",
        "system_prompt": system_prompt("answer"),
        "max_new_tokens": MAX_NEW_TOKENS,
        "skills": list(SKILLS),
    }
    save(out, lm, card, readme(lm))


if __name__ == "__main__":
    main()
