"""out_dir/README.md: the student's model card, as model hubs show it.

Text that comes from rows, file names and flags stands in code, one line each, so that it cannot
become Markdown or YAML. Of a local path only the last part is told.
"""
import hashlib
import json
import math
import os
import re
import shlex
import textwrap
from collections import Counter

import torch
import transformers

from infra.command import one_line
from infra.files import atomic_write
from infra.models import is_hub_id
from infra.report import indented
from infra.rows import stream_rows

FLAGS = ("loss", "beta", "tau_temperature", "label_smoothing", "sft_weight", "learning_rate",
         "warmup_ratio", "weight_decay", "max_grad_norm", "epochs", "max_steps", "batch_size",
         "max_length", "eval_share", "seed", "template_kwargs", "lora_rank", "lora_alpha",
         "base_bits", "dtype", "save_dtype")

CARD = """\
---
# Before you publish this folder: fill in the license, which follows the base model's, and leave out
# args.json and state/. They tell local paths, as adapter_config.json does of a local base.
# license: fill in
{metadata}
---
# A student of {base}

Trained from {origin}, with the loss `{loss}` of rdpo, an implementation of refined DPO
([arXiv:2402.08005](https://arxiv.org/abs/2402.08005)).

## Training

{training}

Validation pairs before and after training; log-probabilities in nats:

{validation}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r})
{load}
{inputs}
output = model.generate(**inputs, max_new_tokens=256, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

```bash
vllm serve {served}
python convert_hf_to_gguf.py {whole} --outfile student.gguf      # of llama.cpp
llama-quantize student.gguf student-Q4_K_M.gguf Q4_K_M
```
"""

LOAD_MODEL = 'model = AutoModelForCausalLM.from_pretrained({name!r}, dtype="auto")'

LOAD_ADAPTER = """\
from peft import PeftModel

# Merge the adapter into its base in float32: a 16-bit sum rounds most of the change away.
base = AutoModelForCausalLM.from_pretrained({base!r}, dtype="float32")
model = PeftModel.from_pretrained(base, {name!r}).merge_and_unload()
model.save_pretrained("merged")
tokenizer.save_pretrained("merged")"""

CHAT_INPUTS = """\
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,
                                       return_tensors="pt")"""

TEXT_INPUTS = r'inputs = tokenizer("Hello\n\n", return_tensors="pt")'


def write_card(args, tokenizer, train_pairs, val_pairs, lines):
    """Write out_dir/README.md whole. lines are the text that tells how the student validated."""
    metadata = {"library_name": "peft" if args.save_adapter else "transformers",
                "pipeline_tag": "text-generation",
                "tags": ["rdpo", "dpo" if args.loss == "rdpo" else args.loss]}
    if args.model is None:
        base, origin = "toy/student", "the toy student that rdpo bundles and no hub has"
    elif is_hub_id(args.model):
        base, origin = args.model, "that model"
        metadata["base_model"] = base  # the hub links to it
    else:
        base, origin = last_part(args.model), "a local folder of that name"
    name = last_part(args.out_dir)
    load, served, whole = LOAD_MODEL, shlex.quote(name), shlex.quote(name)
    if args.save_adapter:
        rank = max(8, 1 << (args.lora_rank - 1).bit_length())  # vLLM: powers of two from 8 on
        served = (f"{shlex.quote(base)} --enable-lora --max-lora-rank {rank} "
                  f"--lora-modules student={whole}")
        load, whole = LOAD_ADAPTER, "merged"
    card = CARD.format(
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items()),
        base="`" + base.replace("`", "'") + "`", origin=origin, loss=args.loss, name=name,
        training=indented("\n".join(training_lines(args, train_pairs, val_pairs))),
        validation=indented("\n".join(lines)), load=load.format(base=base, name=name),
        inputs=CHAT_INPUTS if tokenizer.chat_template else TEXT_INPUTS, served=served, whole=whole)
    atomic_write(os.path.join(args.out_dir, "README.md"), card)


def training_lines(args, train_pairs, val_pairs):
    """What the student was trained on and how, as lines of plain text."""
    lines = []
    for path in args.data + (args.eval_data or []):
        train, val = (sum(pair.path == path for pair in pairs)
                      for pairs in (train_pairs, val_pairs))
        lines += [f"data: {last_part(path)}, {content_of(path, args)}",
                  f"      {train} pairs to train on, {val} for validation"]
    judges = Counter((pair.judge, pair.scale) for pair in train_pairs + val_pairs
                     if not math.isnan(pair.lean))
    for (judge, scale), count in judges.items():
        # A judge may be named by the path of its weights.
        judge = re.sub(r"(?<!\S)[/~.]\S*/", "", judge) or "not named"
        width = f", scale of {scale:g} points widened to 5" if scale not in (None, 5) else ""
        lines.append(f"judge: {one_line(judge)}{width}, {count} pairs")
    flags = " ".join(f"--{name}={json.dumps(vars(args)[name]).strip(chr(34))}" for name in FLAGS
                     if vars(args)[name] is not None)
    flags += f"; torch {torch.__version__}, transformers {transformers.__version__}"
    return lines + textwrap.wrap(one_line(f"flags: {flags}"), 90, subsequent_indent=" " * 7,
                                 break_on_hyphens=False)


def content_of(path, args):
    """The number of rows of a data file and its sha256, if it still is what the run has read."""
    began = os.path.getmtime(os.path.join(args.out_dir, "args.json"))
    if not os.path.isfile(path) or os.path.getmtime(path) > began:  # a pipe, say
        return "not kept"
    rows = sum(1 for _ in stream_rows(path, on_bad=lambda error: None))
    with open(path, "rb") as file:
        return f"{rows} rows, sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"


def last_part(path):
    return one_line(os.path.basename(os.path.abspath(path)))
