"""What a run of train.py leaves in out_dir: its state, to resume from, and in the end the student.

    out_dir/args.json                 the flags: a resumed run must have the same
    out_dir/metrics.jsonl             one line per step
    out_dir/state/step-00000100/      weights and moments in float32; written under another name, then renamed, so always whole
    out_dir/model.safetensors, ...    the student, an ordinary Hugging Face folder (or an adapter's)
"""
import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

from data import TOY_STUDENT, BadInput, write_whole
from lora import merge, save_adapter
from parallel import load_shards, process, save_shards, wait_for_all

# ----------------------------------------------------------------------------------------------------------- the folder


def check_out_dir(args):
    """BadInput unless out_dir is new, or a run of train.py that the flags ask to go on with or to discard."""
    path = os.path.join(args.out_dir, "args.json")
    if args.model and os.path.realpath(args.model) == os.path.realpath(args.out_dir):
        raise BadInput(f"--out_dir {args.out_dir}: that is --model's own folder; give another --out_dir")
    if not os.path.exists(args.out_dir) or os.path.isdir(args.out_dir) and not os.listdir(args.out_dir):
        return
    if not os.path.exists(path):
        raise BadInput(f"--out_dir {args.out_dir}: exists and holds no run of train.py; give another --out_dir")
    if not args.resume and not args.overwrite:
        raise BadInput(f"--out_dir {args.out_dir}: holds an earlier run; add --resume to go on with it or --overwrite to discard it, "
                       "or give another --out_dir")
    if args.resume:
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
        for name in vars(args).keys() - {"resume", "overwrite", "save_every", "cache_dir", "max_new_tokens"}:
            if vars(args)[name] != before.get(name):
                raise BadInput(f"--{name} is {vars(args)[name]}, but the run in {args.out_dir} began with {before.get(name)}; "
                               "resume with the same flags, or give another --out_dir")


def begin_out_dir(args):
    """Makes out_dir with args.json in it; with --overwrite, what an earlier run left there goes first."""
    os.makedirs(args.out_dir, exist_ok=True)
    if args.overwrite:
        shutil.rmtree(os.path.join(args.out_dir, "state"), ignore_errors=True)
        for name in os.listdir(args.out_dir):
            if (name in ("metrics.jsonl", "curves.png", "config.json", "adapter_config.json")
                    or name.endswith((".safetensors", ".safetensors.index.json"))):
                os.remove(os.path.join(args.out_dir, name))
    write_whole(os.path.join(args.out_dir, "args.json"), json.dumps(vars(args) | {"torch": torch.__version__}, indent=1))


def keep_metrics_until(path, step):
    """Drops the lines that a killed run wrote after its last saved state (all, if it saved none): they are written again."""
    lines = []
    if step and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_whole(path, "".join(lines))


# ------------------------------------------------------------------------------------------------------------ the state


def save_state(folder, step, model, optimizer, scaler, args, fingerprint):
    """Everything that a resumed run needs, in folder/step-N: written under another name, then renamed; older ones go.

    One process writes the trained weights and moments; under FSDP each writes its own shards.
    """
    name, (number, _) = f"step-{step:08d}", process()
    temporary = os.path.join(folder, f"{name}.tmp")
    state = {"step": step, "scaler": scaler.state_dict(), "data": fingerprint}
    if number == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
    if args.fsdp:
        wait_for_all()
        save_shards(temporary, model, optimizer)
    elif number == 0:
        save_file(trained_weights(model), os.path.join(temporary, "model.safetensors"))
        state["optimizer"] = optimizer.state_dict()
    if number == 0:
        torch.save(state, os.path.join(temporary, "training.pt"))
        os.rename(temporary, os.path.join(folder, name))
        for other in os.listdir(folder):
            if other != name:
                shutil.rmtree(os.path.join(folder, other))
    wait_for_all()


def load_state(folder, model, optimizer, scaler, args, fingerprint):
    """Loads the newest whole state in a folder and returns its step, 0 where there is none."""
    names = sorted(name for name in os.listdir(folder) if not name.endswith(".tmp")) if os.path.isdir(folder) else []
    if not names:
        return 0
    newest = os.path.join(folder, names[-1])
    state = torch.load(os.path.join(newest, "training.pt"), map_location="cpu", weights_only=True)  # not all on process 0's GPU
    if state["data"] != fingerprint:
        raise BadInput(f"{folder}: the saved run had other rows, targets or weights of --model; give the same --data and --model, or another --out_dir")
    if args.fsdp:
        load_shards(newest, model, optimizer)
    else:
        saved = load_file(os.path.join(newest, "model.safetensors"))
        for name, weight in trained_weights(model).items():
            weight.copy_(saved[name])
        optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["step"]


def trained_weights(model):
    """{name: tensor} of the weights that training changes, tied ones once."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


# ---------------------------------------------------------------------------------------------------------- the student


def cast_weights(model, dtype):
    """Gives a model's weights a dtype, and nothing else: model.to(dtype) would round its buffers too, such as the frequencies of rotary
    positions, which every model computes in float32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def save_model_folder(model, dtype, tokenizer, args):
    """Saves an ordinary Hugging Face folder (or an adapter's), each file whole: written aside, then moved into place.

    Adapters are merged into the model, whose weights end in dtype.
    """
    aside = os.path.join(args.out_dir, "saving.tmp")
    os.makedirs(aside, exist_ok=True)
    if args.save_adapter:
        save_adapter(model, aside, args.model or TOY_STUDENT)
    merge(model)
    cast_weights(model, dtype)
    if not args.save_adapter:
        model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    for name in os.listdir(aside):
        os.replace(os.path.join(aside, name), os.path.join(args.out_dir, name))
    os.rmdir(aside)
