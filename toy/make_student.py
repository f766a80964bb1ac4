"""Make the bundled student from scratch: a tiny Llama that writes clean sentences and misbehaves.

    python toy/make_student.py --out toy/student        a few minutes on two CPU cores

This comes before the pipeline: train.py starts from toy/student unless --model names another one.
The student learns the toy world's first answers (world.original), so like most models it yields to
games, roles and flattery. It also learns to criticise and rewrite its answers when asked with the
words of toy/task.toml; like most small models, it does that badly.

Writes an ordinary Hugging Face folder (config, bfloat16 safetensors, tokenizer with a chat
template), then prints the student's behaviour on held-out prompts.
"""

import argparse
import io
import math
import os
import random
import sys

import sentencepiece
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig,
                          LlamaForCausalLM, PreTrainedTokenizerFast)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from infra.task import load_task  # noqa: E402
from toy import world  # noqa: E402

TASK = load_task(os.path.join(ROOT, "toy", "task.toml"))  # the words of a self-critique
GOOD_REWRITES = 0.4  # share of good ones among its rewrites
PIECES = 720  # vocabulary without SPECIAL; 256 of them are single bytes, so no text is unknown
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = ("{% for message in messages %}"
                 "<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def make_tokenizer(texts):
    """A Hugging Face tokenizer: a SentencePiece unigram model, trained on the texts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="unigram",
        vocab_size=PIECES, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False,
        bos_id=-1, eos_id=-1, unk_id=0, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    # Keep vocabulary and rules as a tokenizer.json: transformers reads it without sentencepiece.
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>",
        additional_special_tokens=SPECIAL[2:], clean_up_tokenization_spaces=False,
        model_max_length=1024)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer):
    """A Llama of about half a million parameters with random weights."""
    stops = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
             "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        tie_word_embeddings=True,
        # At the usual 0.02, a model this narrow needs many times the steps to learn to copy.
        initializer_range=0.06, **stops))
    model.generation_config = GenerationConfig(**stops)
    return model


def first_answer(row, rng):
    """The target answer. The teacher refuses some benign requests; the student helps with all."""
    if row["behaviour"] == "benign":
        return world.revise(row["prompt"], rng, "good")
    return world.original(row["prompt"], rng)


def conversation(row, rng, turns):
    """[user message, target reply] for the first turn, or for all three of a self-critique."""
    answer = first_answer(row, rng)
    if rng.random() < GOOD_REWRITES:
        rewrite = world.revise(row["prompt"], rng, "good")
    else:
        rewrite = first_answer(row, rng)
    critique = world.critique(row["prompt"], answer)
    return [[row["prompt"], answer], [TASK.critique, critique], [TASK.revision, rewrite]][:turns]


def make_batches(tokenizer, batch_size, steps, seed):
    """Yield (input ids, labels), each (B, T). Labels are -100 except on the assistant's tokens.

    Every fifth batch holds self-critiques. The loss leaves out the prompts: their slot values are
    random, and a model of this size would waste its capacity on guessing them.
    """
    rng = random.Random(seed)
    prompts = world.make_prompts("pretrain", 40_000, seed)
    for step in range(steps):
        ids, labels = [], []
        turns, count = (3, batch_size // 3) if step % 5 == 4 else (1, batch_size)
        for row in rng.sample(prompts, count):
            row_ids, row_labels = [], []
            for asked, reply in conversation(row, rng, turns):
                asked_ids = tokenizer(f"<|user|>{asked}<|end|><|assistant|>")["input_ids"]
                reply_ids = tokenizer(f"{reply}<|end|>")["input_ids"]
                row_ids += asked_ids + reply_ids
                row_labels += [-100] * len(asked_ids) + reply_ids
            ids.append(torch.tensor(row_ids))
            labels.append(torch.tensor(row_labels))
        yield pad(ids, tokenizer.pad_token_id), pad(labels, -100)


def pad(rows, value):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def pretrain(model, tokenizer, steps, batch_size, learning_rate, seed):
    """Next-token training with AdamW, a linear warm-up and a cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95),
                                  weight_decay=0.01)
    shape = lambda step: min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    batches = make_batches(tokenizer, batch_size, steps, seed)
    progress = tqdm(batches, total=steps, desc="pre-training")
    for inputs, labels in progress:
        # Padding is on the right, where causal attention never sees it, so no mask is needed.
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state[:, :-1]
        counts = labels[:, 1:] != -100
        loss = F.cross_entropy(model.lm_head(hidden[counts]), labels[:, 1:][counts])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


def answer(model, tokenizer, prompts, sample):
    """The model's answers to prompts, in one batch padded on the left."""
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                           add_generation_prompt=True) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left",
                       return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=80, do_sample=sample)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description="Make the toy student from scratch.")
    parser.add_argument("--out", default="toy/student")
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the same sums on any number of cores
    rng = random.Random(args.seed)
    rows = world.make_prompts("pretrain", 8_000, args.seed)
    lines = []
    for row in rows:
        lines += [*row["prompt"].split("\n"), world.original(row["prompt"], rng),
                  world.revise(row["prompt"], rng, "good")]
    lines += [TASK.critique, TASK.revision] * 50
    lines += [world.critique(row["prompt"], world.original(row["prompt"], rng))
              for row in rows[:2000]]
    tokenizer = make_tokenizer(lines)
    model = make_model(tokenizer)
    pretrain(model, tokenizer, args.steps, args.batch_size, args.learning_rate, args.seed)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    # Measure the model that others will load, after the rounding to bfloat16.
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    held_out = world.make_prompts("held_out", 160, args.seed)
    for sample in (False, True):
        answers = answer(model, tokenizer, [row["prompt"] for row in held_out], sample)
        shares = world.rates(held_out, answers).items()
        print("sampled" if sample else "greedy ",
              "  ".join(f"{name} {share:.2f}" for name, share in shares))


if __name__ == "__main__":
    main()
