"""Stage 3: distil a student on scored pairs with the rDPO loss.

    python train.py --data scored.jsonl --model DIR_OR_HUB_ID      a real student
    python train.py --data toy/scored.jsonl                        the toy student, in a minute on a laptop
    torchrun --nproc_per_node=8 train.py [--fsdp] ...              on several GPUs

Reads top to bottom: flags, losses and metrics, then main(): setup, data, student, reference, optimizer, loop, the end. The loss and
the log-probabilities are rdpo.py's, the tokens and batches data.py's, adapters lora.py's; what several processes have to agree on
is parallel.py's, and what out_dir receives is saving.py's.
"""
import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from curves import draw_curves, have_matplotlib
from data import (TOY_STUDENT, BadInput, batch_tokens, collate, epoch_order, first_line, load_pairs, load_tokenizer, longest_row, read_rows, run, send,
                  split_held_out)
from generate import generate, load_model, position_limit, side_by_side
from lora import add_lora, without_lora
from parallel import (deal, from_process_0, gather, gathered_weights, joint_gradients, largest, leave, policy_logps, process, shard, start,
                      wait_for_all, whole)
from rdpo import ReferenceCache, plain_sequence_logps, preference_probability, rdpo_loss, sequence_key
from saving import begin_out_dir, cast_weights, check_out_dir, keep_metrics_until, load_state, save_model_folder, save_state, trained_weights

# ---------------------------------------------------------------------------------------------------------- flags


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Distil a student on scored pairs with the rDPO loss.", allow_abbrev=False)
    # what to train on
    parser.add_argument("--data", required=True, help="scored rows, .jsonl or a JSON list")
    parser.add_argument("--eval_data", help="held-out rows (default: a seeded share of the prompts of --data)")
    parser.add_argument("--eval_share", type=float, default=0.1, help="share of the prompts held out without --eval_data, at most 256 prompts")
    parser.add_argument("--model", help="student: a Hugging Face folder or hub id (default: the bundled toy student)")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens a prompt and one answer may have together")
    parser.add_argument("--skip_bad_rows", action="store_true", help="leave out and count rows that cannot be used, instead of stopping")
    # the loss
    parser.add_argument("--loss", choices=("rdpo", "dpo", "sft", "dsc"), default="rdpo")
    parser.add_argument("--beta", type=float, default=0.1, help="how tightly the reference holds the student")
    parser.add_argument("--temperature", type=float, default=1.0, help="T of tau, in units of the score (rdpo)")
    parser.add_argument("--label_smoothing", type=float, default=0.0, help="tau = 1 - this (dpo): conservative DPO")
    parser.add_argument("--sft_weight", type=float, default=0.0, help="adds this times the negative log-likelihood per chosen token (rdpo, dpo)")
    # the optimizer
    parser.add_argument("--learning_rate", type=float, help="default 5e-6, and 3e-4 for the toy student; ten times that with LoRA")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps with a rising learning rate; then cosine to 0")
    parser.add_argument("--weight_decay", type=float, default=0.0)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max_steps", type=int, help="ends sooner, or later, than --epochs would")
    parser.add_argument("--batch_size", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--seed", type=int, default=0)
    # adapters in place of all weights
    parser.add_argument("--lora_rank", type=int, default=0, help="trains LoRA adapters of this rank, and no other weights (default 0: all weights)")
    parser.add_argument("--lora_alpha", type=float, help="scales an adapter by alpha / rank (default: twice the rank)")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="share of an adapter's inputs dropped in training")
    parser.add_argument("--save_adapter", action="store_true", help="out_dir receives the adapter, in PEFT's format, not merged weights")
    # the machine: these change memory and speed only
    parser.add_argument("--tokens_per_batch", type=int, default=2048, help="most tokens, padding counted, in one forward pass")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="keep no activations within layers, compute them twice: less memory")
    parser.add_argument("--compile", action="store_true", help="fuse the model's operations with torch.compile")
    parser.add_argument("--fsdp", action="store_true", help="under torchrun: each process keeps a part of the weights, not all of them")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                        help="compute dtype; trained weights stay float32")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--cache_dir", default="~/.cache/rdpo", help="where reference log-probabilities are kept for all runs")
    # what comes out
    parser.add_argument("--out_dir", default="out")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in out_dir")
    parser.add_argument("--overwrite", action="store_true", help="discard an earlier run in out_dir")
    parser.add_argument("--eval_every", type=int, help="steps between evaluations (default: a tenth of the run)")
    parser.add_argument("--save_every", type=int, default=100, help="steps between saved states")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="length of the sample answers at the end")
    args = parser.parse_args(argv)

    for name in ("beta", "temperature", "epochs", "max_steps", "batch_size", "max_length", "tokens_per_batch", "eval_every", "save_every",
                 "max_new_tokens"):
        if vars(args)[name] is not None and vars(args)[name] <= 0:
            raise BadInput(f"--{name} must be above 0, not {vars(args)[name]}")
    if args.label_smoothing and args.loss != "dpo":
        raise BadInput(f"--label_smoothing goes with --loss dpo; for {args.loss} leave it out")
    if not 0 <= args.label_smoothing < 0.5:
        raise BadInput(f"--label_smoothing must be from 0 to below 0.5, not {args.label_smoothing}")
    if args.lora_rank < 0 or not 0 <= args.lora_dropout < 1:
        raise BadInput(f"--lora_rank must be 0 or above, not {args.lora_rank}, and --lora_dropout from 0 to below 1, not {args.lora_dropout}")
    if not args.lora_rank and (args.lora_alpha is not None or args.lora_dropout or args.save_adapter):
        raise BadInput("--lora_alpha, --lora_dropout and --save_adapter go with --lora_rank; give one, such as --lora_rank 16")
    if args.lora_rank and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if args.fsdp and args.compile:
        raise BadInput("--compile does not go with --fsdp; leave one of them out")
    if args.learning_rate is None:
        args.learning_rate = (5e-6 if args.model else 3e-4) * (10 if args.lora_rank else 1)
    return args


