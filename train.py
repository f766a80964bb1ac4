"""Stage 3, after teacher.py and reward.py: distil a student with the rDPO loss.

    python train.py --data toy/scored.jsonl       the bundled toy student, a minute on a laptop
    python train.py --data scored.jsonl --model DIR_OR_HUB_ID      a real student
    torchrun --nproc_per_node=8 train.py [--fsdp] ...              several GPUs

From top to bottom: the losses, one forward pass, the reference pass, main() (data, policy,
reference, optimizer, loop, export), the flags. The loss of a pair and the log-probabilities are
rdpo.py's; tokens and batches are data.py's. infra/ can be skipped at first.
"""
import contextlib
import functools
import math
import os
import random
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from tqdm import tqdm

import infra.distributed as dist
from data import (batch_tokens, check_judges, collate, count_chosen, count_tokens, encode_prompt,
                  epoch_order, load_pairs, longest_row, micro_batches, split_train_val,
                  template_note)
from infra import checkpoint, models, selfcheck
from infra.audit import log_pairs
from infra.card import write_card
from infra.command import (Parser, above_0, at_least, between, number, one_line, path, refuse,
                           run, template_kwargs, warn)
from infra.generate import generate
from infra.lora import add_lora, without_lora
from infra.plots import draw_curves, have_matplotlib
from infra.rounding import Masters
from infra.runlog import (TABLE_HEAD, SampleAnswers, StagePeaks, compile_note, peak_memory_mib,
                          print_grid, print_plan, table_line)
from rdpo import (ReferenceCache, plain_sequence_logps, preference_probability, rdpo_loss,
                  sequence_key, sequence_logps)

# ------------------------------------------------------------------------------------- the losses


# losses (B,) come divided by the step's pairs, chosen_nll (B,) by the step's chosen tokens.
def preference(losses, chosen_nll, args):
    return losses + args.sft_weight * chosen_nll


def imitation(losses, chosen_nll, args):
    return chosen_nll


class Loss(NamedTuple):
    """A choice of --loss. A new one is a new entry of LOSSES."""
    needs_scores: bool
    target: Callable  # (score_gaps (P,), args) -> tau (P,), of a Dataset's P pairs
    combine: Callable  # (losses (B,), chosen_nll (B,), args) -> (B,), summed by forward()


LOSSES = {
    "rdpo": Loss(True, lambda gaps, args: preference_probability(gaps, 0.0, args.temperature),
                 preference),
    # DPO is sure of the chosen answer. With --label_smoothing this is conservative DPO.
    "dpo": Loss(False, lambda gaps, args: torch.full_like(gaps, 1.0 - args.label_smoothing),
                preference),
    "sft": Loss(False, lambda gaps, args: torch.ones_like(gaps), imitation),
    # Distilled self-critique (arXiv:2312.01957): SFT on s_r > s_o; load_train_val drops the rest.
    "dsc": Loss(True, lambda gaps, args: torch.ones_like(gaps), imitation),
}

# ------------------------------------------------------------------------ forward pass and metrics


class Dataset(NamedTuple):
    """Pairs and what is known of each before training."""
    pairs: list
    share_prefix: bool  # the layout of their batches, see data.collate
    columns: torch.Tensor  # (4, P) on the CPU: ref logps of chosen, of rejected, tau, s_r - s_o

    @property
    def tau(self):
        return self.columns[2]  # (P,)

    def part(self, indices):
        return self._replace(pairs=[self.pairs[i] for i in indices],
                             columns=self.columns[:, list(indices)])


# The order of forward()'s sums. The last two give rewards/score_agreement.
METRICS = ("loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected",
           "tau/mean", "rewards/margins", "rewards/accuracies", "agreeing", "decided")


