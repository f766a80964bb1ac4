"""Stage 3, after teacher.py and reward.py: distil a student with the rDPO loss.

    python train.py --data toy/scored.jsonl       the bundled toy student, a minute on a laptop
    python train.py --data scored.jsonl --model DIR_OR_HUB_ID      a real student
    torchrun --nproc_per_node=8 train.py [--fsdp] ...              several GPUs

From top to bottom: a forward pass, metrics, the reference pass, train_student() (data, policy,
reference, optimizer, loop, export), finish(), the flags. The loss of a pair and the
log-probabilities are rdpo.py's; tokens and batches are data.py's. Skip infra/ on a first reading.
"""
import math
import os
import time
from typing import NamedTuple

import torch
from tqdm import tqdm

import infra.distributed as ranks  # DDP and FSDP: one rank, 0 of 1, without torchrun
from data import collate, count_chosen, count_tokens, epoch_order, load_pairs
from infra import checkpoint, models, nf4, selfcheck
from infra.card import write_card
from infra.command import (BadInput, Parser, above_0, at_least, between, number, path, run,
                           template_kwargs, warn)
from infra.lora import without_lora
from infra.packing import micro_batches
from infra.plots import NO_CURVES, draw_curves, have_matplotlib, read_metrics
from infra.policy import load_policy, place
from infra.reference import ReferenceCache
from infra.rounding import Masters
from infra.rows import check_judges
from infra.runlog import (TABLE_HEAD, StagePeaks, compile_note, peak_memory_mib, print_parts,
                          print_plan, table_line)
from infra.split import parts_of, split_train_val
from infra.templates import pin_date, template_note
from rdpo import LOSSES, judged_tau, plain_sequence_logps, rdpo_loss, sequence_logps
from sample import sample_answers, sample_rows, show_answers
from toy import world

# ------------------------------------------------------------------------ forward pass and metrics


class Dataset(NamedTuple):
    """P pairs and what is known of each before training, on the CPU."""
    pairs: list
    share_prefix: bool  # the layout of their batches, see data.collate
    ref_chosen_logps: torch.Tensor  # (P,)
    ref_rejected_logps: torch.Tensor  # (P,)
    tau: torch.Tensor  # (P,) the target
    lean: torch.Tensor  # (P,) above 0: the judge prefers chosen; nan: not judged
    weight: torch.Tensor  # (P,) of the pair's loss

    @property
    def tensors(self):
        return self[2:]  # all fields behind share_prefix

    def part(self, indices):
        indices = list(indices)
        return Dataset([self.pairs[i] for i in indices], self.share_prefix,
                       *(tensor[indices] for tensor in self.tensors))


def policy_logps(policy, batch):
    """sequence_logps. FSDP gathers weights only around a method it knows, so call that one."""
    if ranks.is_sharded(policy):
        return policy.sequence_logps(batch)
    return sequence_logps(policy, batch)


def rank_batches(pairs, indices, share_prefix, args):
    """This rank's micro-batches: (list of indices, whether it is real).

    A rank with fewer micro-batches than another computes a pair once more, which then does not
    count: under FSDP every forward pass needs all ranks, and DDP takes the same path.
    """
    batches = micro_batches(pairs, indices, args.tokens_per_batch, share_prefix, ranks.rank(),
                            ranks.world_size())
    return [(batch or [0], bool(batch)) for batch in batches]


def forward(policy, data, args, pair_count, chosen_tokens):
    """One micro-batch: (its part of the step's two losses (2,), {metric: value of each pair (B,)}).

    The losses are of preference and of imitation. pair_count and chosen_tokens are the whole
    step's, so the parts of all micro-batches and ranks add up however the step is split.
    """
    batch = collate(data.pairs, data.share_prefix).to(policy.device)
    chosen_logps, rejected_logps = policy_logps(policy, batch).view(2, -1)  # (B,) each
    ref_chosen_logps, ref_rejected_logps, tau, lean, weight = (
        ranks.send(tensor, policy.device) for tensor in data.tensors)  # (B,) each
    kind = LOSSES[args.loss]
    losses, chosen_rewards, rejected_rewards = rdpo_loss(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, tau, args.beta,
        kind.form)
    preference = kind.preference * losses / pair_count  # (B,)
    imitation = (kind.imitation + args.sft_weight) * -chosen_logps / chosen_tokens  # (B,)
    return (weight * torch.stack([preference, imitation])).sum(1), pair_metrics(
        chosen_logps.detach(), rejected_logps.detach(), chosen_rewards, rejected_rewards, tau, lean)