# ----------------------------------------------------------------------------------------------- losses and metrics


@dataclasses.dataclass
class Rows:
    """Pairs and what is known of each before training; the tensors are (P,), on the CPU."""
    pairs: list
    shared: bool  # the layout of their batches: each prompt once, or one answer per row
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor
    tau: torch.Tensor
    score_gaps: torch.Tensor  # s_r - s_o, nan where there is no score


def target_probabilities(score_gaps, args):
    """tau (P,), what the loss wants P(chosen beats rejected) to be: rDPO asks the scores, DPO is sure of the chosen."""
    if args.loss == "rdpo":
        return preference_probability(score_gaps, torch.zeros_like(score_gaps), args.temperature)
    return torch.full_like(score_gaps, 1.0 - args.label_smoothing)


def total_loss(columns, pair_count, chosen_tokens, args):
    """The loss of an optimizer step (or this micro-batch's part of it), averaged over the whole step's pairs and tokens.

    rdpo, dpo   mean preference loss of a pair, + sft_weight * negative log-likelihood of a chosen token
    sft, dsc    negative log-likelihood of a chosen token; dsc (arXiv:2312.01957) sees only rows with s_r > s_o
    """
    preference = columns["losses"].sum() / pair_count
    likelihood = -columns["logps/chosen"].sum() / chosen_tokens
    return likelihood if args.loss in ("sft", "dsc") else preference + args.sft_weight * likelihood


