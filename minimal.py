"""Refined DPO in one file: the slow and obvious way, one answer at a time, on one device.

    python minimal.py toy/scored.jsonl         trains the toy student, a minute on a laptop

It needs rows with prompt, chosen, rejected, score_chosen and score_rejected; scores are from 0 to
5. train.py gives the same losses and is fast, checks its input and resumes. Read this file first.
"""
import json
import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

path, out_dir = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "out-minimal"
beta, temperature, learning_rate, batch_size = 0.1, 1.0, 3e-4, 16

# The student. It stays in eval mode: dropout would add noise to the log-ratios.
tokenizer = AutoTokenizer.from_pretrained("toy/student")
policy = AutoModelForCausalLM.from_pretrained("toy/student", dtype=torch.float32).eval()


def encode(prompt, answer=None):
    """Token ids of a chat: a user's prompt and, with its end-of-turn token, an answer.

    The toy's prompts end with a control token, so no token spans prompt and answer.
    """
    chat = [{"role": "user", "content": prompt}]
    if answer is not None:
        chat.append({"role": "assistant", "content": answer})
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer is None)
    return tokenizer(text, add_special_tokens=False).input_ids


def logp(ids, start):
    """log pi(answer | prompt): the sum over the answer's tokens, which begin at ids[start]."""
    ids = torch.tensor([ids])  # (1, L)
    logits = policy(input_ids=ids).logits[0, :-1]  # (L-1, V): position t predicts token t + 1
    logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]  # (L-1,)
    return logps[start - 1:].sum()


def answer(prompt):
    ids = torch.tensor([encode(prompt)])  # (1, L)
    output = policy.generate(ids, max_new_tokens=64, do_sample=False)  # (1, L + L_new)
    return tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True)


# The data: token ids of each pair, and tau, the judge's probability that chosen beats rejected.
rows = [json.loads(line) for line in open(path, encoding="utf-8")]
pairs = [(encode(row["prompt"], row["chosen"]), encode(row["prompt"], row["rejected"]),
          len(encode(row["prompt"]))) for row in rows]
gaps = torch.tensor([float(row["score_chosen"] - row["score_rejected"]) for row in rows])  # (P,)
tau = torch.sigmoid(gaps / temperature)  # (P,)

# The reference is the student before training: its log-probabilities are computed once.
with torch.no_grad():
    ref_log_odds = [logp(chosen, start) - logp(rejected, start)
                    for chosen, rejected, start in pairs]
print(f"before: {answer(rows[0]['prompt'])}")

# The loop: one optimizer step per batch_size pairs, in random order.
optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
order = np.random.default_rng([0, 0]).permutation(len(pairs))  # [seed, epoch]
steps = math.ceil(len(pairs) / batch_size)
for step in range(steps):
    batch = order[step * batch_size:(step + 1) * batch_size]
    mean_loss = 0.0
    for i in batch:
        chosen, rejected, start = pairs[i]
        margin = beta * (logp(chosen, start) - logp(rejected, start) - ref_log_odds[i])
        # Cross-entropy of the policy's preference sigmoid(margin) against tau. Its gradient by the
        # margin is sigmoid(margin) - tau: learning stops where the student agrees with the judge.
        loss = -tau[i] * F.logsigmoid(margin) - (1 - tau[i]) * F.logsigmoid(-margin)
        (loss / len(batch)).backward()
        mean_loss += loss.item() / len(batch)
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    warmup = 0.1 * steps  # a rising learning rate, then a cosine to 0
    rate = ((step + 1) / (warmup + 1) if step < warmup
            else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)
    optimizer.param_groups[0]["lr"] = learning_rate * rate
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1:3d} of {steps}  loss {mean_loss:.6f}", flush=True)

print(f"after:  {answer(rows[0]['prompt'])}")
policy.save_pretrained(out_dir)
tokenizer.save_pretrained(out_dir)