def pair_metrics(chosen_logps, rejected_logps, chosen_rewards, rejected_rewards, tau, lean):
    """{name: value of each pair (B,)}, logged as the mean over pairs. A new metric goes here.

    nan is "no value", as an agreement with a tie, and left out of the mean. If the margin itself is
    nan, something is broken: then it stays in the mean, where it is seen.
    """
    margins = chosen_rewards - rejected_rewards  # (B,)
    # Whether the policy prefers chosen. Equal up to rounding counts as half right.
    right = torch.where(margins.abs() < 1e-4, 0.5, (margins > 0).float())  # (B,)
    agrees = torch.where(lean > 0, right, 1 - right)  # (B,)
    return {"logps/chosen": chosen_logps, "logps/rejected": rejected_logps,
            "rewards/chosen": chosen_rewards, "rewards/rejected": rejected_rewards,
            "tau/mean": tau, "rewards/margins": margins, "rewards/accuracies": right,
            # A tie, and a pair without scores, cannot be agreed with.
            "rewards/score_agreement": torch.where(lean.abs() > 0, agrees, math.nan)}


def forward_all(policy, data, args, backward=None, whole=None):
    """Forward passes of this rank's share of a Dataset, and backward(loss) after each.

    Returns (its part of the two losses (2,), its pairs, {metric: value of each of them (B,)}).
    The losses are those of `whole`, of which data may be a part.
    """
    whole = whole or data
    pair_count, chosen_tokens = len(whole.pairs), count_chosen(whole.pairs)
    total, pairs, parts = torch.zeros(2, device=policy.device), [], []
    for indices, is_real in rank_batches(data.pairs, range(len(data.pairs)), data.share_prefix,
                                         args):
        part = data.part(indices)
        losses, values = forward(policy, part, args, pair_count, chosen_tokens)
        losses = is_real * losses  # 0 if it only keeps the other ranks company
        if backward:
            backward(losses.sum())
        total += losses.detach()
        pairs += part.pairs if is_real else []
        parts.append({name: value if is_real else value[:0] for name, value in values.items()})
    return total, pairs, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def mean_metrics(losses, values):
    """{name: number} over all ranks, from forward_all's. The CPU waits for the GPU here."""
    stacked = torch.stack(list(values.values()))  # (M, B)
    left_out = stacked.isnan() & ~values["rewards/margins"].isnan()  # (M, B)
    own_sums, own_counts = stacked.masked_fill(left_out, 0).sum(1), (~left_out).sum(1)  # (M,) each
    own = torch.cat([losses.sum()[None], own_sums, own_counts])  # (1 + 2M,)
    loss, *numbers = ranks.all_reduce(own).tolist()
    sums, counts = numbers[:len(values)], numbers[len(values):]
    return {"loss": loss} | {name: total / count for name, total, count
                             in zip(values, sums, counts) if count}


@torch.no_grad()
def evaluate(policy, data, args):
    """(metrics of all pairs of a Dataset and of its parts; this rank's pairs; their values).

    The names begin with eval/, those of a part with eval/PART/. Each pair is evaluated once.
    """
    by_file = len(args.eval_data or []) > 1
    parts = {name: data.part(own) for name, own in parts_of(data.pairs, by_file).items()}
    found = {name: forward_all(policy, part, args, whole=data) for name, part in parts.items()}
    losses, pairs, values = zip(*found.values())
    values = {name: torch.cat([each[name] for each in values]) for name in values[0]}
    metrics = {f"eval/{name}": mean for name, mean in mean_metrics(sum(losses), values).items()}
    for part, (losses, _, of_part) in found.items() if len(parts) > 1 else ():
        own = parts[part].pairs  # of which its losses are the mean, not of all pairs
        share = torch.tensor([len(own) / len(data.pairs),
                              count_chosen(own) / count_chosen(data.pairs)]).to(losses)  # (2,)
        metrics |= {f"eval/{part}/{name}": mean
                    for name, mean in mean_metrics(losses / share, of_part).items()}
    return metrics, sum(pairs, []), values


# ---------------------------------------------------------------------------------- the reference