def forward(model, rows, indices, args, autocast):
    """The policy on some pairs, given by index: their losses and what is logged of them, a dict of (B,) tensors.

    Without pairs it computes the first one and returns columns of length 0: joint passes go on while a process has run out of pairs, and
    what that one adds to the gradients is 0.
    """
    count, indices = len(indices), indices or [0]
    columns = torch.stack([column[indices] for column in (rows.ref_chosen_logps, rows.ref_rejected_logps, rows.tau)])  # (3, B)
    ref_chosen_logps, ref_rejected_logps, tau = send(columns, model.device)
    with autocast():
        logps = policy_logps(model, collate([rows.pairs[i] for i in indices], rows.shared).to(model.device))  # (2B,)
    policy_chosen_logps, policy_rejected_logps = logps.chunk(2)
    losses, chosen_rewards, rejected_rewards = rdpo_loss(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, tau, args.beta)
    columns = {"losses": losses, "logps/chosen": policy_chosen_logps, "logps/rejected": policy_rejected_logps,
               "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards, "tau/mean": tau}
    return {name: column[:count] for name, column in columns.items()}


def of_all_processes(parts, shares):
    """(parts, indices): the columns of all processes' micro-batches, dealt out as shares, and the pairs in the same order."""
    table = torch.cat([torch.stack(list(part.values())) for part in parts], dim=1)  # (names, pairs of this process)
    table = gather(table, [sum(map(len, share)) for share in shares])  # (names, pairs)
    return [dict(zip(parts[0], table))], [i for share in shares for batch in share for i in batch]


def summary(parts, rows, indices, args):
    """The metrics of some pairs from the columns of their micro-batches; indices has the pairs in the same order."""
    table = torch.cat([torch.stack(list(part.values())) for part in parts], dim=1).cpu()  # (names, B)
    columns = dict(zip(parts[0], table))
    margins, gaps = columns["rewards/chosen"] - columns["rewards/rejected"], rows.score_gaps[indices]
    side = torch.where(margins.abs() < 1e-4, 0.0, margins.sign())  # 0: no preference yet, counted as half right
    chosen_tokens = sum(len(rows.pairs[i].chosen_ids) for i in indices)
    metrics = {"loss": total_loss(columns, len(indices), chosen_tokens, args).item()}
    metrics |= {name: column.mean().item() for name, column in columns.items() if name != "losses"}
    metrics |= {"rewards/margins": margins.mean().item(), "rewards/accuracies": ((1 + side) / 2).mean().item()}
    decided = gaps.abs() > 0  # no score and no tie
    if decided.any():
        metrics["rewards/score_agreement"] = ((1 + side * gaps.sign()) / 2)[decided].mean().item()
    return metrics


@torch.no_grad()
def evaluate(model, rows, args, autocast):
    """The metrics of held-out rows, each name behind eval/."""
    shares = deal(rows.pairs, range(len(rows.pairs)), args.tokens_per_batch, rows.shared)
    parts = [forward(model, rows, batch, args, autocast) for batch in shares[process()[0]]]
    parts, indices = of_all_processes(parts, shares)
    return {f"eval/{name}": value for name, value in summary(parts, rows, indices, args).items()}


def with_reference(pairs, args, model, cache, autocast, shared):
    """Rows of the pairs, and how many of them the cache did not know: those are computed and kept."""
    keys = [(sequence_key(pair.prompt_ids, pair.chosen_ids), sequence_key(pair.prompt_ids, pair.rejected_ids)) for pair in pairs]
    number, _ = process()
    cache.logps = from_process_0(cache.logps)  # all agree on what is missing, whatever other runs write meanwhile
    missing = [i for i, both in enumerate(keys) if not set(both) <= cache.logps.keys()]
    rounds = list(zip(*deal(pairs, missing, args.tokens_per_batch, shared)))  # of each round, the micro-batch of every process
    last_save = time.monotonic()
    try:
        with tqdm(total=len(missing), desc="reference", unit="pair", disable=number > 0 or None, leave=False) as progress:
            for batches in reversed(rounds):  # the longest first: memory runs out now or never
                mine = batches[number]
                with torch.no_grad(), autocast():
                    logps = policy_logps(model, collate([pairs[i] for i in mine or missing[:1]], shared).to(model.device)).view(2, -1)  # (2, B)
                logps = gather(logps[:, :len(mine)], [len(batch) for batch in batches]).T.cpu()  # (pairs of the round, 2)
                for i, both in zip(sum(batches, []), logps):
                    check_finite(both, pairs[i])
                    cache.logps |= zip(keys[i], both.tolist())
                if number == 0 and time.monotonic() - last_save > 60:
                    cache.save()
                    last_save = time.monotonic()
                progress.update(len(logps))
    finally:  # stopped half-way: what was computed is kept
        if number == 0 and missing and cache.logps:
            cache.save()
    logps = torch.tensor([[cache.logps[key] for key in both] for both in keys])  # (P, 2)
    gaps = torch.tensor([pair.gap for pair in pairs])  # (P,)
    return Rows(pairs, shared, logps[:, 0], logps[:, 1], target_probabilities(gaps, args), gaps), len(missing)


def check_finite(reference_logps, pair):
    if not reference_logps.isfinite().all():
        raise BadInput(f"{pair.where}: the reference's log-probability is not finite; are the weights of --model sound?")


# What a response token's log-probability may differ by where other rows share its batch: (bias, noise). Over N tokens bias adds up
# to N times as much, noise to sqrt(N) times. (SmolLM2-135M in bfloat16: noise 0.06 per token, never above 0.14.) A wrong mask or a stale
# cache is off by tens of nats.
ROUNDING = {torch.float32: (1e-5, 0.0), torch.bfloat16: (5e-3, 0.5), torch.float16: (1e-3, 0.06)}


def check_equal(what, live, expected, tokens, dtype, remedy):
    """BadInput where summed log-probabilities (B,) that must be equal differ by more than rounding, tokens (B,) long."""
    difference, tokens, (bias, noise) = (live.cpu() - expected.cpu()).abs(), torch.tensor(tokens), ROUNDING[dtype]
    if not (difference <= 1e-3 + bias * tokens + noise * tokens.sqrt()).all():
        raise BadInput(f"{what} differ by up to {difference.max():.4g}; {remedy}")


def choose_layout(model, pairs, args, dtype, autocast):
    """(whether the model can read a prompt once for both answers, why), by trying it on the longest pair that a batch holds.

    Models differ in how they take masks and positions, so no table of names says which of them can: the log-probabilities do.
    One answer per row needs neither, and is compared with the model's own logits; BadInput where those differ.
    """
    small = [pair for pair in pairs if batch_tokens(pair, shared=False) <= args.tokens_per_batch] or [min(pairs, key=longest_row)]
    pair = max(small, key=longest_row)
    tokens = [len(pair.chosen_ids), len(pair.rejected_ids)]
    with autocast(), torch.no_grad():
        own = plain_sequence_logps(model, [pair]).cpu()
        check_finite(own, pair)
        apart = policy_logps(model, collate([pair]).to(model.device)).cpu()
        check_equal(f"--model {args.model}: log-probabilities from its hidden states and from its own logits", apart, own, tokens, dtype,
                    "an architecture that changes its logits after the output head in a way of its own is not supported")
        try:
            together = policy_logps(model, collate([pair], shared=True).to(model.device)).cpu()
            check_equal("log-probabilities", together, apart, tokens, dtype, "it does not keep to masks or positions that are given")
        except torch.OutOfMemoryError:
            raise
        except (BadInput, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return False, f"this model cannot read a prompt once for both: {first_line(error)}"
    return True, f"on {pair.where} its log-probabilities differ from those of separate rows by {(together - apart).abs().max():.1g}"


# ----------------------------------------------------------------------------------------------------- the training


def main(argv=None):
    began = time.monotonic()
    args = parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)  # whoever follows a log file sees each line at once
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until the loop takes over: leave through every `finally`

    # Setup: the device, and autocast to a 16-bit compute dtype where that is fast; the other processes, where torchrun started several.
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}[args.device]:
        raise BadInput(f"--device {args.device}: this machine has none that PyTorch can use; take --device cpu, or leave it out")
    if args.dtype == "auto":
        args.dtype = "float32" if args.device != "cuda" else "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if args.dtype == "float16" and args.device != "cuda":
        raise BadInput(f"--dtype float16 needs --device cuda, not {args.device}; take float32 or bfloat16")
    device, dtype = start(args.device), getattr(torch, args.dtype)
    number, processes = process()
    if args.fsdp and (not dist.is_initialized() or args.dtype == "float16"):
        raise BadInput("--fsdp needs torchrun, such as torchrun --nproc_per_node=8 train.py --fsdp, and a compute dtype other than float16")
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    torch.manual_seed(args.seed)
    toy = args.model is None
    if toy:
        print(f"student: the bundled toy, {os.path.relpath(TOY_STUDENT)} (a real one: --model FOLDER_OR_HUB_ID)")

    # Data: every row is read, checked and tokenised before anything is computed.
    tokenizer = load_tokenizer(args.model or TOY_STUDENT)
    needs_scores = args.loss in ("rdpo", "dsc")
    pairs, report = load_pairs(args.data, tokenizer, args.max_length, needs_scores, args.skip_bad_rows)
    reports = [report]
    if args.eval_data:
        held_out, report = load_pairs(args.eval_data, tokenizer, args.max_length, needs_scores, args.skip_bad_rows)
        reports.append(report)
    else:
        pairs, held_out = split_held_out(pairs, args.eval_share, args.seed)
    if args.loss == "dsc":  # the acceptance step of distilled self-critique
        accepted = [pair for pair in pairs if pair.score_chosen > pair.score_rejected]
        print(f"dsc: {len(accepted)} of {len(pairs)} revisions scored above their originals and are kept")
        pairs = accepted
    if not pairs or not held_out:
        raise BadInput(f"{args.data}: {len(pairs)} pairs to train on and {len(held_out)} held out; give more rows, or --eval_data")
    for report in reports:
        print("".join(line + "\n" for line in report.lines()), end="")
        if report.dropped_count() > report.rows / 10:
            warn(f"{report.dropped_count()} of {report.rows} rows were left out, more than a tenth")
    if args.loss == "rdpo" and all(pair.score_chosen == pair.score_rejected for pair in pairs):
        warn("every pair's scores tie: tau is 1/2 throughout and rdpo only holds the student where it is")
    check_out_dir(args)

    # Student: loaded in its own dtype, which is also the one it is saved in. All weights are trained in float32; or, beside adapters,
    # they are frozen in the compute dtype.
    model = load_model(args.model or TOY_STUDENT, dtype="auto")  # it stays in eval mode: dropout would blur the log-ratios
    own_dtype, weights_before = model.dtype, sample_weights(model, model.dtype)
    if args.lora_rank or not args.fsdp:
        cast_weights(model, dtype if args.lora_rank else torch.float32)
    computed_as = [args.dtype] + ["sharded"] * args.fsdp + ["compiled"] * args.compile
    cache = ReferenceCache(os.path.expanduser(args.cache_dir), model, " ".join(computed_as))
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout)
        trained, every = (sum(weight.numel() for weight in weights) for weights in (trained_weights(model).values(), model.parameters()))
        print(f"LoRA: rank {args.lora_rank}, alpha {args.lora_alpha:g}, dropout {args.lora_dropout:g}: {trained:,} parameters are trained, "
              f"{100 * trained / every:.2f} % of {every:,}")
    if args.gradient_checkpointing:
        checkpoint_layers(model, args.lora_dropout)
    if args.fsdp:
        shard(model, decoder_layers(model, "--fsdp"), device, dtype)
    else:
        model.to(device)
    longest = max(map(longest_row, pairs + held_out))
    limit = position_limit(model)
    if longest > limit:
        raise BadInput(f"--max_length {args.max_length}: the longest row has {longest} tokens, but the model takes {limit}; --max_length {limit}")
    shared, why = from_process_0(choose_layout(model, pairs, args, dtype, autocast))
    print(f"layout: {'each prompt once, with both answers' if shared else 'one answer per row'} ({why})")

    if args.compile:  # for any number of rows and tokens, so that it is compiled a few times and not for every batch
        model.base_model.compile(dynamic=True)

    # Reference: the student before its first step. Its log-probabilities come from the cache, or are computed into it.
    # With LoRA it is the model without its adapters, and there is no second copy either.
    reference_began = time.monotonic()
    with without_lora(model):
        rows, computed = with_reference(pairs, args, model, cache, autocast, shared)
        held_out_rows, computed_too = with_reference(held_out, args, model, cache, autocast, shared)
    print(f"{len(pairs)} pairs to train on, {len(held_out)} held out; reference log-probabilities: {computed + computed_too} pairs "
          f"computed in {time.monotonic() - reference_began:.1f} s, the others from {args.cache_dir}")

    # What the reference writes, to compare with at the end. One process asks it; all do where each has a part of its weights.
    if toy:
        toy_rows = [row for _, row in read_rows(os.path.join(os.path.dirname(TOY_STUDENT), "held_out.jsonl"))]
        prompts, shown = [row["prompt"] for row in toy_rows], slice(4, 7)  # a harmful, a harmless and a role-play request
    else:
        prompts = list({tuple(pair.prompt_ids): pair.prompt for pair in held_out}.values())[:3]
        shown = slice(0, 3)

    def write_answers(model):
        eager = torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()  # what is compiled reads whole rows
        with autocast(), eager:
            return [answer.text for answer in generate(model, tokenizer, prompts, args.max_new_tokens)]

    if number == 0 or args.fsdp:
        answers_before = write_answers(model)

    # Optimizer: AdamW on the trained float32 weights; a gradient scaler only under float16; learning rate up, then down a cosine.
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad],
                                  lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    steps_per_epoch = math.ceil(len(pairs) / args.batch_size)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    eval_every = args.eval_every or math.ceil(total_steps / 10)

    def learning_rate(step):
        warmup = args.warmup * total_steps
        if step < warmup:
            return args.learning_rate * (step + 1) / (warmup + 1)
        return args.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup))) / 2

    # Resume: the model is loaded over, the data order follows from the step.
    ids = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs]
    fingerprint = hashlib.sha256(repr(ids + rows.tau.tolist() + [cache.name]).encode()).hexdigest()
    state_dir, metrics_path = os.path.join(args.out_dir, "state"), os.path.join(args.out_dir, "metrics.jsonl")
    wait_for_all()  # all have looked at out_dir before it changes
    if number == 0:
        begin_out_dir(args)
    wait_for_all()
    first_step = load_state(state_dir, model, optimizer, scaler, args, fingerprint) if args.resume else 0
    if number == 0:
        keep_metrics_until(metrics_path, first_step)
    metrics_file = open(metrics_path if number == 0 else os.devnull, "a", encoding="utf-8", buffering=1)  # a whole line at a time

    def log(metrics):
        metrics_file.write(json.dumps(metrics) + "\n")

    # From here on Ctrl-C and SIGTERM wait for the end of the step, which saves; a second one ends it at once. (Not with several
    # processes: there a terminal and torchrun both send it, and torchrun ends by force what has not stopped after 30 s.)
    signals = []

    def on_signal(which, _):
        signals.append(which)
        if processes == 1:
            signal.signal(which, signal.SIG_DFL)

    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, on_signal)

    # What ends a run before its time, a full disk or another process's death, says how to go on.
    def on_crash(kind, error, trace):
        sys.__excepthook__(kind, error, trace)
        print(f"the run ended before its time; the same command with --resume goes on from the last state in {state_dir}", file=sys.stderr)

    sys.excepthook = on_crash

    where = args.device if processes == 1 else f"{processes} x {args.device}{', sharded' if args.fsdp else ''}"
    print(f"{args.loss}: {total_steps} steps of {args.batch_size} pairs on {where} in {args.dtype}, learning rate {args.learning_rate:g}, "
          f"beta {args.beta:g}" + (f", T {args.temperature:g}" if args.loss == "rdpo" else "") + (f", from step {first_step}" if first_step else ""))
    print(f"ready after {time.monotonic() - began:.1f} s\n\n{TABLE_HEAD}")
    if first_step == 0:
        held_out_metrics = evaluate(model, held_out_rows, args, autocast)
        log({"step": 0, "epoch": 0.0} | held_out_metrics)
        print(table_line(0, {}, held_out_metrics))
    chosen_logps, warned = [], False  # of held-out pairs, one per evaluation
    little = 0.1 * sum(len(pair.chosen_ids) for pair in held_out) / len(held_out)  # 0.1 nat per token

    joint = joint_gradients(model)  # of several processes, to be added up

    # The loop.
    progress = tqdm(total=total_steps, initial=first_step, desc="training", unit="step", disable=number > 0 or None, leave=False)
    for step in range(first_step, total_steps):
        step_began = time.monotonic()
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0 or step == first_step:
            order = epoch_order(len(pairs), args.seed, epoch)
        indices = order[place * args.batch_size:(place + 1) * args.batch_size]
        chosen_tokens = sum(len(pairs[i].chosen_ids) for i in indices)

        # Forward and backward, a micro-batch at a time; each is weighted by what the whole step holds, on whichever process it lies.
        if args.lora_dropout:  # what is dropped follows from the step, so that a resumed run drops the same
            torch.manual_seed(hash((args.seed, step, number)))
        shares, parts = deal(pairs, indices, args.tokens_per_batch, shared), []
        for batch in shares[number]:
            columns = forward(model, rows, batch, args, autocast)
            loss = total_loss(columns, len(indices), chosen_tokens, args)
            if args.fsdp:  # which averages gradients over processes where they are to be added
                loss = loss * processes
            scaler.scale(loss).backward()
            parts.append({name: column.detach() for name, column in columns.items()})
        if joint is not None:
            dist.all_reduce(joint)
        parts, indices = of_all_processes(parts, shares)  # the same pairs, in the order of the micro-batches

        # Step-0 gate: nothing has been learned yet, so the policy must equal the cached reference, and the loss ln 2.
        if step == 0:
            for side, reference in (("chosen", rows.ref_chosen_logps), ("rejected", rows.ref_rejected_logps)):
                check_equal(f"at step 0 the policy's and the cached reference's log-probabilities of the {side} answers",
                            torch.cat([part[f"logps/{side}"] for part in parts]), reference[indices],
                            [longest_row(pairs[i]) for i in indices], dtype, f"delete {cache.path}")

        # A step that is not finite is never taken.
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        metrics = summary(parts, rows, indices, args)  # here, once per step, the CPU waits for the GPU
        grad_norm = whole(grad_norm).item()
        if not math.isfinite(metrics["loss"]) or not math.isfinite(grad_norm) and scaler.get_scale() <= 1:
            losses = torch.cat([part["losses"] for part in parts]).tolist()
            names = [pairs[i].where for i, loss in zip(indices, losses) if not math.isfinite(loss)] or [pairs[i].where for i in indices]
            raise BadInput(f"step {step + 1}: loss {metrics['loss']}, gradient norm {grad_norm}, rows {', '.join(names[:3])}; "
                           f"lower --learning_rate; the last good state is in {state_dir}")
        if not math.isfinite(grad_norm):  # float16 only, where the loss is scaled up: it was too far
            warn(f"step {step + 1} left out: its gradients are beyond float16 at a loss scale of {scaler.get_scale():g}, which goes down now")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=joint is None)

        # Log, evaluate, save.
        done = step + 1
        log({"step": done, "epoch": done / steps_per_epoch} | metrics | {
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None, "lr": learning_rate(step), "step_seconds": time.monotonic() - step_began,
            "tokens": sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in (pairs[i] for i in indices)),
            "peak_memory_mib": peak_memory_mib(device)})
        progress.update()
        if done % eval_every == 0 or done == total_steps:
            held_out_metrics = evaluate(model, held_out_rows, args, autocast)
            log({"step": done, "epoch": done / steps_per_epoch} | held_out_metrics)
            with progress.external_write_mode():
                print(table_line(done, metrics, held_out_metrics))
            chosen_logps.append(held_out_metrics["eval/logps/chosen"])
            fell = len(chosen_logps) > 3 and chosen_logps[-1] < chosen_logps[-2] < chosen_logps[-3] < chosen_logps[-4]
            if fell and not warned and held_out_rows.ref_chosen_logps.mean() - chosen_logps[-1] > little:
                warn("the chosen answers grow ever less likely, three evaluations in a row; "
                     "try a lower --learning_rate, a higher --beta, or --sft_weight 0.1")
                warned = True
        stop = largest(signals[0] if signals else 0)  # a signal to one process stops all of them, after the same step
        if done % args.save_every == 0 or done == total_steps or stop:
            save_state(state_dir, done, model, optimizer, scaler, args, fingerprint)
        if stop:
            progress.close()
            print(f"stopped after step {done}, saved; the same command with --resume goes on")
            leave()
            sys.exit(128 + stop)
    progress.close()

    # The end: save what transformers, vLLM or llama.cpp can load, and show what changed. What lies in shards, or beside weights that were
    # rounded to the compute dtype, goes into a student that process 0 loads anew; before that it writes its answers.
    load_anew = args.fsdp or args.lora_rank
    if load_anew and (number == 0 or args.fsdp):
        answers_after = write_answers(model)
    weights = gathered_weights(model) if args.fsdp else trained_weights(model)
    if number > 0:
        return leave()
    if load_anew:
        model = load_model(args.model or TOY_STUDENT, dtype="auto")
        if args.lora_rank:
            add_lora(model, args.lora_rank, args.lora_alpha, args.lora_dropout)
        model.load_state_dict(weights, strict=False)
    save_model_folder(model, own_dtype, tokenizer, args)
    if have_matplotlib():
        draw_curves([args.out_dir], os.path.join(args.out_dir, "curves.png"))
    changed = torch.cat([after != before for after, before in zip(sample_weights(model, own_dtype), weights_before)])
    if not load_anew:
        answers_after = write_answers(model)
    print("\n" + side_by_side(prompts[shown], {"reference": answers_before[shown], "student": answers_after[shown]}))
    if toy:
        from toy import world  # in the toy world what is right can be computed exactly
        print(rates_table(world.rates(toy_rows, answers_before), world.rates(toy_rows, answers_after), len(toy_rows)))
    print(f"weights changed: {100 * changed.float().mean():.1f} % (of {len(changed)} sampled, as saved, in {str(own_dtype).removeprefix('torch.')})")
    print(f"{'adapter' if args.save_adapter else 'student'} saved in {args.out_dir} after {time.monotonic() - began:.0f} s")
    leave()


