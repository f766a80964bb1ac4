"""TRL's DPOTrainer, run by parity.py, speed.py and gpu.py in a virtual environment of its own.

Reads a JSON file {"model", "rows", "learning_rates", "batch_size", "beta", "max_length", "config"},
where "config" holds more arguments of DPOConfig, or a list of such jobs, done one after the other.
Trains on the rows in their order, one batch per step at the given learning rates; on the CPU
unless the job says {"device": "cuda"}. Prints a JSON line per job: TRL's version, the loss and the
seconds of each step, the tokens of each row, the peak of CUDA memory in bytes.
"""
import gc
import json
import sys
import tempfile
import time
import uuid

import datasets
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

# datasets 5.2 pickles a table to name it, which pyarrow 26 does not let it. Any name will do.
datasets.arrow_dataset.generate_fingerprint = lambda *_: uuid.uuid4().hex


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def now(self):
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_, **__):
        self.start = self.now()

    def on_step_end(self, *_, **__):
        self.seconds.append(self.now() - self.start)


def train(job):
    """What a job's JSON line holds."""
    clock, on_cpu = Clock(), job.get("device", "cpu") == "cpu"
    dtype = getattr(torch, job.get("weights", "float32"))
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype,
                                                  attn_implementation="sdpa")
    if not on_cpu:
        policy.to("cuda")  # before the optimizer takes its weights
        torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1.0, weight_decay=0.0, fused=True)
    learning_rates = job["learning_rates"] + [0.0]  # the scheduler also asks after the last step
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rates[step])
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(), max_steps=len(job["learning_rates"]),
        per_device_train_batch_size=job["batch_size"], train_sampling_strategy="sequential",
        max_length=job["max_length"], beta=job["beta"], max_grad_norm=1.0, logging_steps=1,
        logging_first_step=True, save_strategy="no", report_to=[], use_cpu=on_cpu,
        disable_tqdm=True, per_device_eval_batch_size=1, **{"bf16": False} | job["config"])
    if "prompt_ids" in job["rows"][0]:  # tokens, not text: nothing to prepare
        DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset
    trainer = DPOTrainer(
        model=policy, args=config, train_dataset=Dataset.from_list(job["rows"]),
        eval_dataset=Dataset.from_list(job["validation"]) if "validation" in job else None,
        optimizers=(optimizer, scheduler),
        processing_class=AutoTokenizer.from_pretrained(job["model"]), callbacks=[clock])
    trainer.train()
    validation = trainer.evaluate() if "validation" in job else {}
    if "save" in job:
        trainer.save_model(job["save"])
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    tokens = [2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
              for row in trainer.train_dataset]
    return {"losses": losses, "seconds": clock.seconds, "tokens": tokens, "validation": validation,
            "peak_bytes": 0 if on_cpu else torch.cuda.max_memory_allocated()}


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs if isinstance(jobs, list) else [jobs]:
        try:
            answer = train(job)
        except torch.OutOfMemoryError:
            answer = {"out_of_memory": True}
        print(json.dumps({"trl": trl.__version__, **answer}), flush=True)
        gc.collect()  # the trainer and its model are a cycle
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
