"""The other side of parity.py and speed.py: Hugging Face TRL's DPOTrainer, run in a virtual environment of its own.

Reads a JSON file {"model", "rows", "learning_rates", "batch_size", "beta", "max_length"} and, in "config", what else DPOConfig shall
have. Trains on the rows in the order given, one batch per step at the given learning rates, and prints one JSON line: the version, the
loss and the seconds of every step, the tokens of every row, and the peak of this process's resident memory.
"""
import json
import resource
import sys
import tempfile
import time

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

job = json.load(open(sys.argv[1], encoding="utf-8"))
seconds = []


class Clock(TrainerCallback):
    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        seconds.append(time.perf_counter() - self.began)


policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="sdpa")
optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, weight_decay=0.0, fused=True)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (job["learning_rates"] + [0.0])[step])
config = DPOConfig(
    output_dir=tempfile.mkdtemp(), max_steps=len(job["learning_rates"]), per_device_train_batch_size=job["batch_size"],
    train_sampling_strategy="sequential", max_length=job["max_length"], beta=job["beta"], max_grad_norm=1.0,
    logging_steps=1, logging_first_step=True, save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, **job["config"])
trainer = DPOTrainer(model=policy, args=config, train_dataset=Dataset.from_list(job["rows"]), optimizers=(optimizer, scheduler),
                     processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[Clock()])
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
tokens = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in trainer.train_dataset]
print(json.dumps({"trl": trl.__version__, "losses": losses, "seconds": seconds, "tokens": tokens,
                  "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