def warn(text):
    if process()[0] == 0:
        print(f"warning: {text}", file=sys.stderr)


def decoder_layers(model, flag):
    """The blocks that a decoder stacks. BadInput names the flag that asks for them where transformers does not say which they are."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BadInput(f"{flag}: this architecture has no layers that allow it; leave it out")
    return layers


def checkpoint_layers(model, dropout=0.0):
    """Makes each layer keep only its input, and compute the rest again in the backward pass: a third more time, far less memory.

    With dropout in its adapters it must drop the same again.
    """
    # By hand, for transformers' own switch works in training mode only, which has dropout.
    for layer in decoder_layers(model, "--gradient_checkpointing"):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=dropout > 0)


def sample_weights(model, dtype):
    """At most 1,000 evenly spaced values of each weight tensor, as they would be saved."""
    return [weight.detach().flatten()[::math.ceil(weight.numel() / 1000)].to("cpu", dtype, copy=True) for weight in model.parameters()]


def peak_memory_mib(device):
    """Peak memory of this process: the GPU's where there is one, else what was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


TABLE_HEAD = "  step    loss | held out: loss  chosen ranked first  agrees with scores  margin  logp chosen  logp rejected"


def table_line(step, metrics, held_out_metrics):
    """One evaluation for a person: the last step's loss, then the held-out pairs."""
    value = {name.removeprefix("eval/"): number for name, number in held_out_metrics.items()}
    loss = f"{metrics['loss']:7.4f}" if metrics else "       "
    agreement = f"{value['rewards/score_agreement']:.2f}" if "rewards/score_agreement" in value else "-"
    return (f"{step:6d} {loss} | {value['loss']:14.4f}  {value['rewards/accuracies']:19.2f}  {agreement:>18}  {value['rewards/margins']:+6.2f}  "
            f"{value['logps/chosen']:11.1f}  {value['logps/rejected']:13.1f}")


def rates_table(before, after, count):
    """The toy world's exact judge on all held-out prompts: the share of answers that are as they should be."""
    lines = [f"right answers to {count} held-out prompts  reference  student"]
    return "\n".join(lines + [f"{name:37s}  {before[name]:9.2f}  {after[name]:7.2f}" for name in before])


if __name__ == "__main__":
    run(main)
