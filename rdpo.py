"""The algorithm: refined DPO, from two log-probabilities and two scores to a loss.

A teacher answered a prompt q twice: an original y_o (`rejected`) and its own revision y_r
(`chosen`). A judge, another model, scored both: s_o (`score_rejected`), s_r (`score_chosen`).
A student, the `policy` pi, learns from the pair. It stays near the `reference` ref, which is the
student before training:

    m   = beta * [log pi(y_r|q) - log ref(y_r|q) - log pi(y_o|q) + log ref(y_o|q)]   margin
    p   = sigmoid(m)                                     the policy's P(y_r beats y_o)
    tau = sigmoid((s_r - s_o) / T)                       the judge's P(y_r beats y_o)
    loss = - mean [tau * log p + (1 - tau) * log(1 - p)]
    dloss/dm = p - tau, per pair                         zero where policy and judge agree

With tau = 1 for every pair this is plain DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7).
A tie (tau = 1/2) pulls the margin back to 0, its value under the reference. If the revision scored
below its original (tau < 1/2), the preference is reversed.

This is our reading of equation (2) of Gallego 2024 (arXiv:2402.08005). The paper says that the
loss generalises DPO and that tau brings the scores in; the exact form of tau is inferred. It is
one function, `preference_probability`, so another reading is a change of one line.

Shapes: P pairs of a dataset; B pairs of a micro-batch, which is what one forward pass takes; R rows
of L tokens (R <= B if a row holds whole pairs, R = 2B if it holds one prompt and answer); N tokens
of all answers; D hidden size; V vocabulary size. Of a data.Batch this file reads input_ids,
segments and position_ids (R, L each), hidden_index and targets (N each), answer_lengths (2B) and
share_prefix, whether a row holds whole pairs. It needs torch alone and can be copied out.

    python rdpo.py        print the loss and its gradient for a few score gaps
"""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------- the target tau


def score_gap(score_chosen, score_rejected, scale=None):
    """s_r - s_o in points on a scale of 0 to 5, so that one temperature T fits several judges.

    scale is the judge's highest minus lowest score; None: unknown, the gap counts as it is.
    """
    return (score_chosen - score_rejected) * 5 / (scale or 5)


