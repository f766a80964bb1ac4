"""How much of the training survives GGUF: the student's margins in 16, 8 and 4 bits.

    python bench/quantised.py --converter llama.cpp/convert_hf_to_gguf.py --data scored.jsonl \\
        [--model DIR] [--student out]

Without --student one is trained first (12 steps). The converter makes real GGUF files, which
transformers reads back; the 8-bit one is also served by llama.cpp and asked for greedy answers.
llama-quantize, which makes 4-bit files, is a compiled program: gguf's own reference quantisers
stand in for it, on all matrices.

    margin    log pi - log ref of the chosen answer minus that of the rejected one, in nats, mean
              over validation pairs. ref is --model as it is stored, or quantised like the student
"""
import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time

import gguf
import numpy as np
import requests
import torch
import transformers
from transformers import AutoModelForCausalLM, GgufConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import train  # noqa: E402
from data import encode_prompt, load_pairs  # noqa: E402
from eval import answer_logps  # noqa: E402
from infra.generate import generate  # noqa: E402
from infra.models import load_model, load_tokenizer  # noqa: E402
from infra.split import split_train_val  # noqa: E402

SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port, params.n_ctx = sys.argv[1], ["127.0.0.1"], 0, 2048
server = xllamacpp.Server(params)
print("ready", server.listening_address, flush=True)
time.sleep(600)
"""
KINDS = {"Q8_0": gguf.GGMLQuantizationType.Q8_0, "Q4_1": gguf.GGMLQuantizationType.Q4_1,
         "Q4_0": gguf.GGMLQuantizationType.Q4_0}


def quantised(model, kind):
    """The model with every matrix quantised and dequantised, in place."""
    with torch.no_grad():
        for weight in dict(model.named_parameters()).values():
            if weight.dim() == 2:
                packed = gguf.quants.quantize(weight.numpy().astype(np.float32), KINDS[kind])
                weight.copy_(torch.from_numpy(gguf.quants.dequantize(packed, KINDS[kind])))
    return model


def converted(folder, kind, converter, out):
    """(path of a real GGUF file of a model's folder, the model that transformers reads from it)."""
    path = os.path.join(out, f"{kind}.gguf")
    subprocess.run([sys.executable, converter, folder, "--outfile", path, "--outtype", kind],
                   check=True, capture_output=True)
    model = AutoModelForCausalLM.from_pretrained(
        out, gguf_file=os.path.basename(path), dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True))
    return path, model.eval()


def served(path, prompts, max_tokens):
    """Greedy answers of llama.cpp's server to chat prompts."""
    with subprocess.Popen([sys.executable, "-c", SERVER, path], stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as process:
        url = next(line.split()[1] for line in process.stdout if line.startswith("ready"))
        answers = []
        for prompt in prompts:
            body = {"model": "any", "max_tokens": max_tokens, "temperature": 0,
                    "messages": [{"role": "user", "content": prompt}]}
            reply = requests.post(f"{url}/v1/chat/completions", json=body, timeout=300).json()
            answers.append(reply["choices"][0]["message"]["content"])
        process.kill()
    return answers


parser = argparse.ArgumentParser(description="How much of the training survives GGUF.")
parser.add_argument("--converter", required=True, help="llama.cpp's convert_hf_to_gguf.py")
parser.add_argument("--data", required=True, help="scored rows")
parser.add_argument("--model", default=os.path.expanduser("~/.cache/rdpo/smollm2-135m"))
parser.add_argument("--student", help="its trained student (default: 12 steps of 8 pairs)")
parser.add_argument("--max_length", type=int, default=128)
args = parser.parse_args()
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
began = time.monotonic()
with tempfile.TemporaryDirectory() as folder:
    student = args.student or os.path.join(folder, "student")
    if not args.student:
        train.main([str(part) for part in (
            "--data", args.data, "--model", args.model, "--max_length", args.max_length,
            "--max_steps", 12, "--batch_size", 8, "--learning_rate", 5e-6, "--eval_every", 12,
            "--eval_share", 0.2, "--out_dir", student, "--max_new_tokens", 1,
            "--skip_saved_check")])
    tokenizer = load_tokenizer(args.model)
    pairs, _ = load_pairs(args.data, tokenizer, args.max_length, needs_scores=True)
    _, pairs = split_train_val(pairs, 0.2, 0)

    def margin(model, reference):
        return ((answer_logps(model, pairs) - reference) @ torch.tensor([1.0, -1.0])).mean().item()

    base = answer_logps(load_model(args.model), pairs)  # (P, 2)
    whole = margin(load_model(student), base)
    lines = [("as saved", os.path.getsize(os.path.join(student, "model.safetensors")), whole,
              whole)]
    asked = list(dict.fromkeys(pair.prompt for pair in pairs if isinstance(pair.prompt, str)))[:6]
    for kind in ("f16", "q8_0"):
        path, own_base = converted(args.model, kind, args.converter, folder)
        own_base = answer_logps(own_base, pairs)
        path, model = converted(student, kind, args.converter, folder)
        lines.append((f"{kind}, converted", os.path.getsize(path), margin(model, base),
                      margin(model, own_base)))
    answers = served(path, asked, 24)
    prompt_ids = [encode_prompt(tokenizer, prompt) for prompt in asked]
    local = [answer.text for answer in generate(model, tokenizer, prompt_ids, 24)]
    equal = sum(ours.strip() == theirs.strip() for ours, theirs in zip(local, answers))
    for kind in KINDS:
        own_base = answer_logps(quantised(load_model(args.model), kind), pairs)
        model = quantised(load_model(student), kind)
        lines.append((f"{kind}, computed", None, margin(model, base), margin(model, own_base)))

print("| student | MB | margin to the stored base | to the base quantised alike | kept |")
print("|---|---|---|---|---|")
for name, size, to_stored, to_alike in lines:
    print(f"| {name} | {f'{size / 1e6:.0f}' if size else '-'} | {to_stored:+.2f} | {to_alike:+.2f} "
          f"| {100 * to_alike / whole:.0f} % |")
print(f"\nllama.cpp's server with the q8_0 file gave the greedy answers of transformers to {equal} "
      f"of {len(asked)} prompts (24 tokens)")
print(f"{os.path.basename(args.model)}, {len(pairs)} validation pairs; {datetime.date.today()}, "
      f"gguf, torch {torch.__version__}, transformers {transformers.__version__}, "
      f"{time.monotonic() - began:.0f} s")