@torch.no_grad()
def make_dataset(policy, pairs, share_prefix, cache, args):
    """A Dataset. The policy must still be the reference: it computes what the cache lacks."""
    batches = rank_batches(pairs, cache.missing(pairs), share_prefix, args)
    with cache.filling():
        # The longest first: if memory is too small, the run ends now.
        for indices, is_real in tqdm(batches[::-1], "reference", disable=ranks.rank() > 0 or None,
                                     leave=False):
            own = [pairs[i] for i in indices]
            batch = collate(own, share_prefix).to(policy.device)
            logps = policy_logps(policy, batch).view(2, -1).T  # (B, 2)
            cache.add(own if is_real else [], logps)
    ref_chosen_logps, ref_rejected_logps = cache.lookup(pairs)  # (P,) each
    judged = judged_tau(torch.tensor([pair.score_gap for pair in pairs]),
                        torch.tensor([pair.tau for pair in pairs]), args.tau_temperature)  # (P,)
    tau, smoothing = LOSSES[args.loss].target(judged), args.label_smoothing  # (P,)
    tau = (1 - smoothing) * tau + smoothing * (1 - tau)  # (P,)
    return Dataset(pairs, share_prefix, ref_chosen_logps, ref_rejected_logps, tau,
                   torch.tensor([pair.lean for pair in pairs]),
                   torch.tensor([pair.weight for pair in pairs]))


def choose_layout(policy, train_pairs, val_pairs, args):
    """Whether one row of tokens can hold whole pairs: see selfcheck.can_share_prefix.

    With --base_bits it also prints how far the 4-bit base is from the stored one: nf4.compare.
    """
    def fast_logps(tried, share_prefix):
        batch = collate(tried, share_prefix, rows=[[*range(len(tried))]])
        return policy_logps(policy, batch.to(policy.device))

    with models.uncompiled(args):
        share_prefix = selfcheck.can_share_prefix(policy, train_pairs + val_pairs, args, fast_logps,
                                                  plain_sequence_logps)
        if args.base_bits:
            nf4.compare(policy, val_pairs[:16], lambda pair: fast_logps([pair], share_prefix))
    return share_prefix


# ------------------------------------------------------------------------------------------- main


def main(argv=None):
    args = get_args(argv)
    began = time.monotonic()
    device, dtype = ranks.setup(args)
    with checkpoint.only_run_in(args):
        trained = train_student(args, device, dtype)
        if trained:  # on rank 0; the policy is gone, so there is room for the saved student
            finish(args, began, *trained)