def forward(policy, data, indices, args, pair_count, chosen_tokens):
    """One micro-batch: (its part of the step's loss, sums of METRICS, {pair: log-ratios (2,)}).

    pair_count and chosen_tokens are the whole step's, so the parts of all micro-batches and
    ranks add up to the same loss however the step is split. An empty micro-batch computes the
    first pair and drops it: see data.micro_batches.
    """
    batch = collate([data.pairs[i] for i in indices or [0]], data.share_prefix)
    logps = policy_logps(policy, batch.to(policy.device))  # (2B,)
    chosen_logps, rejected_logps = logps.view(2, -1)[:, :len(indices)]  # (B,) each
    ref_chosen_logps, ref_rejected_logps, tau, score_gaps = dist.send(
        data.columns[:, indices], policy.device)  # (B,) each
    losses, chosen_rewards, rejected_rewards = rdpo_loss(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, tau, args.beta)
    loss = LOSSES[args.loss].combine(losses / pair_count, -chosen_logps / chosen_tokens, args).sum()

    chosen_logps, rejected_logps = chosen_logps.detach(), rejected_logps.detach()
    margins = chosen_rewards - rejected_rewards  # (B,)
    # +1: prefers chosen, -1: rejected, 0: equal up to rounding, which counts as half right
    side = torch.where(margins.abs() < 1e-4, 0.0, margins.sign())  # (B,)
    decided = score_gaps.abs() > 0  # (B,), scored and no tie
    agreeing = torch.where(decided, (1 + side * score_gaps.sign()) / 2, 0.0)  # (B,)
    sums = [loss.detach()] + [column.sum() for column in (
        chosen_logps, rejected_logps, chosen_rewards, rejected_rewards, tau, margins,
        (1 + side) / 2, agreeing, decided)]
    log_ratios = torch.stack([chosen_logps - ref_chosen_logps,
                              rejected_logps - ref_rejected_logps], 1)  # (B, 2)
    return loss, torch.stack(sums), {data.pairs[i].where: ratios
                                     for i, ratios in zip(indices, log_ratios)}


def accumulate_gradients(policy, data, args, scaler):
    """Forward and backward of one step's Dataset: (sums of METRICS, {pair: log-ratios})."""
    pair_count, chosen_tokens = len(data.pairs), count_chosen(data.pairs)
    sums, log_ratios = torch.zeros(len(METRICS), device=policy.device), {}
    for indices in rank_batches(data.pairs, range(pair_count), data.share_prefix, args):
        loss, batch_sums, ratios = forward(policy, data, indices, args, pair_count, chosen_tokens)
        # FSDP averages gradients over ranks; gradient_ranks turns that into a sum.
        scaler.scale(loss * dist.gradient_ranks(policy)).backward()
        sums += batch_sums
        log_ratios |= ratios
    return sums, log_ratios


def mean_metrics(sums, pair_count):
    """{name: mean} from METRICS summed over pair_count pairs, on all ranks; loss is one already."""
    total = dict(zip(METRICS, dist.all_reduce(sums).tolist()))
    loss, agreeing, decided = (total.pop(name) for name in ("loss", "agreeing", "decided"))
    metrics = {"loss": loss} | {name: value / pair_count for name, value in total.items()}
    return metrics | ({"rewards/score_agreement": agreeing / decided} if decided else {})


@torch.no_grad()
def evaluate(policy, data, args):
    """(the metrics of all pairs of a Dataset, each name behind eval/; {pair: log-ratios})."""
    pair_count, chosen_tokens = len(data.pairs), count_chosen(data.pairs)
    sums, log_ratios = torch.zeros(len(METRICS), device=policy.device), {}
    for indices in rank_batches(data.pairs, range(pair_count), data.share_prefix, args):
        _, batch_sums, ratios = forward(policy, data, indices, args, pair_count, chosen_tokens)
        sums += batch_sums
        log_ratios |= ratios
    metrics = {f"eval/{name}": value for name, value in mean_metrics(sums, pair_count).items()}
    return metrics, dist.gather_rows(log_ratios)


def by_behaviour(data):
    """{behaviour: Dataset of its pairs}, {} if the rows do not name several."""
    indices = {}
    for i, pair in enumerate(data.pairs):
        indices.setdefault(pair.behaviour, []).append(i)
    return {behaviour: data.part(own) for behaviour, own in indices.items() if len(indices) > 1}


def policy_logps(policy, batch):
    """sequence_logps. FSDP gathers weights only around a method it knows, so call that one."""
    if dist.is_sharded(policy):
        return policy.sequence_logps(batch)
    return sequence_logps(policy, batch)


def eager(args):
    """Without compiling, where it would make graphs that training never uses."""
    return torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()


def rank_batches(pairs, indices, share_prefix, args):
    return micro_batches(pairs, indices, args.tokens_per_batch, share_prefix,
                         dist.rank(), dist.world_size())


