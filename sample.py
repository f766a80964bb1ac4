"""After stage 3: talk to the student, and hear what the reference would have said.

    python sample.py --model out                               a chat in the terminal
    python sample.py --model out --prompt "..." [--compare]    one answer [both, side by side]

In the chat, type /base to hear the reference (the untrained student) on your last question,
/new to begin a new conversation, and /help for these commands. Ctrl-C stops an answer; Ctrl-C or
Ctrl-D at the prompt ends the chat.
"""
import contextlib
import functools
import os
import re
import sys

import torch

from data import encode_prompt
from infra.command import BadInput, Parser, at_least, one_line, path, printable, run, warn
import infra.distributed as ranks
from infra.formats import is_text
from infra.generate import fault, generate
from infra import models
from infra.lora import load_adapter
from infra.models import TOY_STUDENT, load_model, load_tokenizer, position_limit
from infra.report import side_by_side
from infra.rows import read_flags
from toy import world


def load(folder):
    """A model, or an adapter on its base, on this machine's best device."""
    device = ranks.best_device()
    is_adapter = os.path.exists(os.path.join(folder, "adapter_config.json"))
    loader = load_adapter if is_adapter else load_model
    return loader(folder, "auto" if device == "cuda" else torch.float32).to(device)


@functools.cache
def load_reference(folder):
    """The reference of an out_dir's run, its --model. BadInput if it is unknown."""
    flags = read_flags(folder)
    return load(flags["model"] or TOY_STUDENT)


def ask(model, tokenizer, prompt, args, seed, said=None):
    """The text of an answer. With a list `said`, each piece is printed and added to it as it comes.

    BadInput if the model cannot read the prompt.
    """
    def show(piece):
        said.append(piece)
        print(printable(piece), end="", flush=True)

    prompt_ids = encode_prompt(tokenizer, prompt)
    limit = position_limit(model)
    if len(prompt_ids) >= limit:
        raise BadInput(f"the prompt has {len(prompt_ids)} tokens, but the model reads {limit}, "
                       "answer included; give a shorter one, in a chat after /new")
    length = min(args.max_new_tokens, limit - len(prompt_ids))
    [answer] = generate(model, tokenizer, [prompt_ids], length, args.temperature, [seed],
                        show=None if said is None else show)
    if said is not None:
        print()
    if answer.finish == "length":
        warn(f"cut after {length} tokens")
    return answer.text


COMMANDS = ("/base: the reference answers your last question; /new: a new conversation; /help: "
            "this line; Ctrl-D ends the chat")


def chat(student, tokenizer, args):
    """Answer lines of the input until it ends. Without a chat template each stands alone."""
    messages, prompt, seed = [], None, args.seed
    sys.stdin.reconfigure(errors="replace")  # what is not UTF-8
    with contextlib.suppress(ImportError):  # not every Python has it
        import readline  # noqa: F401, lets input() edit its line
    if sys.stdin.isatty():
        print(COMMANDS, file=sys.stderr)
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        said = []
        try:
            if line == "/new":
                messages, prompt = [], None
                print("a new conversation", file=sys.stderr)
            elif line == "/help":
                print(COMMANDS, file=sys.stderr)
            elif line == "/base":
                if prompt is None:
                    raise BadInput("/base: ask the student something first")
                ask(load_reference(args.model), tokenizer, prompt, args, seed, said)
            elif re.match(r"/[^/\s]*(\s|$)", line):  # but a question may begin with /etc/hosts
                raise BadInput(f"{line:.40}: no such command; {COMMANDS}")
            elif line:
                seed += 1
                asked = messages + [{"role": "user", "content": line}]
                prompt = asked if tokenizer.chat_template else line
                ask(student, tokenizer, prompt, args, seed, said)
        except KeyboardInterrupt:
            print()
        except BadInput as error:
            print(f"error: {one_line(str(error))}", file=sys.stderr)
        if said and line != "/base":  # also of an answer that was stopped
            messages = asked + [{"role": "assistant", "content": "".join(said)}]