def train_student(args, device, dtype):
    """Train and export. Returns what finish() needs on rank 0, None on the others."""
    # Data: every row is checked and tokenized before anything is computed.
    tokenizer = models.load_tokenizer(args.model or models.TOY_STUDENT, args.template_kwargs)
    pin_date(tokenizer, ranks.broadcast(args.date))
    train_pairs, val_pairs = load_train_val(args, tokenizer)

    # Policy. The cache hashes the reference's weights: create it before adapters and shards.
    policy, saved_dtype, weights_before = load_policy(args, dtype)
    cache = ReferenceCache(args, policy)
    place(policy, args, device, dtype, sequence_logps)
    share_prefix = choose_layout(policy, train_pairs, val_pairs, args)
    peaks = StagePeaks(device)
    peaks.end("start")

    # Reference: the policy before its first step; with LoRA, the policy without its adapters.
    with without_lora(policy):
        train = make_dataset(policy, train_pairs, share_prefix, cache, args)
        val = make_dataset(policy, val_pairs, share_prefix, cache, args)
    samples = sample_rows(args, val_pairs)
    answers_before = sample_answers(policy, tokenizer, samples, args)
    peaks.end("reference")

    # Optimizer: AdamW on the float32 masters. The gradient scaler acts under float16 only.
    masters = Masters(policy, dtype, args.seed)
    optimizer = torch.optim.AdamW(masters.parameters(), lr=args.learning_rate,
                                  weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    steps_per_epoch = math.ceil(len(train_pairs) / args.batch_size)
    total_steps = args.max_steps or args.epochs * steps_per_epoch
    eval_every = args.eval_every or math.ceil(total_steps / 10)

    # Resume: weights, moments and step come from the state; the data order follows from the step.
    states = checkpoint.Run(args, masters, optimizer, scaler, train, cache.name)
    first_step = states.begin()
    masters.round(first_step)
    coarsest = saved_dtype if dtype == torch.float32 else dtype  # of the dtypes on the way
    print_plan(args, policy, train, val, cache, first_step, total_steps, weights_before, coarsest)
    val_metrics, pairs, values = evaluate(policy, val, args)
    selfcheck.check_student(first_step, masters, val_metrics["eval/loss"], states.folder)
    if first_step == 0:  # the policy is the reference: all rewards are 0
        selfcheck.check_step_0(pairs, values, args, cache.path)
        states.log(step=0, epoch=0.0, **val_metrics)
        print(table_line(0, {}, val_metrics))

    # Loop: one optimizer step per batch_size pairs.
    stop_signal = checkpoint.StopSignal()
    flat_gradients = ranks.flat_gradients(masters)
    progress = tqdm(total=total_steps, initial=first_step, desc="training", unit="step",
                    disable=ranks.rank() > 0 or None, leave=False)

    def backward(loss):
        # FSDP averages gradients over ranks; gradient_ranks turns that into a sum.
        scaler.scale(loss * ranks.gradient_ranks(policy)).backward()

    for step in range(first_step, total_steps):
        step_began = time.monotonic()
        epoch, n = divmod(step, steps_per_epoch)
        order = epoch_order(len(train_pairs), args.seed, epoch)
        data = train.part(order[n * args.batch_size:(n + 1) * args.batch_size])
        losses, pairs, values = forward_all(policy, data, args, backward)
        # In 16 bits gradients go to the float32 masters: by a hook during backward, FSDP's now.
        masters.collect_gradients()
        ranks.sum_gradients(flat_gradients)  # DDP's; FSDP has summed its own
        if step == 0:  # the cached reference of these pairs, as of the validation pairs above
            selfcheck.check_step_0(pairs, values, args, cache.path)

        # Update. If loss or gradient is not finite the run stops; float16 skips the step.
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(masters.parameters(), args.max_grad_norm)
        metrics = mean_metrics(losses, values)
        grad_norm = ranks.full_tensor(grad_norm).item()
        selfcheck.check_step(step, metrics["loss"], grad_norm, scaler, pairs, values, states.folder)
        lr = learning_rate(step, total_steps, args)
        optimizer.param_groups[0]["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=flat_gradients is None)  # DDP's are views of a buffer
        masters.round(step + 1)  # the model's 16-bit weights anew; in float32 it has the masters

        # Log, evaluate, save. Evaluate before the save: a resumed run would not do it again.
        done = step + 1
        states.log(step=done, epoch=done / steps_per_epoch, **metrics, grad_norm=grad_norm, lr=lr,
                step_seconds=time.monotonic() - step_began, tokens=count_tokens(data.pairs),
                peak_memory_mib=peak_memory_mib(device))
        progress.update()
        if done % eval_every == 0 or done == total_steps:
            val_metrics, *_ = evaluate(policy, val, args)
            states.log(step=done, epoch=done / steps_per_epoch, **val_metrics)
            with progress.external_write_mode():
                print(table_line(done, metrics, val_metrics))
        stop = ranks.maximum(stop_signal.number)  # a signal to one rank stops all
        if done % args.save_every == 0 or done == total_steps or stop:
            selfcheck.check_student(done, masters, val_metrics["eval/loss"], states.folder)
            states.save(done)
        if stop:
            progress.close()
            states.stopped(done, stop)
    progress.close()
    print_parts(val_metrics)

    # Export: a Hugging Face folder that transformers, vLLM and llama.cpp load, or an adapter.
    answers_after = sample_answers(policy, tokenizer, samples, args)
    peaks.end("training")
    saved_line = checkpoint.export(policy, masters, tokenizer, saved_dtype, weights_before, args)
    peaks.end("export")
    ranks.cleanup()
    if saved_line:  # on rank 0
        show_answers(samples, answers_before, answers_after, args)
        return tokenizer, train_pairs, val, val_metrics, peaks, saved_line


def finish(args, began, tokenizer, train_pairs, val, val_metrics, peaks, saved_line):
    """After training, on rank 0: curves, the saved student evaluated again, the model card."""
    training, validation = read_metrics(args.out_dir)
    best = min(validation, key=lambda line: line["eval/loss"])
    if validation[-1]["eval/loss"] > best["eval/loss"] + 0.02:
        warn(f"the validation loss was {best['eval/loss']:.4f} after step {best['step']}, and is "
             f"{validation[-1]['eval/loss']:.4f} now; try a lower --learning_rate, or fewer steps")
    lines = [TABLE_HEAD, table_line(validation[0]["step"], {}, validation[0]),
             table_line(validation[-1]["step"], training[-1], val_metrics)]
    curves = os.path.join(args.out_dir, "curves.png")
    print(draw_curves([args.out_dir], curves) if have_matplotlib() else NO_CURVES)
    if not args.save_adapter and not args.skip_saved_check:
        lines.append(check_saved(val, val_metrics, args))
        peaks.end("check")
    write_card(args, tokenizer, train_pairs, val.pairs, lines)
    print(peaks.line() + (compile_note() if args.compile else ""), end="")
    print(f"{saved_line} in {args.out_dir} after {time.monotonic() - began:.0f} s")


def check_saved(val, trained, args):
    """Evaluate the student read back from out_dir: see selfcheck.compare_saved."""
    saved = evaluate(models.load_saved(args), val, args)[0]
    return selfcheck.compare_saved(saved, trained, args)


def load_train_val(args, tokenizer):
    """(training pairs, validation pairs) by the flags. Prints what was left out."""
    loss = LOSSES[args.loss]

    def load(paths):
        pairs = []
        for path in paths:
            more, counts = load_pairs(path, tokenizer, args.max_length, loss.needs_scores,
                                      args.skip_bad_rows)
            counts.report()
            pairs += more
        return pairs

    pairs, val_pairs = load(args.data), load(args.eval_data or [])
    if loss.needs_scores:
        check_judges(pairs + val_pairs)
    if args.eval_data:
        names = {name for pair in pairs for name in pair.names}
        seen = sum(not names.isdisjoint(pair.names) for pair in val_pairs)
        if seen:
            warn(f"{seen} of {len(val_pairs)} pairs of --eval_data have a prompt of --data, its "
                 "first question or its group")
    else:
        pairs, val_pairs = split_train_val(pairs, args.eval_share, args.seed)
    if args.loss == "dsc":  # trains only on revisions that scored higher
        accepted = [pair for pair in pairs if pair.lean > 0]
        print(f"dsc: {len(accepted)} of {len(pairs)} revisions scored above their originals")
        pairs = accepted
    if not pairs or not val_pairs:
        raise BadInput(f"--data: {len(pairs)} pairs to train on and {len(val_pairs)} for "
                       "validation; give more rows, or --eval_data")
    note = template_note(tokenizer)
    if note:
        print(note)
    if args.loss == "rdpo" and all(pair.lean == 0 for pair in pairs):
        warn("all scores tie: tau is 1/2, so rdpo keeps the student where it is")
    if not args.model and not any(map(world.is_prompt, (pair.prompt for pair in pairs))):
        warn("this trains the toy student, 0.5 M parameters that know nothing but the toy's world; "
             "name a real one with --model FOLDER_OR_HUB_ID")
    return pairs, val_pairs


def learning_rate(step, total_steps, args):
    """Linear warmup, then a cosine to 0."""
    warmup = args.warmup_ratio * total_steps
    if step < warmup:
        return args.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total_steps - warmup)
    return args.learning_rate * (1 + math.cos(math.pi * progress)) / 2


# ------------------------------------------------------------------------------------------ flags


def get_args(argv=None):
    parser = Parser("Distil a student on scored pairs with the rDPO loss.")
    flag, share, dtypes = parser.add_argument, between(0, 1, float), ("float32", "bfloat16",
                                                                      "float16")
    # data
    flag("--data", type=path, required=True, nargs="+", help="scored rows: .jsonl or JSON lists")
    flag("--eval_data", type=path, nargs="+", help="validation rows (default: a share of --data)")
    flag("--eval_share", type=share, default=0.1, help="that share, at most 256 prompts")
    flag("--model", type=path, help="student: folder or hub id (default: the toy student)")
    flag("--max_length", type=at_least(1), default=1024, help="tokens of prompt + one answer")
    flag("--template_kwargs", type=template_kwargs,
         help="defaults of the chat template, such as '{\"enable_thinking\": false}'")
    flag("--skip_bad_rows", action="store_true", help="leave out and count unusable rows")
    # loss
    flag("--loss", choices=LOSSES, default="rdpo")
    flag("--beta", type=above_0(), default=0.1, help="how tightly the reference holds the student")
    flag("--tau_temperature", type=above_0(), default=1.0,
         help="T of tau, in points on a scale of 0 to 5 (rdpo)")
    flag("--label_smoothing", type=number(float, lambda value: 0 <= value < 0.5,
                                          "from 0 to below 0.5"),
         default=0.0, help="tau = 1 - this (dpo)")
    flag("--sft_weight", type=at_least(0, float), default=0.0,
         help="weight of an added imitation loss (rdpo, dpo)")
    # optimizer
    flag("--learning_rate", type=at_least(0, float),
         help="default 5e-6, with LoRA 5e-5; for the toy student 3e-4 and 1.5e-3")
    flag("--warmup_ratio", type=share, default=0.1, help="share of steps with a rising rate")
    flag("--weight_decay", type=at_least(0, float), default=0.0)
    flag("--max_grad_norm", type=above_0(), default=1.0)
    flag("--epochs", type=at_least(1), default=1)
    flag("--max_steps", type=at_least(1), help="number of steps, in place of --epochs")
    flag("--batch_size", type=at_least(1), default=16, help="pairs per step, over all ranks")
    flag("--seed", type=at_least(0), default=0)
    # LoRA
    flag("--lora_rank", type=at_least(0), default=0, help="train adapters of this rank, 0: none")
    flag("--lora_alpha", type=above_0(),
         help="scales adapters by alpha / rank (default: 2 * rank, at most 32)")
    flag("--base_bits", type=int, choices=(0, 4), default=0,
         help="4: frozen weights in 4 bits (NF4); 0: in --dtype")
    flag("--save_adapter", action="store_true", help="save the adapter in PEFT's format, unmerged")
    # memory and speed: these change the result by rounding at most
    flag("--tokens_per_batch", type=at_least(1),
         help="per micro-batch, unless a pair is longer (default: 1024; on CUDA what fits)")
    flag("--gradient_checkpointing", action="store_true", help="less memory, more time")
    flag("--compile", action="store_true", help="torch.compile the model")
    flag("--fsdp", action="store_true", help="under torchrun: shard weights over the ranks")
    flag("--dtype", choices=("auto", *dtypes), default="auto",
         help="compute dtype; AdamW updates float32 masters")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    flag("--ref_cache_dir", type=path, default="~/.cache/rdpo",
         help="reference log-probabilities of all runs")
    # output
    flag("--out_dir", type=path, default="out")
    flag("--save_dtype", choices=("auto", *dtypes), default="auto",
         help="of the saved student (default: as it was loaded)")
    flag("--skip_saved_check", action="store_true", help="do not evaluate the saved student again")
    flag("--resume", action="store_true", help="continue from the last state in out_dir")
    flag("--overwrite", action="store_true", help="delete an earlier run in out_dir")
    flag("--eval_every", type=at_least(1), help="steps between evaluations (default: 10 in all)")
    flag("--save_every", type=at_least(1), default=100, help="steps between saved states")
    flag("--max_new_tokens", type=at_least(1), default=64, help="length of the answers shown")
    args = parser.parse_args(argv)
    if args.label_smoothing and args.loss != "dpo":
        raise BadInput("--label_smoothing needs --loss dpo")
    if args.tau_temperature != 1 and args.loss in ("dpo", "sft", "dsc"):
        raise BadInput("--tau_temperature needs --loss rdpo")
    if args.sft_weight and not LOSSES[args.loss].preference:
        raise BadInput("--sft_weight needs --loss rdpo or dpo: the others are imitation already")
    if not args.lora_rank and (args.lora_alpha is not None or args.save_adapter):
        raise BadInput("--lora_alpha and --save_adapter need --lora_rank, such as --lora_rank 16")
    if args.base_bits and (args.fsdp or not args.lora_rank):
        raise BadInput("--base_bits needs --lora_rank, such as --lora_rank 16, and no --fsdp")
    if args.fsdp and args.compile:
        raise BadInput("--compile does not work with --fsdp; leave one out")
    if {*map(os.path.realpath, args.data)} & {*map(os.path.realpath, args.eval_data or [])}:
        raise BadInput("--eval_data is a file of --data too; give other rows, or leave it out")
    if args.model and os.path.realpath(args.model) == os.path.realpath(models.TOY_STUDENT):
        args.model = None  # the toy by another name
    if args.lora_rank and args.lora_alpha is None:
        # At most 32: with more, the best learning rate falls as the rank grows (docs/scale.md).
        args.lora_alpha = min(2.0 * args.lora_rank, 32.0)
    if args.learning_rate is None:
        full, lora = (5e-6, 5e-5) if args.model else (3e-4, 1.5e-3)
        args.learning_rate = lora if args.lora_rank else full
    return args


if __name__ == "__main__":
    run(main)
