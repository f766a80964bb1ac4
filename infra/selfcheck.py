"""Checks of the fast path against the slow one, and of the policy against its reference."""
import itertools
import math
from types import SimpleNamespace

import torch

import infra.distributed as ranks
from infra.checkpoint import newest_state
from infra.command import BadInput, first_line, warn
from infra.models import check_ids, position_limit
from infra.packing import batch_tokens, longest_row

# How far a token's log-probability may move when other rows share its batch: (bias, noise).
# Over N tokens bias grows with N, noise with sqrt(N). (SmolLM2-135M in bfloat16: noise 0.06 per
# token, at most 0.19.) A wrong mask or a stale cache is off by tens of nats.
ROUNDING = {torch.float32: (1e-5, 0.0), torch.bfloat16: (5e-3, 0.5), torch.float16: (1e-3, 0.06)}


def check_equal(what, logps, expected, tokens, dtype, remedy):
    """BadInput if summed log-probabilities (B,) differ by more than rounding.

    tokens has the answers' B lengths; dtype is the compute dtype.
    """
    bias, noise = ROUNDING[dtype]
    difference, tokens = (logps.cpu() - expected.cpu()).abs(), torch.tensor(tokens)  # (B,) each
    allowed = 1e-3 + bias * tokens + noise * tokens.sqrt()  # (B,)
    if not (difference <= allowed).all():
        raise BadInput(f"{what} differ by up to {difference.max():.4g}; {remedy}")


def check_lengths(policy, longest, args):
    """BadInput if a row of so many tokens is too long for the model, or for its rope.

    Longrope takes other frequencies for a whole batch if one of its conversations exceeds a limit:
    a pair's log-probability would depend on its neighbours. (Dynamic rope does so beyond the
    length that the model takes.)
    """
    limits = {"the model takes": position_limit(policy)}
    parameters = vars(policy.config.get_text_config()).get("rope_parameters") or {}
    for rope in (parameters, *parameters.values()):  # or one per type of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            limits["its rope (longrope) depends on the batch beyond"] = rope[
                "original_max_position_embeddings"]
    for why, limit in limits.items():
        if longest > limit:
            raise BadInput(f"--max_length {args.max_length}: the longest row has {longest} tokens, "
                           f"but {why} {limit}; --max_length {limit}")


# What a config says about attention that counts columns of a row, not positions: GPT-Neo, Llama 4.
BY_COLUMN = ("attention_chunk_size", "attn_temperature_tuning", "attention_types", "window_size")


def reads_columns(policy):
    """What in a model goes by columns, not by the mask; 16 bits may hide it from a trial. Or ""."""
    config = policy.config.get_text_config()
    known, kinds = config.to_dict(), {*(getattr(config, "layer_types", None) or ())}
    found = [f"its config has {name}" for name in BY_COLUMN if known.get(name)]
    found += ["its config has alibi"] * ("'alibi': True" in str(known))  # MPT's is one level down
    found += [f"{kind} layers" for kind in sorted(kinds - {"full_attention", "sliding_attention"})]
    found += ["its layers have states"] * (not kinds and policy._is_stateful)  # RWKV
    return (found or [""])[0]


@torch.no_grad()
def can_share_prefix(policy, pairs, args, fast_logps, plain_logps):
    """Whether the model can read whole pairs [prompt | chosen | rejected ...] in one sequence.

    Decided by trying it, because architectures differ in how they take masks and positions: on the
    longest pair that fits beside the shortest, on the longest of all, and on as many as a batch
    holds in one sequence; not if reads_columns knows of a reason. plain_logps(policy, pairs) gives
    (2B,) from the model's own logits, fast_logps(pairs, share_prefix) from one of the two layouts.
    BadInput if the layout with one answer per row is wrong too, or a row is too long for the model.
    """
    for pair in pairs:
        check_ids(policy, sum(pair.answers, pair.prompt_ids), pair.where)
    by_length = sorted(pairs, key=longest_row)
    check_lengths(policy, longest_row(by_length[-1]), args)
    fitting = [pair for pair in by_length if batch_tokens(pair, False) <= args.tokens_per_batch]
    tried = [(fitting or by_length[:1])[-1], by_length[0]]
    full = [pair for pair, tokens in zip(pairs, itertools.accumulate(
        batch_tokens(pair, True) for pair in pairs)) if tokens <= args.tokens_per_batch] or tried
    dtype = getattr(torch, args.dtype)

    def tokens(group):
        return [len(pair.answers[i]) for i in range(2) for pair in group]

    plain, separate = plain_logps(policy, tried), fast_logps(tried, False)  # (4,) each
    if not plain.isfinite().all():
        raise BadInput(f"{tried[0].where}: the reference's log-probability is not finite; are the "
                       "weights of --model sound?")
    check_equal(f"--model {policy.name_or_path}: log-probabilities from hidden states and from the "
                "model's own logits", separate, plain, tokens(tried), dtype,
                "an architecture that changes its logits after the output head is not supported")
    # The longest pair's plain logits might not fit: without padding its rows count as right.
    longest, short = by_length[-1], min(by_length[-1].answers, key=len)
    alone = SimpleNamespace(prompt_ids=longest.prompt_ids, answers=[short])
    padded = fast_logps([longest], False)  # (2,)
    check_equal(f"--model {policy.name_or_path}: log-probabilities with and without padding",
                padded[[longest.answers.index(short)]], fast_logps([alone], False), [len(short)],
                dtype, "lower --max_length")
    reason = reads_columns(policy)
    try:
        for group, expected in () if reason else (
                (tried, separate), ([longest], padded), (full, fast_logps(full, False))):
            check_equal("log-probabilities of shared and separate rows", fast_logps(group, True),
                        expected, tokens(group), dtype, "the model ignores masks or positions")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, the layout that is taken instead was right above
        reason = first_line(error)
    reason = ranks.broadcast(reason)
    if reason:
        print(f"layout: one answer per row; the model cannot read several in one ({reason})")
    return not reason