# ---------------------------------------------------------------------------------- the reference


SPOT_CHECKS = 16  # cached pairs of a Dataset that are computed again


def cache_check(pairs, cache, args):
    """check({pair: log-ratios}): BadInput unless they are 0, as the reference's own are."""
    return functools.partial(selfcheck.check_step_0, dtype=getattr(torch, args.dtype),
                             tokens={pair.where: longest_row(pair) for pair in pairs},
                             cache_path=cache.path)


@torch.no_grad()
def make_dataset(policy, pairs, share_prefix, cache, args):
    """(Dataset, number of pairs whose reference log-probabilities had to be computed).

    The policy must still be the reference. An interrupted pass keeps what it computed. A few of
    the cached pairs are computed again: BadInput if they differ.
    """
    keys = [[sequence_key(pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
            for pair in pairs]
    cache.logps = dist.broadcast(cache.logps)  # ranks must agree on what is missing
    missing = [i for i, both in enumerate(keys) if not set(both) <= cache.logps.keys()]
    cached = sorted(set(range(len(pairs))) - set(missing))
    check_cached = cache_check(pairs, cache, args)
    again = random.Random(args.seed).sample(cached, min(SPOT_CHECKS, len(cached)))
    batches, last_save = rank_batches(pairs, missing + again, share_prefix, args), time.monotonic()
    try:
        # The longest first: if memory is too small, the run ends now.
        for indices in tqdm(batches[::-1], "reference", disable=dist.rank() > 0 or None,
                            leave=False):
            batch = collate([pairs[i] for i in indices or [0]], share_prefix)
            logps = policy_logps(policy, batch.to(policy.device)).view(2, -1).T  # (B, 2)
            for i, both in dist.all_gather(list(zip(indices, logps.tolist()))):
                selfcheck.check_finite(torch.tensor(both), pairs[i].where)
                if i in again:
                    known = [cache.logps[key] for key in keys[i]]
                    check_cached({pairs[i].where: [a - b for a, b in zip(both, known)]})
                else:
                    cache.logps |= zip(keys[i], both)
            if dist.rank() == 0 and time.monotonic() - last_save > 60:
                cache.save()
                last_save = time.monotonic()
    finally:
        if dist.rank() == 0 and missing and cache.logps:
            cache.save()
    ref_logps = torch.tensor([[cache.logps[key] for key in both] for both in keys]).T  # (2, P)
    score_gaps = torch.tensor([pair.gap for pair in pairs])  # (P,)
    tau = LOSSES[args.loss].target(score_gaps, args)  # (P,)
    return Dataset(pairs, share_prefix, torch.stack([*ref_logps, tau, score_gaps])), len(missing)


def choose_layout(policy, pairs, args):
    """Whether one row can hold whole pairs, tried on the longest pair that fits and the shortest.

    BadInput if sequence_logps differs from plain_sequence_logps, or a row is too long.
    """
    longest, limit = max(map(longest_row, pairs)), models.position_limit(policy)
    refuse(f"--max_length {args.max_length}", (
        longest > limit, f"the longest row has {longest} tokens, but the model takes {limit}; "
                         f"--max_length {limit}"))
    fitting = [pair for pair in pairs if batch_tokens(pair, False) <= args.tokens_per_batch]
    shortest = min(pairs, key=longest_row)
    tried = [max(fitting, key=longest_row) if fitting else shortest, shortest]

    def fast_logps(share_prefix):
        batch = collate(tried, share_prefix, rows=[[0, 1]])
        return policy_logps(policy, batch.to(policy.device))  # (4,)

    with eager(args):
        works, reason = dist.broadcast(selfcheck.can_share_prefix(
            tried, policy.name_or_path, lambda: plain_sequence_logps(policy, tried), fast_logps,
            getattr(torch, args.dtype)))
    if not works:
        print(f"layout: one answer per row; the model cannot read several in one ({reason})")
    return works


# ------------------------------------------------------------------------------------------- main


def main(argv=None):
    args = get_args(argv)
    device, dtype = dist.setup(args)
    with checkpoint.only_run_in(args):
        train_student(args, device, dtype)


def train_student(args, device, dtype):
    began = time.monotonic()
    torch.manual_seed(args.seed)
    model_name = args.model or models.TOY_STUDENT

    # Data: every row is checked and tokenized before anything is computed.
    tokenizer = models.load_tokenizer(model_name, args.template_kwargs)
    if args.reference:
        vocabulary = models.load_tokenizer(args.reference).get_vocab()
        refuse(f"--reference {args.reference}", (
            vocabulary != tokenizer.get_vocab(), "its vocabulary is not that of --model; give the "
                                                 "model that it was trained from"))
    train_pairs, val_pairs = load_train_val(args, tokenizer)

    # Policy. The cache hashes the reference's weights: create it before adapters and shards.
    policy, saved_dtype, weights_before = load_policy(args.reference or model_name, args, dtype)
    computed_as = [args.dtype] + ["sharded"] * args.fsdp + ["compiled"] * args.compile
    cache = ReferenceCache(os.path.expanduser(args.cache_dir), policy, " ".join(computed_as))
    place(policy, args, device, dtype)
    share_prefix = choose_layout(policy, train_pairs + val_pairs, args)
    peaks = StagePeaks(device)
    peaks.end("start")

    # Reference: the policy before its first step; with LoRA, the policy without its adapters.
    reference_began = time.monotonic()
    with without_lora(policy):
        train, computed = make_dataset(policy, train_pairs, share_prefix, cache, args)
        val, val_computed = make_dataset(policy, val_pairs, share_prefix, cache, args)
    reference = f"{computed + val_computed} in {time.monotonic() - reference_began:.1f} s"
    samples = SampleAnswers(args.model is None, val_pairs)
    answers_before = sample_answers(policy, tokenizer, samples.prompts, args)
    check_cached = cache_check(train_pairs + val_pairs, cache, args)
    if args.reference:  # its log-probabilities are cached: let it go and load the policy
        check_cached(evaluate(policy, val, args)[1])
        del policy
        policy, saved_dtype, weights_before = load_policy(model_name, args, dtype)
        place(policy, args, device, dtype)
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
    data_hash = checkpoint.content_hash(train, cache.name)
    state_dir = os.path.join(args.out_dir, "state")
    first_step = 0
    if args.resume:
        first_step = checkpoint.load_state(state_dir, masters, optimizer, scaler, args, data_hash)
    masters.round(first_step)
    metrics_file, audit_file = checkpoint.begin_out_dir(args, first_step)
    print_plan(args, policy, len(train_pairs), len(val_pairs), reference, first_step, total_steps)
    print_grid(weights_before, saved_dtype if dtype == torch.float32 else dtype, args)
    print("\n" + TABLE_HEAD)
    val_metrics, val_ratios = evaluate(policy, val, args)
    selfcheck.check_student(first_step, masters, val_metrics["eval/loss"], state_dir)
    if first_step == 0:
        if not args.reference:
            check_cached(val_ratios)
        metrics_file.log(step=0, epoch=0.0, **val_metrics)
        print(table_line(0, {}, val_metrics))

    # Loop: one optimizer step per batch_size pairs.
    probe = val.part(range(len(val.pairs))[:8])  # before each save
    stop_signal = checkpoint.StopSignal()
    flat_gradients = dist.flat_gradients(masters)
    progress = tqdm(total=total_steps, initial=first_step, desc="training", unit="step",
                    disable=dist.rank() > 0 or None, leave=False)
    for step in range(first_step, total_steps):
        step_began = time.monotonic()
        epoch, n = divmod(step, steps_per_epoch)
        order = epoch_order(len(train_pairs), args.seed, epoch)
        indices = order[n * args.batch_size:(n + 1) * args.batch_size]
        step_data = train.part(indices)
        sums, log_ratios = accumulate_gradients(policy, step_data, args, scaler)
        masters.collect_gradients()
        dist.sum_gradients(flat_gradients)
        log_ratios = dist.gather_rows(log_ratios)
        if step == 0 and not args.reference:  # gate: all log-ratios are 0
            check_cached(log_ratios)

        # Update. A step that is not finite is never taken.
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(masters.parameters(), args.max_grad_norm)
        metrics = mean_metrics(sums, len(indices))  # here the CPU waits for the GPU
        grad_norm = dist.full_tensor(grad_norm).item()
        selfcheck.check_step(step, metrics["loss"], grad_norm, scaler, log_ratios, state_dir)
        lr = learning_rate(step, total_steps, args)
        optimizer.param_groups[0]["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=flat_gradients is None)
        masters.round(step + 1)

        # Log, evaluate, save. Evaluate before the save: a resumed run would not do it again.
        done = step + 1
        metrics_file.log(
            step=done, epoch=done / steps_per_epoch, **metrics,
            grad_norm=grad_norm if math.isfinite(grad_norm) else None, lr=lr,
            step_seconds=time.monotonic() - step_began, tokens=count_tokens(step_data.pairs),
            peak_memory_mib=peak_memory_mib(device))
        log_pairs(audit_file, done, "training", step_data, log_ratios, args)
        progress.update()
        if done % eval_every == 0 or done == total_steps:
            val_metrics, val_ratios = evaluate(policy, val, args)
            metrics_file.log(step=done, epoch=done / steps_per_epoch, **val_metrics)
            log_pairs(audit_file, done, "validation", val, val_ratios, args)
            with progress.external_write_mode():
                print(table_line(done, metrics, val_metrics))
        stop = dist.maximum(stop_signal.number)  # a signal to one rank stops all
        if done % args.save_every == 0 or done == total_steps or stop:
            checked = val_metrics if done == total_steps else evaluate(policy, probe, args)[0]
            selfcheck.check_student(done, masters, checked["eval/loss"], state_dir)
            checkpoint.save_state(state_dir, done, masters, optimizer, scaler, args, data_hash)
        if stop:
            progress.close()
            print(f"stopped after step {done}, saved; the same command with --resume continues")
            dist.cleanup()
            raise SystemExit(128 + stop)
    progress.close()
    for behaviour, part in by_behaviour(val).items():
        print(table_line(one_line(behaviour), {}, evaluate(policy, part, args)[0]))

    # Export: a Hugging Face folder that transformers, vLLM and llama.cpp load, or an adapter.
    answers_after = sample_answers(policy, tokenizer, samples.prompts, args)
    peaks.end("training")
    changed = checkpoint.export(policy, masters, tokenizer, saved_dtype, weights_before, args)
    peaks.end("export")
    is_writer = dist.rank() == 0
    dist.cleanup()
    if not is_writer:
        return
    if have_matplotlib():
        draw_curves([args.out_dir], os.path.join(args.out_dir, "curves.png"))
    print(f"\n{samples.report(answers_before, answers_after)}")
    as_saved = ""
    if not args.save_adapter and not args.skip_saved_check:
        del policy, masters, optimizer, flat_gradients  # room for the saved student
        as_saved = check_saved(val, val_metrics, args)
        peaks.end("check")
    write_card(args, tokenizer, train_pairs, val_pairs, as_saved)
    print(peaks.line() + (compile_note() if args.compile else ""), end="")
    print(f"{changed} in {args.out_dir} after {time.monotonic() - began:.0f} s")


def load_policy(name, args, dtype):
    """(model in dtype, dtype to save it in, sample of its stored weights).

    It stays in eval mode: dropout would add noise to the log-ratios. What rounding to dtype
    changes is changed in policy and reference alike, so that they are equal at step 0.
    """
    policy = models.load_model(name, dtype="auto")
    saved_dtype = policy.dtype if args.save_dtype == "auto" else getattr(torch, args.save_dtype)
    weights_before = models.sample_weights(dict(policy.named_parameters()))
    if dtype != torch.float32 and policy.dtype != dtype:
        print(f"student: stored in {str(policy.dtype)[6:]}, rounded to {args.dtype} first")
    if dtype != torch.float32 or args.lora_rank or not args.fsdp:
        models.cast_weights(policy, dtype)  # else FSDP makes them float32, layer by layer
    return policy, saved_dtype, weights_before


def place(policy, args, device, dtype):
    """Add what the flags ask for, then send the model to its device or shard it over ranks."""
    if args.lora_rank:
        add_lora(policy, args.lora_rank, args.lora_alpha)
    if args.compile:
        models.compile_layers(policy)
    if args.gradient_checkpointing:
        models.checkpoint_layers(policy)
    if args.fsdp:
        layers = models.decoder_layers(policy, "--fsdp")
        dist.shard(policy, layers, device, dtype, sequence_logps)
    else:
        policy.to(device)
    if args.tokens_per_batch is None:
        args.tokens_per_batch = models.tokens_that_fit(policy, args.gradient_checkpointing)
        print(f"tokens per batch: {args.tokens_per_batch}, by the GPU's free memory")


def check_saved(val, trained, args):
    """Print and return the validation margin of the student read back beside the trained one's.

    The margin is before beta, in nats: the change of the log-odds between the two answers. Rank 0
    evaluates alone: the other ranks have left. Warns if it moved by a tenth, and by 0.05 nats.
    """
    student = models.load_model(args.out_dir, dtype="auto")
    # Wide enough to round nothing, and no wider: in 16 bits it fits where it was trained.
    models.cast_weights(student, torch.promote_types(student.dtype, getattr(torch, args.dtype)))
    student.to(args.device if models.fits(student, args.device) else "cpu")
    saved = evaluate(student, val, args)[0]["eval/rewards/margins"] / args.beta
    trained = trained["eval/rewards/margins"] / args.beta
    line = f"as saved: margin {saved:.2f} of {trained:.2f} (validation pairs, nats, before beta)"
    print(line)
    if not abs(saved - trained) <= max(0.1 * abs(trained), 0.05):  # or nan
        warn(f"the student in {args.out_dir} is not the one that was trained: its weights were "
             "rounded. Try --save_dtype float32; see docs/sixteen_bits.md")
    return line


def load_train_val(args, tokenizer):
    """(training pairs, validation pairs) by the flags. Prints what was left out."""
    options = args.max_length, LOSSES[args.loss].needs_scores, args.skip_bad_rows

    def load(paths):
        pairs = []
        for path in paths:
            more, counts = load_pairs(path, tokenizer, *options)
            counts.report()
            pairs += more
        return pairs

    pairs, val_pairs = load(args.data), load(args.eval_data or [])
    if LOSSES[args.loss].needs_scores:
        check_judges(pairs + val_pairs)
    if args.eval_data:
        trained = {tuple(pair.prompt_ids) for pair in pairs}
        seen = sum(tuple(pair.prompt_ids) in trained for pair in val_pairs)
        if seen:
            warn(f"{seen} of {len(val_pairs)} pairs of --eval_data have a prompt of --data")
    else:
        pairs, val_pairs = split_train_val(pairs, args.eval_share, args.seed)
    if args.loss == "dsc":  # trains only on revisions that scored higher
        accepted = [pair for pair in pairs if pair.gap > 0]
        print(f"dsc: {len(accepted)} of {len(pairs)} revisions scored above their originals")
        pairs = accepted
    refuse("--data", (not pairs or not val_pairs,
                       f"{len(pairs)} pairs to train on and {len(val_pairs)} for validation; "
                       "give more rows, or --eval_data"))
    note = template_note(tokenizer, pairs[0].prompt)
    if note:
        print(note)
    if args.loss == "rdpo" and all(pair.gap == 0 for pair in pairs):
        warn("all scores tie: tau is 1/2, so rdpo keeps the student where it is")
    return pairs, val_pairs


def sample_answers(policy, tokenizer, prompts, args):
    """The policy's greedy answers, as texts. Under FSDP all ranks compute them, else rank 0."""
    if dist.rank() > 0 and not args.fsdp:
        return []
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    with eager(args):
        return [answer.text for answer in generate(policy, tokenizer, ids, args.max_new_tokens)]


def learning_rate(step, total_steps, args):
    """Linear warmup, then a cosine to 0."""
    warmup = args.warmup * total_steps
    if step < warmup:
        return args.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total_steps - warmup)
    return args.learning_rate * (1 + math.cos(math.pi * progress)) / 2


# ------------------------------------------------------------------------------------------ flags


share = between(0, 1, float)
smoothing = number(float, lambda value: 0 <= value < 0.5, "from 0 to below 0.5")


def get_args(argv=None):
    parser = Parser("Distil a student on scored pairs with the rDPO loss.")
    add = parser.add_argument
    # data
    add("--data", type=path, required=True, nargs="+",
        help="scored rows, .jsonl or a JSON list; any files")
    add("--eval_data", type=path, nargs="+",
        help="validation rows (default: a share of the prompts)")
    add("--eval_share", type=share, default=0.1, help="that share, at most 256 families of prompts")
    add("--model", type=path,
        help="student: a folder or hub id (default: the bundled toy student)")
    add("--reference", type=path,
        help="another reference than --model before training: for a second round, the first one")
    add("--max_length", type=at_least(1), default=1024, help="tokens of prompt + one answer")
    add("--template_kwargs", type=template_kwargs,
        help="defaults of the chat template, such as '{\"enable_thinking\": false}'")
    add("--skip_bad_rows", action="store_true", help="leave out and count unusable rows")
    # loss
    add("--loss", choices=LOSSES, default="rdpo")
    add("--beta", type=above_0(), default=0.1, help="how tightly the reference holds the student")
    add("--temperature", type=above_0(), default=1.0,
        help="T of tau, in points of a scale of 5 (rdpo)")
    add("--label_smoothing", type=smoothing, default=0.0, help="tau = 1 - this (dpo)")
    add("--sft_weight", type=at_least(0, float), default=0.0,
        help="weight of an added imitation loss (rdpo, dpo)")
    # optimizer
    add("--learning_rate", type=at_least(0, float),
        help="default 5e-6, without --model 3e-4; ten times that with LoRA")
    add("--warmup", type=share, default=0.1, help="share of steps with a rising learning rate")
    add("--weight_decay", type=at_least(0, float), default=0.0)
    add("--max_grad_norm", type=above_0(), default=1.0)
    add("--epochs", type=at_least(1), default=1)
    add("--max_steps", type=at_least(1), help="number of steps, in place of --epochs")
    add("--batch_size", type=at_least(1), default=16, help="pairs per optimizer step")
    add("--seed", type=at_least(0), default=0)
    # LoRA
    add("--lora_rank", type=at_least(0), default=0, help="train adapters of this rank, 0: none")
    add("--lora_alpha", type=above_0(),
        help="adapters are scaled by alpha / rank (default: 2 * rank)")
    add("--save_adapter", action="store_true", help="save the adapter in PEFT's format, unmerged")
    # memory and speed: these change the result by rounding at most
    add("--tokens_per_batch", type=at_least(1),
        help="tokens per forward pass, unless a pair is longer (default: 1024 on a CPU, on CUDA "
             "what fits, up to 8192)")
    add("--gradient_checkpointing", action="store_true", help="less memory, more time")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--fsdp", action="store_true", help="under torchrun: shard weights over the ranks")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="compute dtype; AdamW updates float32 masters")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    add("--cache_dir", type=path, default="~/.cache/rdpo",
        help="reference log-probabilities of all runs")
    # output
    add("--out_dir", type=path, default="out")
    add("--save_dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the saved student (default: as it was loaded)")
    add("--skip_saved_check", action="store_true",
        help="do not evaluate the saved student again, which needs room for all of it")
    add("--resume", action="store_true", help="continue from the last state in out_dir")
    add("--overwrite", action="store_true", help="delete an earlier run in out_dir")
    add("--eval_every", type=at_least(1), help="steps between evaluations (default: 10 in all)")
    add("--save_every", type=at_least(1), default=100, help="steps between saved states")
    add("--max_new_tokens", type=at_least(1), default=64, help="length of the answers shown")
    args = parser.parse_args(argv)
    refuse(
        "",
        (args.label_smoothing and args.loss != "dpo", "--label_smoothing needs --loss dpo"),
        (not args.lora_rank and (args.lora_alpha is not None or args.save_adapter),
         "--lora_alpha and --save_adapter need --lora_rank, such as --lora_rank 16"),
        (args.temperature != 1 and args.loss in ("dpo", "sft", "dsc"),
         "--temperature needs --loss rdpo"),
        (args.sft_weight and LOSSES[args.loss].combine is imitation,
         "--sft_weight needs --loss rdpo or dpo: the others are imitation already"),
        (args.fsdp and args.compile, "--compile does not work with --fsdp; leave one out"),
        ({*map(os.path.realpath, args.data)} & {*map(os.path.realpath, args.eval_data or [])},
         "--eval_data is a file of --data too; give other rows, or leave it out"))
    if args.lora_rank and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if args.learning_rate is None:
        args.learning_rate = (5e-6 if args.model else 3e-4) * (10 if args.lora_rank else 1)
    return args


if __name__ == "__main__":
    run(main)