def preference_probability(score_gaps, temperature=1.0):
    """tau (P,): the probability that the chosen answer beats the rejected one, by their scores.

    Bradley-Terry on score gaps (P,): sigmoid((s_r - s_o) / T). A large T trusts the scores less
    (tau near 1/2); T near 0 keeps only their order. ValueError if T <= 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    return torch.sigmoid(score_gaps / temperature)  # (P,)


def judged_tau(score_gaps, row_taus, temperature=1.0):
    """tau (P,) by the judge: a row's own tau where it has one, else from its score gap.

    row_taus and score_gaps (P,) are nan where unknown. At T = 1 a row's own tau stays as it is;
    another T divides its log-odds, as it divides a score gap.
    """
    from_rows = torch.sigmoid(torch.logit(row_taus) / temperature)  # (P,)
    from_scores = preference_probability(score_gaps, temperature)  # (P,)
    return torch.where(row_taus.isnan(), from_scores, from_rows)  # (P,)


# ---------------------------------------------------------------------------------------- the loss


def cross_entropy(margins, tau):
    """rDPO's loss (B,) of margins m (B,) and targets tau (B,). DPO's where tau is 1."""
    # logsigmoid stays finite where log(sigmoid(m)) is log(0); log(1 - p) is logsigmoid(-m).
    return -tau * F.logsigmoid(margins) - (1 - tau) * F.logsigmoid(-margins)  # (B,)


class Loss(NamedTuple):
    """A choice of --loss: preference * form(m, tau) + imitation * (-log pi(y_r|q) per token)."""
    needs_scores: bool
    target: Callable  # the judge's tau (P,) -> the tau (P,) to train on
    preference: float  # weight of form(m, tau)
    imitation: float  # weight of the imitation loss
    form: Callable = cross_entropy  # (margins (B,), tau (B,)) -> losses (B,); a hinge, say


LOSSES = {
    "rdpo": Loss(needs_scores=True, target=lambda judged: judged, preference=1, imitation=0),
    # DPO is sure of the chosen answer. With --label_smoothing this is conservative DPO.
    "dpo": Loss(needs_scores=False, target=torch.ones_like, preference=1, imitation=0),
    "sft": Loss(needs_scores=False, target=torch.ones_like, preference=0, imitation=1),
    # Distilled self-critique (arXiv:2312.01957). train.py drops pairs with s_r <= s_o.
    "dsc": Loss(needs_scores=True, target=torch.ones_like, preference=0, imitation=1),
}


def rdpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
              tau, beta, form=cross_entropy):
    """The refined DPO loss of each pair (Gallego 2024, equation 2; see the top of this file).

    The four log-probabilities are sums over an answer's tokens, each (B,); tau (B,) is in
    [0, 1]; beta > 0. Returns losses (B,) and DPO's implicit rewards beta * (log pi - log ref),
    detached: chosen (B,), rejected (B,).
    """
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)  # (B,)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)  # (B,)
    losses = form(chosen_rewards - rejected_rewards, tau)  # (B,)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


# ------------------------------------------------------------------------------- log-probabilities


def plain_sequence_logps(model, pairs):
    """log pi(y|q) (2B,), the B chosen answers first: slow and obvious, one answer at a time.

    sequence_logps must give the same: selfcheck.can_share_prefix compares the two before training.
    """
    answers = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    answers += [(pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    sums = []
    for prompt_ids, answer_ids in answers:
        ids = torch.tensor([prompt_ids + answer_ids], device=model.device)  # (1, L)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # (L-1, V)
        # log_softmax would be off by 1e-4 a token on a CPU, over Gemma's 262,144 logits.
        logps = logits.gather(1, ids[0, 1:, None])[:, 0] - logits.logsumexp(1)  # (L-1,)
        sums.append(logps[len(prompt_ids) - 1:].sum())
    return torch.stack(sums)  # (2B,)


def sequence_logps(model, batch):
    """log pi(y|q) of every answer of a data.Batch: the SUM over its tokens, end-of-turn included.

    Returns (2B,) float32, the B chosen answers first. The output head computes logits only for
    positions that predict an answer's token. Its parts follow: attention_mask, logit_scaling,
    TokenLogps.
    """
    inputs = {"input_ids": batch.input_ids}
    # With one answer per row padding comes last, where causal attention never reads it: the model's
    # own mask and positions are right. Else:
    if batch.share_prefix:
        inputs |= {"position_ids": batch.position_ids,
                   "attention_mask": attention_mask(model, batch)}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # (R, L, D)
    hidden = hidden.flatten(0, 1).index_select(0, batch.hidden_index)  # (N, D)
    head = model.get_output_embeddings()
    # In 16 bits the last states of some models (Mamba) are float32 all the same.
    logps = TokenLogps.apply(hidden.to(head.weight.dtype), head.weight, head.bias, batch.targets,
                             *logit_scaling(model))  # (N,)
    return torch.stack([answer.sum() for answer in logps.split(batch.answer_lengths)])  # (2B,)


def attention_mask(model, batch):
    """The additive attention mask (R, 1, L, L) of rows [prompt | chosen | rejected | prompt ...].

    A token sees itself and what precedes it in the prompt and in its own answer. The rejected
    answer does not see the chosen one beside it: it reads the conversation of a row of its own.
    Nor does a pair see the pair before it in the row.

        reads ->    prompt  chosen  rejected  prompt 2
        prompt      part
        chosen      all     part
        rejected    all             part
        prompt 2                              part

    part: the tokens up to itself; all: every token; blank: nothing

    A model with a sliding window sees the last `window` positions of the conversation, which are
    not the last columns of the row. A config that names its layer types takes one mask per type.
    """
    column = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)  # (L,)
    query, key = batch.segments[:, :, None], batch.segments[:, None, :]  # (R, L, 1), (R, 1, L)
    # Segments as in data.Batch. Padding, -1, counts as a pair of its own: -1 // 3 is -1.
    same_pair, is_prompt = key // 3 == query // 3, key % 3 == 0
    visible = (column[:, None] >= column) & same_pair & (is_prompt | (key == query))  # (R, L, L)

    dtype = model.get_input_embeddings().weight.dtype  # the layers compute in it

    def additive(seen):  # (R, L, L) bool -> float: some attention kernels add the mask to scores
        # CUDA's fused attention copies a mask in every layer unless its strides are multiples of
        # 8. So its rows are longer in memory, by 1 to 8 columns and never by 0: torch.compile would
        # build a second graph for a mask without a gap.
        rows, width, _ = seen.shape
        mask = torch.zeros(rows, width, width + 8 - width % 8, dtype=dtype,
                           device=seen.device)[..., :width]  # (R, L, L)
        return mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[:, None]  # (R, 1, L, L)

    config = vars(model.config.get_text_config())
    window = config.get("sliding_window")
    if window is None:
        return additive(visible)
    position = batch.position_ids  # (R, L)
    near = additive(visible & (position[:, :, None] - window < position[:, None, :]))
    if not config.get("layer_types"):
        return near
    return {"full_attention": additive(visible), "sliding_attention": near}


def logit_scaling(model):
    """(scale, cap) of a model: logits = cap * tanh(scale * x / cap), x = hidden @ head.T + bias.

    From the configs' own names: `logit_scale` (Cohere), 1 / `logits_scaling` (Granite),
    `final_logit_softcapping` (Gemma 2). Usually (1.0, None): plain logits. A model that does
    anything else fails train.py's comparison with plain_sequence_logps.
    """
    config = vars(model.config.get_text_config())
    scale = (config.get("logit_scale") or 1.0) / (config.get("logits_scaling") or 1.0)
    return scale, config.get("final_logit_softcapping")


class TokenLogps(torch.autograd.Function):
    """log pi (N,) float32 of target tokens (N,), from hidden states (N, D) and the head (V, D).

    Full logits would be the largest tensor of a step: 2,000 tokens x a vocabulary of 152,000 x 4
    bytes = 1.2 GB, and their gradient as much again. Here they exist in chunks, two at a time.
    forward() keeps the hidden states and, per token, one number: the logsumexp of its logits.
    backward() computes each chunk's logits again and uses

        d log pi(t) / d logits = onehot(t) - softmax(logits)

    The head's own gradient (V, D) grows chunk by chunk, in the head's dtype.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, cap):
        logps, log_totals = torch.empty(2, len(hidden), device=hidden.device)  # (N,) each
        for chunk, logits in logits_in_chunks(hidden, weight, bias, scale, cap):
            log_totals[chunk] = logits.logsumexp(dim=1)
            logps[chunk] = logits.gather(1, targets[chunk, None])[:, 0] - log_totals[chunk]
        ctx.save_for_backward(hidden, weight, bias, targets, log_totals)
        ctx.scale, ctx.cap = scale, cap
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, bias, targets, log_totals = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)  # (N, D)
        grad_weight = torch.zeros_like(weight) if weight.requires_grad else None  # (V, D)
        grad_bias = None if bias is None else torch.zeros_like(bias)  # (V,)
        for chunk, logits in logits_in_chunks(hidden, weight, bias, ctx.scale, ctx.cap):
            # d cap * tanh(x / cap) / dx; computed before the logits are written over
            slope = 1 - (logits / ctx.cap) ** 2 if ctx.cap else None  # (n, V)
            # -softmax + onehot, written over the logits
            grad = logits.sub_(log_totals[chunk, None]).exp_().mul_(-grad_logps[chunk, None])
            grad.scatter_add_(1, targets[chunk, None], grad_logps[chunk, None])  # (n, V)
            if ctx.cap:
                grad *= slope
            if ctx.scale != 1:
                grad *= ctx.scale
            grad = grad.to(hidden.dtype)
            grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[chunk])
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