def check_step_0(pairs, values, args, cache_path):
    """BadInput unless the implicit rewards of these pairs are 0: the loss then is ln 2.

    They are beta * (log pi - log ref), and at step 0 the policy is the reference. values are
    train.pair_metrics.
    """
    rewards = torch.stack([values["rewards/chosen"], values["rewards/rejected"]], 1)  # (B, 2)
    for pair, log_ratios in zip(pairs, rewards.cpu() / args.beta):
        check_equal(f"{pair.where}: at step 0 the log-probabilities of policy and cached reference",
                    log_ratios, torch.zeros(2), [*map(len, pair.answers)],
                    getattr(torch, args.dtype), f"delete {cache_path}")


@torch.no_grad()
def check_student(step, masters, loss, state_dir):
    """BadInput unless weights and validation loss are finite, before a state or student is saved.

    The loss is not finite either if weights are so large that the forward pass overflows.
    """
    finite = torch.stack([ranks.local_shard(weight)[0].isfinite().all()
                          for weight in masters.parameters()])
    is_finite = math.isfinite(loss) and bool(finite.all())  # the CPU waits for the GPU once
    if not ranks.maximum(int(not is_finite)):
        return
    raise BadInput(f"step {step}: the student has weights or a validation loss ({loss:.4g}) that "
                   f"are not finite, and is not saved; {remedy(step, state_dir)}")


def remedy(step, state_dir):
    """What to do if a number is not finite after so many steps."""
    if step == 0:
        return ("no step has been taken, so --learning_rate is not the cause; lower --beta, "
                "--sft_weight or the rows' scores, or raise --tau_temperature")
    newest = newest_state(state_dir)
    if newest is None:
        return "lower --learning_rate"
    if newest.endswith(f"{step:08d}"):  # saved with finite weights; only the loss shows them
        return f"lower --learning_rate and delete {newest}, which has these weights"
    return f"lower --learning_rate; the last good state is in {newest}"


def check_step(step, loss, grad_norm, scaler, pairs, values, state_dir):
    """BadInput if the loss or the gradient is not finite, before the step is taken.

    pairs and values are this rank's, as in check_step_0. Under float16 gradients may overflow:
    then GradScaler skips the step and lowers its scale.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    if math.isfinite(loss) and scaler.get_scale() > 1:
        return warn(f"step {step + 1} skipped: its gradients overflow float16 at a loss scale of "
                    f"{scaler.get_scale():g}, which is lowered now")
    finite = values["rewards/margins"].isfinite().tolist()
    judged = ranks.all_gather([(pair.where, good) for pair, good in zip(pairs, finite)])
    rows = [where for where, good in judged if not good] or [where for where, _ in judged]
    raise BadInput(f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, rows "
                   f"{', '.join(rows[:3])}; {remedy(step, state_dir)}")


def compare_saved(saved, trained, args):
    """Print and return a line: the validation margins of the saved and of the trained student.

    They are before beta, in nats: the change of the log-odds between the two answers. Warns if
    saving moved the margin by a tenth, and by 0.05 nats.
    """
    saved, trained = (metrics["eval/rewards/margins"] / args.beta for metrics in (saved, trained))
    line = f"as saved: margin {saved:.2f} of {trained:.2f} (validation pairs, nats, before beta)"
    print(line)
    if not abs(saved - trained) <= max(0.1 * abs(trained), 0.05):  # or nan
        warn(f"the student in {args.out_dir} is not the one that was trained: its weights were "
             "rounded. Try --save_dtype float32; see docs/sixteen_bits.md")
    return line
