"""Checks of the fast path against the slow one, and of the policy against its reference."""
import math

import torch

import infra.distributed as dist
from infra.checkpoint import newest_state
from infra.command import first_line, refuse, warn

# How far a token's log-probability may move when other rows share its batch: (bias, noise).
# Over N tokens bias grows with N, noise with sqrt(N). (SmolLM2-135M in bfloat16: noise 0.06 per
# token, at most 0.14.) A wrong mask or a stale cache is off by tens of nats.
ROUNDING = {torch.float32: (1e-5, 0.0), torch.bfloat16: (5e-3, 0.5), torch.float16: (1e-3, 0.06)}


def check_equal(what, logps, expected, tokens, dtype, remedy):
    """BadInput if summed log-probabilities (B,) differ by more than rounding.

    tokens has the answers' B lengths; dtype is the compute dtype.
    """
    bias, noise = ROUNDING[dtype]
    difference, tokens = (logps.cpu() - expected.cpu()).abs(), torch.tensor(tokens)  # (B,) each
    allowed = 1e-3 + bias * tokens + noise * tokens.sqrt()  # (B,)
    refuse("", (not (difference <= allowed).all(),
                f"{what} differ by up to {difference.max():.4g}; {remedy}"))


def check_finite(logps, where):
    refuse(where, (not logps.isfinite().all(), "the reference's log-probability is not finite; "
                                               "are the weights of --model sound?"))


@torch.no_grad()
def can_share_prefix(pairs, policy_name, plain_logps, fast_logps, dtype):
    """(whether the model can read whole pairs [prompt | chosen | rejected] in one row, else why).

    Decided by trying it on B pairs: architectures differ in how they take masks and positions.
    plain_logps() gives their (2B,) from the model's own logits, fast_logps(share_prefix) from one
    of the two layouts. BadInput if the layout with one answer per row is wrong too.
    """
    tokens = [len(pair.chosen_ids) for pair in pairs] + [len(pair.rejected_ids) for pair in pairs]
    plain, separate = plain_logps(), fast_logps(False)  # (2B,) each
    check_finite(plain, pairs[0].where)
    check_equal(f"--model {policy_name}: log-probabilities from hidden states and from the model's "
                "own logits", separate, plain, tokens, dtype,
                "an architecture that changes its logits after the output head is not supported")
    try:
        check_equal("log-probabilities of shared and separate rows", fast_logps(True), separate,
                    tokens, dtype, "the model ignores masks or positions")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, the layout that is taken instead was right above
        return False, first_line(error)
    return True, ""


def check_step_0(log_ratios, tokens, dtype, cache_path):
    """BadInput if a pair's two log pi - log ref are not 0 at step 0. The loss then is ln 2.

    log_ratios maps the pairs' names to them, tokens to the length of the longer conversation.
    """
    for where, ratios in log_ratios.items():
        check_equal(f"{where}: at step 0 the log-probabilities of policy and cached reference",
                    torch.tensor(ratios), torch.zeros(2), [tokens[where]] * 2, dtype,
                    f"delete {cache_path}")


@torch.no_grad()
def check_student(step, masters, loss, state_dir):
    """BadInput unless weights and validation loss are finite, before a state or student is saved.

    The loss is not finite either if weights are so large that the forward pass overflows.
    """
    finite = torch.stack([dist.local_shard(weight)[0].isfinite().all()
                          for weight in masters.parameters()])
    is_finite = math.isfinite(loss) and bool(finite.all())  # the CPU waits for the GPU once
    newest = newest_state(state_dir)
    resumed = newest and newest.endswith(f"{step:08d}")  # by a version that did not check
    refuse(f"step {step}", (
        dist.maximum(int(not is_finite)),
        f"the student has weights or a validation loss ({loss:.4g}) that are not finite, and is "
        f"not saved; {f'delete {newest}' if resumed else remedy(step, state_dir)}"))


def remedy(step, state_dir):
    """What to do if a number is not finite after so many steps."""
    if step == 0:
        return ("no step has been taken, so --learning_rate is not the cause; lower --beta, "
                "--sft_weight or the rows' scores, or raise --temperature")
    newest = newest_state(state_dir)
    return "lower --learning_rate" + (f"; the last good state is in {newest}" if newest else "")


def check_step(step, loss, grad_norm, scaler, log_ratios, state_dir):
    """BadInput if the loss or the gradient is not finite, before the step is taken.

    Under float16 gradients may overflow: then GradScaler skips the step and lowers its scale.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    can_lower = scaler.get_scale() > 1
    bad = [where for where, ratios in log_ratios.items() if not all(map(math.isfinite, ratios))]
    rows = ", ".join((bad or list(log_ratios))[:3])
    refuse("", (not math.isfinite(loss) or not can_lower,
                f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, rows {rows}; "
                f"{remedy(step, state_dir)}"))
    warn(f"step {step + 1} skipped: its gradients overflow float16 at a loss scale of "
         f"{scaler.get_scale():g}, which is lowered now")
