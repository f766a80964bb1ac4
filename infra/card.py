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
from infra.models import is_hub_id
from infra.plots import read_metrics
from infra.report import indented
from infra.rows import atomic_write, stream_rows
from infra.runlog import TABLE_HEAD, table_line

FLAGS = ("loss", "beta", "tau_temperature", "label_smoothing", "sft_weight", "learning_rate", "warmup_ratio",
         "weight_decay", "max_grad_norm", "epochs", "max_steps", "batch_size", "max_length",
         "eval_share", "seed", "template_kwargs", "lora_rank", "lora_alpha", "dtype", "save_dtype")

CARD = """\
---
# Before you publish this folder: fill in the license, which follows the base model's, and leave out
# args.json and state/. They tell local paths, as adapter_config.json does of a local base.
# license: fill in
{metadata}
---
# A student of {base}

Trained from {base_in_words}, with the loss `{loss}` of rdpo, an implementation of refined DPO
([arXiv:2402.08005](https://arxiv.org/abs/2402.08005)).

## Training

{training}

Validation pairs, before the first step and after the last; log-probabilities in nats:

{validation}

## Use
{use}"""

MODEL_USE = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name!r})
model = AutoModelForCausalLM.from_pretrained({name!r}, dtype="auto")
{inputs}
output = model.generate(**inputs, max_new_tokens=256, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

```bash
vllm serve {folder}
python convert_hf_to_gguf.py {folder} --outfile student.gguf      # of llama.cpp
llama-quantize student.gguf student-Q4_K_M.gguf Q4_K_M
```
"""

CHAT_INPUTS = """\
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,
                                       return_tensors="pt")"""

TEXT_INPUTS = r'inputs = tokenizer("Hello\n\n", return_tensors="pt")'

ADAPTER_USE = """
This is an adapter. Load it on its base, or merge both. Merge in float32: a 16-bit sum rounds most
of the change away.

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, {name!r})
model.merge_and_unload().save_pretrained("merged")
AutoTokenizer.from_pretrained({name!r}).save_pretrained("merged")
```

```bash
vllm serve {base_folder} --enable-lora --max-lora-rank {rank} --lora-modules student={folder}
python convert_hf_to_gguf.py merged --outfile student.gguf      # of llama.cpp
llama-quantize student.gguf student-Q4_K_M.gguf Q4_K_M
```
"""


def write_card(args, tokenizer, train_pairs, val_pairs, as_saved):
    """Write out_dir/README.md whole. as_saved is the line of train.py's check, "" if none."""
    base, base_in_words, metadata = base_of(args)
    name = last_part(args.out_dir)
    metadata |= {"library_name": "peft" if args.save_adapter else "transformers",
                 "pipeline_tag": "text-generation",
                 "tags": ["rdpo", "dpo" if args.loss == "rdpo" else args.loss]}
    use = (ADAPTER_USE if args.save_adapter else MODEL_USE).format(
        name=name, folder=shlex.quote(name), base=base, base_folder=shlex.quote(base),
        # vLLM takes powers of two from 8 on.
        rank=max(8, 1 << (args.lora_rank - 1).bit_length()) if args.lora_rank else 0,
        inputs=CHAT_INPUTS if tokenizer.chat_template else TEXT_INPUTS)
    atomic_write(os.path.join(args.out_dir, "README.md"), CARD.format(
        base=code(base), base_in_words=base_in_words, loss=args.loss, use=use,
        metadata="\n".join(f"{key}: {json.dumps(value)}" for key, value in metadata.items()),
        training=indented("\n".join(training_lines(args, train_pairs, val_pairs))),
        validation=indented("\n".join(as_saved))))


def base_of(args):
    """(name, its kind in words, metadata): a base is named to the hub if it comes from there."""
    if args.model is None:
        return "toy/student", "the toy student that rdpo bundles and no hub has", {}
    if is_hub_id(args.model):
        return args.model, "that model", {"base_model": args.model}
    return name_of(args.model), "a local folder of that name", {}


def training_lines(args, train_pairs, val_pairs):
    """What the student was trained on and how, as lines of plain text."""
    lines = []
    for path in args.data + (args.eval_data or []):
        train, val = (sum(pair.where.startswith((f"{path}:", f"{path}, item ")) for pair in pairs)
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


def validation_lines(args):
    """The first and the last line of the table that train.py prints."""
    training, validation = read_metrics(args.out_dir)
    first, last = validation[0], validation[-1]
    return [TABLE_HEAD, table_line(first["step"], {}, first),
            table_line(last["step"], training[-1], last)]


def name_of(model):
    return model if is_hub_id(model) else last_part(model)


def last_part(path):
    return one_line(os.path.basename(os.path.abspath(path)))


def code(text):
    return "`" + text.replace("`", "'") + "`"
