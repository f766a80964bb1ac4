"""TRL's DPOTrainer, run by parity.py and speed.py in a virtual environment of its own.

Reads a JSON file {"model", "rows", "learning_rates", "batch_size", "beta", "max_length", "config"},
where "config" holds more arguments of DPOConfig. Trains on the rows in their order, one batch per
step at the given learning rates. Prints one JSON line: TRL's version, the loss and the seconds of
each step, the tokens of each row.
"""
import json
import sys
import tempfile
import time

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

with open(sys.argv[1], encoding="utf-8") as file:
    job = json.load(file)
seconds = []


class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        seconds.append(time.perf_counter() - self.start)


dtype = getattr(torch, job.get("weights", "float32"))
policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype, attn_implementation="sdpa")
optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, weight_decay=0.0, fused=True)
learning_rates = job["learning_rates"] + [0.0]  # the scheduler also asks after the last step
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rates[step])
config = DPOConfig(
    output_dir=tempfile.mkdtemp(), max_steps=len(job["learning_rates"]),
    per_device_train_batch_size=job["batch_size"], train_sampling_strategy="sequential",
    max_length=job["max_length"], beta=job["beta"], max_grad_norm=1.0, logging_steps=1,
    logging_first_step=True, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    per_device_eval_batch_size=1, **{"bf16": False} | job["config"])
if "prompt_ids" in job["rows"][0]:  # tokens, not text: nothing to prepare
    DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset
trainer = DPOTrainer(
    model=policy, args=config, train_dataset=Dataset.from_list(job["rows"]),
    eval_dataset=Dataset.from_list(job["validation"]) if "validation" in job else None,
    optimizers=(optimizer, scheduler),
    processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[Clock()])
trainer.train()
validation = trainer.evaluate() if "validation" in job else {}
if "save" in job:
    trainer.save_model(job["save"])
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
tokens = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
          for row in trainer.train_dataset]
print(json.dumps({"trl": trl.__version__, "losses": losses, "seconds": seconds, "tokens": tokens,
                  "validation": validation}))