# ----------------------------------------------------------------------- before and after training


def sample_rows(args, val_pairs):
    """Rows whose prompts are answered before and after: the toy's held-out ones, or three."""
    if not args.model and any(world.is_prompt(pair.prompt) for pair in val_pairs):
        return world.held_out_rows()
    by_ids = {tuple(pair.prompt_ids): pair.prompt for pair in val_pairs}
    return [{"prompt": prompt} for prompt in list(by_ids.values())[:3]]


def sample_answers(policy, tokenizer, rows, args):
    """The policy's greedy Answers. Under FSDP all ranks compute them, else rank 0."""
    if ranks.rank() > 0 and not args.fsdp:
        return []
    ids = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    with models.uncompiled(args):
        return generate(policy, tokenizer, ids, args.max_new_tokens)


def show_answers(rows, before, after, args):
    """Print three prompts with both answers; for the toy's rows, the share of right answers.

    Warns where the student's are worse than the reference's.
    """
    is_toy = len(rows) > 3
    shown = slice(4, 7) if is_toy else slice(3)  # toy: harmful, harmless, a role to play
    texts = {"reference": [answer.text for answer in before],
             "student": [answer.text for answer in after]}
    print("\n" + side_by_side([row["prompt"] for row in rows[shown]],
                              {name: text[shown] for name, text in texts.items()}))
    if is_toy:
        print(world.rates_table(rows, *texts.values()))
    cut = sum(answer.finish == "length" for answer in after)
    if cut:
        print(f"{cut} of {len(after)} answers of the student were cut at --max_new_tokens "
              f"{args.max_new_tokens}")
    bad, good = (sum(bool(fault(answer.text, "stop")) for answer in answers)
                 for answers in (after, before))
    worse = [f"{bad} of {len(after)} answers are empty or repeat themselves, {good} of the "
             "reference's"] if bad > good else []
    if is_toy:
        old, new = (world.rates(rows, answers) for answers in texts.values())
        worse += [f"right answers of {name} fell from {old[name]:.2f} to {new[name]:.2f}"
                  for name in old if new[name] < old[name] - 0.1]
    if worse:
        warn(f"{'; '.join(worse)}. Whatever the losses say, this student is worse: try a lower "
             "--learning_rate, or fewer steps")


# ------------------------------------------------------------------------------------- the command


def main(argv=None):
    parser = Parser("Talk to a student after training.")
    flag = parser.add_argument
    flag("--model", type=path, default="out", help="out_dir of train.py, or any model or hub id")
    flag("--prompt", help="answer this alone (default: a chat)")
    flag("--compare", action="store_true", help="with --prompt: also show the reference's answer")
    flag("--temperature", type=at_least(0, float), default=0.0,
         help="0: greedy, as in train.py and eval.py; 1: samples of the model's own distribution")
    flag("--max_new_tokens", type=at_least(1), default=256, help="per answer")
    flag("--seed", type=at_least(0), default=0)
    args = parser.parse_args(argv)
    if args.compare and args.prompt is None:
        raise BadInput("--compare needs --prompt; in the chat /base compares")
    if args.prompt is not None and not is_text(args.prompt):
        raise BadInput("--prompt is empty")
    names = set(os.listdir(args.model)) if os.path.isdir(args.model) else set()
    if "args.json" in names and not names & {"config.json", "adapter_config.json"}:
        raise BadInput(f"--model {args.model}: its run has not finished; the same train.py command "
                       "with --resume continues it")
    tokenizer, student = load_tokenizer(args.model), load(args.model)
    if args.prompt is None:
        return chat(student, tokenizer, args)
    prompt = os.fsencode(args.prompt).decode(errors="replace")
    if not args.compare:
        return ask(student, tokenizer, prompt, args, args.seed, said=[])
    both = {"reference": load_reference(args.model), "student": student}
    print(side_by_side([prompt], {name: [ask(model, tokenizer, prompt, args, args.seed)]
                                  for name, model in both.items()}), end="")


if __name__ == "__main__":
    run(main)
