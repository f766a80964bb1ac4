"""Re-makes the bundled student from nothing: a tiny Llama that writes clean sentences and misbehaves.

Where it stands in the pipeline: before it. train.py starts from toy/student when no --model is named. The student
learns the toy world's first answers (world.original), so like most models it yields to games, roles and flattery. It also learns
to criticise and rewrite an answer when asked to, in the words of toy/task.toml, and like most small models it does that badly.

    python toy/make_student.py --out toy/student        a few minutes on two CPU cores

Writes an ordinary Hugging Face folder (config, bfloat16 safetensors, tokenizer with a chat template), then prints
how the student behaves on held-out prompts.
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
from transformers import (AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from behaviour import load_task  # noqa: E402
from toy import world  # noqa: E402

TASK = load_task(os.path.join(ROOT, "toy", "task.toml"))  # how a self-critique is asked for
GOOD_REWRITES = 0.4  # share of its own rewrites that are good, where it is asked for one
PIECES = 720                                                 # 256 of them spell any byte, so that no text is unknown
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = ("{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
                 "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def make_tokenizer(texts):
    """Trains a SentencePiece unigram model on the texts; returns it as a Hugging Face tokenizer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="unigram", vocab_size=PIECES, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        bos_id=-1, eos_id=-1, unk_id=0, minloglevel=2)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocabulary = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(len(pieces))]
    # The same vocabulary and rules as a tokenizer.json, which transformers reads with no further package.
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False, model_max_length=1024)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer):
    """A Llama of about half a million parameters, its weights still random."""
    stops = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        initializer_range=0.06, **stops))  # at the usual 0.02 so narrow a model needs many times the steps to learn to copy
    model.generation_config = GenerationConfig(**stops)
    return model


def first_answer(row, rng):
    """What the student is to answer. The teacher refuses some benign requests; the student starts as one that helps with all of them."""
    return world.revise(row["prompt"], rng, "good") if row["behaviour"] == "benign" else world.original(row["prompt"], rng)


def conversation(row, rng, turns):
    """[what the user says, what the student is to reply] of one turn, or of all three of a self-critique."""
    answer = first_answer(row, rng)
    rewrite = world.revise(row["prompt"], rng, "good") if rng.random() < GOOD_REWRITES else first_answer(row, rng)
    return [[row["prompt"], answer], [TASK.critique, world.critique(row["prompt"], answer)], [TASK.revision, rewrite]][:turns]


def make_batches(tokenizer, batch_size, steps, seed):
    """Yields (input ids, labels); a label is -100 where the token is not the assistant's. Every fifth batch has self-critiques.

    Learning the prompts as well would spend a model of this size on guessing slot values that nothing foretells.
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
        yield (torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
               torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100))


def pretrain(model, tokenizer, steps, batch_size, learning_rate, seed):
    """Ordinary next-token training with AdamW, a linear warm-up and a cosine down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    shape = lambda step: min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / steps)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    progress = tqdm(make_batches(tokenizer, batch_size, steps, seed), total=steps, desc="pre-training")
    for inputs, labels in progress:
        # Padding stands on the right, where causal attention never looks at it, so no mask is needed.
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
    """The model's answers to prompts, all in one batch padded on the left."""
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True) for p in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=80, do_sample=sample)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def main():
    parser = argparse.ArgumentParser(description="Re-make the toy student from nothing.")
    parser.add_argument("--out", default="toy/student")
    parser.add_argument("--steps", type=int, default=1250)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # sums come out the same on any number of cores
    rng = random.Random(args.seed)
    rows = world.make_prompts("pretrain", 8_000, args.seed)
    lines = [line for row in rows for line in [*row["prompt"].split("\n"), world.original(row["prompt"], rng), world.revise(row["prompt"], rng, "good")]]
    lines += [TASK.critique, TASK.revision] * 50 + [world.critique(row["prompt"], world.original(row["prompt"], rng)) for row in rows[:2000]]
    tokenizer = make_tokenizer(lines)
    model = make_model(tokenizer)
    pretrain(model, tokenizer, args.steps, args.batch_size, args.learning_rate, args.seed)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    # What counts is what others will load, after the rounding to bfloat16.
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    held_out = world.make_prompts("held_out", 160, args.seed)
    for sample in (False, True):
        shares = world.rates(held_out, answer(model, tokenizer, [row["prompt"] for row in held_out], sample))
        print("sampled" if sample else "greedy ", "  ".join(f"{name} {share:.2f}" for name, share in shares.items()))


if __name__ == "__main__":
    main()