# Bytes of one chunk's logits. On a CPU small chunks stay in its caches.
HEAD_BYTES = {"cpu": 2**25, "cuda": 2**28, "mps": 2**28}


def logits_in_chunks(hidden, weight, bias, scale, cap):
    """Yield (slice of the N tokens, their logits (n, V) float32), HEAD_BYTES at a time.

    The head's product is computed in the head's dtype, all that follows in float32.
    """
    size = max(1, HEAD_BYTES[hidden.device.type] // (4 * len(weight)))
    for start in range(0, len(hidden), size):
        chunk = slice(start, start + size)
        logits = F.linear(hidden[chunk], weight, bias).float()  # (n, V)
        if scale != 1:
            logits = scale * logits
        yield chunk, cap * torch.tanh(logits / cap) if cap else logits


# ------------------------------------------------------------------------------ the loss as a table


def main():
    print("One pair, scores from 0 to 5, T = 1. At margin 0, p = 1/2 and every loss is ln 2.\n"
          "A gradient below 0 pushes towards the revision, above 0 towards the original.\n")
    print("           score of                 rDPO (target tau)     plain DPO (target 1)")
    print("revision  original   margin    tau    loss  dloss/dm        loss  dloss/dm")
    for margin in (0.0, 2.0):
        for score_chosen, score_rejected in ((5, 1), (4, 3), (3, 3), (3, 4), (1, 5)):
            gap = torch.tensor([float(score_gap(score_chosen, score_rejected))])  # (1,)
            tau, cells = preference_probability(gap), []  # (1,)
            for target in (tau, torch.ones(1)):
                m = torch.tensor([margin], requires_grad=True)
                loss = cross_entropy(m, target)
                loss.backward()
                cells.append(f"{loss.item():6.3f}    {m.grad.item():+6.3f}")
            print(f"{score_chosen:8d}  {score_rejected:8d} {margin:8.1f} {tau.item():6.3f}  "
                  f"{cells[0]}      {cells[1]}")
        print()


if __name__ == "__main__":
    main()
