"""The algorithm: refined DPO, from two log-probabilities and two scores to a loss.

A teacher answered a prompt q twice: an original y_o (`rejected`) and its own revision y_r (`chosen`). An external reward
model scored both: s_o (`score_rejected`) and s_r (`score_chosen`). A student, the `policy` pi, learns from the pair, held
near the `reference` ref, which is the student before training:

    m   = beta * [(log pi(y_r|q) - log ref(y_r|q)) - (log pi(y_o|q) - log ref(y_o|q))]     margin
    p   = sigmoid(m)                                        the policy's  P(y_r beats y_o)
    tau = sigmoid((s_r - s_o) / T)                          the rewarder's P(y_r beats y_o), T is `temperature`
    L   = - mean [tau * log p + (1 - tau) * log(1 - p)]     `losses`, averaged over the pairs
    dL/dm = p - tau                                         learning stops where the policy agrees with the rewarder

tau = 1 for every pair is plain DPO (Rafailov et al. 2023, arXiv:2305.18290, equation 7). So a revision that scored below
its original (tau < 1/2) is pulled the other way, and a tie (tau = 1/2) is held where the reference has it.

This is our reading of equation (2) of Gallego 2024 (arXiv:2402.08005): the paper says that the loss generalises DPO and
that tau carries the scores in; the exact form of tau is inferred. It lives in one function, `preference_probability`.

Shapes: B pairs, R rows of T tokens (R = B where a row holds a prompt once, with both answers; 2B where it holds one answer),
N response tokens in all, D hidden, V vocabulary.

    python rdpo.py        prints the loss and its gradient for a few score gaps
"""
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

# ----------------------------------------------------------------------------------------------- target and loss


def preference_probability(score_chosen, score_rejected, temperature=1.0):
    """tau (B,): the probability that the chosen answer beats the rejected one, by the reward model's scores.

    Bradley-Terry on the external scores, each (B,): sigmoid((s_r - s_o) / T). The temperature is in units of the score:
    a large T trusts the scores less (tau near 1/2), T near 0 keeps only which one is higher. ValueError if T <= 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    return torch.sigmoid((score_chosen - score_rejected) / temperature)  # (B,)


def rdpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, tau, beta):
    """The refined DPO loss of each pair (Gallego 2024, equation 2; see the top of this file).

    The four log-probabilities are sums over a response's tokens, each (B,); tau (B,) in [0, 1]; beta > 0.
    Returns losses (B,) and, detached, DPO's implicit rewards beta * (log pi - log ref): chosen (B,), rejected (B,).
    """
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps)  # (B,)
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps)  # (B,)
    margins = chosen_rewards - rejected_rewards  # (B,)
    # logsigmoid is exact where log(sigmoid(m)) would be log(0); and log(1 - p) is logsigmoid(-m).
    losses = -tau * F.logsigmoid(margins) - (1 - tau) * F.logsigmoid(-margins)  # (B,)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


# --------------------------------------------------------------------------------------------- log-probabilities


def sequence_logps(model, batch):
    """log pi(y|q) of every answer of a data.Batch: the SUM over its tokens, the end-of-turn token included.

    Returns (2B,) float32, the B chosen answers first, whichever of its two layouts the batch has. Only the states that predict
    a response token meet the output head. Its gradient goes straight into its weight.grad: see TokenLogps.
    """
    where = {"position_ids": batch.position_ids, "attention_mask": attention_mask(model, batch)} if batch.shared else {}
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False, **where).last_hidden_state  # (R, T, D)
    states = hidden.flatten(0, 1).index_select(0, batch.states).to(compute_dtype(model))  # (N, D)
    head = model.get_output_embeddings()
    logps = TokenLogps.apply(states, head.weight, head.bias, batch.targets, *logit_scaling(model))  # (N,)
    return torch.stack([answer.sum() for answer in logps.split(batch.response_lengths)])  # (2B,)


def compute_dtype(model):
    """What the model's matrix products are taken in: autocast's type where it is on, else the weights'."""
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def attention_mask(model, batch):
    """What the tokens of a shared row may look at: (R, 1, T, T), added to the attention scores, 0 or hugely negative.

    A token looks at itself and at what stands before it in the prompt and in its own answer. For the rejected answer the
    chosen one beside it does not exist: it reads the very conversation that it would read in a row of its own.

                  prompt  chosen  rejected         \\  up to itself
        prompt      \\                              #  all of it
        chosen      #       \\
        rejected    #               \\

    Layers with a sliding window look back less far, counted in places of the conversation, not of the row; a config that names
    the types of its layers wants a mask for each type. (One answer per row needs no mask: a token never looks to its right, and
    there the padding stands.)
    """
    place = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)  # (T,)
    segment, seen = batch.segments[:, :, None], batch.segments[:, None, :]  # of the token that looks, of the one looked at
    visible = (place[:, None] >= place) & ((seen == 0) | (seen == segment))  # (R, T, T); 0 is the prompt; the diagonal is True

    def additive(visible):  # SDPA would take the booleans themselves, but eager attention would add them, as 0 and 1
        # In memory its rows begin at multiples of 8, or else each layer's attention, on a GPU, makes and keeps a copy of which they do.
        rows, width, _ = visible.shape
        mask = torch.zeros(rows, width, width + -width % 8, dtype=compute_dtype(model), device=visible.device)[..., :width]  # (R, T, T)
        return mask.masked_fill_(~visible, torch.finfo(mask.dtype).min)[:, None]

    config = vars(model.config.get_text_config())
    window = config.get("sliding_window")
    if window is None:
        return additive(visible)
    distance = batch.position_ids[:, :, None] - batch.position_ids[:, None, :]  # (R, T, T)
    near = additive(visible & (distance < window))
    return {"full_attention": additive(visible), "sliding_attention": near} if config.get("layer_types") else near


def logit_scaling(model):
    """(scale, cap): what the architecture does to its output head's products, logits = cap * tanh(scale * products / cap).

    By the names that configs have for it: `logit_scale` (Cohere), one over `logits_scaling` (Granite),
    `final_logit_softcapping` (Gemma 2). Mostly (1.0, None): nothing, and no cap. train.py compares with the model's own logits
    before it trains, so one that does something else is refused.
    """
    config = vars(model.config.get_text_config())
    scale = (config.get("logit_scale") or 1.0) / (config.get("logits_scaling") or 1.0)
    return scale, config.get("final_logit_softcapping")


class TokenLogps(torch.autograd.Function):
    """log pi (N,) float32 of each target token (N,), from the states (N, D) that predict them and the head (V, D).

    Memory. The logits would be a step's largest tensor: 2,000 tokens x 152,000 words x 4 bytes = 1.2 GB, and their gradient as
    much again. Here they never exist whole. A few tokens at a time go through the head; forward() keeps two numbers per token,
    its log-probability and the log of the softmax's denominator, and drops the logits. backward() makes them again, at the
    price of one more product with the head, and needs no more than

        d log pi(t) / d logits = onehot(t) - softmax(logits)

    So the peak holds the logits of one chunk, whatever the vocabulary and the number of tokens. The head's own gradient is as
    large as the head: it is added into weight.grad chunk by chunk, where autograd would make such a matrix anew and then add it.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, targets, scale, cap):
        logps, log_totals = torch.empty(2, len(states), device=states.device)  # (N,) each
        for some, logits in logits_in_chunks(states, weight, bias, scale, cap):
            log_totals[some] = logits.logsumexp(dim=1)
            logps[some] = logits.gather(1, targets[some, None])[:, 0] - log_totals[some]
        ctx.save_for_backward(states, weight, bias, targets, log_totals)
        ctx.scale, ctx.cap = scale, cap
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        states, weight, bias, targets, log_totals = ctx.saved_tensors
        head = weight.to(states.dtype)  # (V, D)
        grad_states, grad_bias = torch.empty_like(states), None if bias is None else torch.zeros_like(bias)
        if weight.requires_grad and weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        for some, logits in logits_in_chunks(states, head, bias, ctx.scale, ctx.cap):
            if ctx.cap:
                slope = 1 - (logits / ctx.cap) ** 2  # of cap * tanh(x / cap)
            grad = logits.sub_(log_totals[some, None]).exp_().mul_(-grad_logps[some, None])  # (n, V): -softmax, in the logits' place
            grad.scatter_add_(1, targets[some, None], grad_logps[some, None])  # + onehot
            if ctx.cap:
                grad *= slope
            if ctx.scale != 1:
                grad *= ctx.scale
            grad = grad.to(states.dtype)
            grad_states[some] = grad @ head
            if bias is not None:
                grad_bias += grad.sum(0)
            if weight.requires_grad and weight.dtype == states.dtype:
                weight.grad.addmm_(grad.T, states[some])
            elif weight.requires_grad:
                weight.grad += grad.T @ states[some]
        return grad_states, None, grad_bias, None, None, None


HEAD_BYTES = {"cpu": 2**25, "cuda": 2**28, "mps": 2**28}  # of one chunk's logits: on a CPU small chunks stay in its caches


def logits_in_chunks(states, weight, bias, scale, cap):
    """Yields (which tokens, their logits (n, V) float32), as many tokens at a time as HEAD_BYTES hold."""
    weight, bias = weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
    size = max(1, HEAD_BYTES[states.device.type] // (4 * len(weight)))
    for start in range(0, len(states), size):
        some = slice(start, start + size)
        logits = F.linear(states[some], weight, bias).float()  # (n, V)
        if scale != 1:
            logits = scale * logits
        yield some, cap * torch.tanh(logits / cap) if cap else logits


def plain_sequence_logps(model, pairs):
    """The same (2B,) the slow, obvious way, what sequence_logps is checked against: one answer at a time, behind its prompt,
    from the model's own logits of every token, with no batch, no padding and no mask."""
    sums = []
    for prompt_ids, response_ids in [(p.prompt_ids, p.chosen_ids) for p in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]:
        ids = torch.tensor([prompt_ids + response_ids], device=model.device)  # (1, T)
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)  # (T-1, V)
        sums.append(logps.gather(1, ids[0, 1:, None])[len(prompt_ids) - 1:].sum())
    return torch.stack(sums)


# ------------------------------------------------------------------------------------------------ reference cache


class ReferenceCache:
    """The reference's summed log-probability of each answer, computed once, kept in a safetensors file and shared by runs.

    Before the first step the policy IS the reference, so it fills the cache and no second model is ever loaded.
    A file belongs to what was really computed: the weights' content, the config, the compute dtype and the attention
    implementation name it. Inside it, an entry is found by its token ids and the place where the response starts.
    """

    def __init__(self, folder, model, dtype):
        """folder is made if need be; dtype is the compute (autocast) dtype as a string, such as "bfloat16"."""
        os.makedirs(folder, exist_ok=True)
        self.name = reference_fingerprint(model, dtype)
        self.path = os.path.join(folder, f"reference-{self.name}.safetensors")
        self.logps = self._read()

    def _read(self):
        if not os.path.exists(self.path):
            return {}
        with safe_open(self.path, "pt") as file:
            keys, logps = file.get_tensor("keys"), file.get_tensor("logps")  # (entries, 32) uint8, (entries,) float32
        return {key.tobytes(): logp for key, logp in zip(keys.numpy(), logps.tolist())}

    def save(self):
        """Writes the file whole or not at all, with what another run may have added to it since."""
        self.logps = self._read() | self.logps
        keys = torch.frombuffer(bytearray(b"".join(self.logps)), dtype=torch.uint8).view(-1, 32)
        temporary = f"{self.path}.{os.getpid()}.tmp"
        save_file({"keys": keys, "logps": torch.tensor(list(self.logps.values()))}, temporary)
        os.replace(temporary, self.path)


def sequence_key(prompt_ids, response_ids):
    """32 bytes that name one answer to one prompt: its token ids and where the response starts."""
    return hashlib.sha256(json.dumps([prompt_ids, response_ids]).encode()).digest()


def reference_fingerprint(model, dtype):
    """Hex name of a reference: changes with any weight or buffer, the config, the compute dtype or the attention implementation."""
    def digest(item):
        name, tensor = item
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + hashlib.sha256(content).digest()).digest()

    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter lock free: all cores work
        weights = b"".join(pool.map(digest, sorted([*model.named_parameters(), *model.named_buffers()])))
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "transformers_version")}
    parts = [hashlib.sha256(weights).hexdigest(), config, dtype, model.config._attn_implementation]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


# ----------------------------------------------------------------------------------------- the algorithm in a table


def main():
    temperature, beta = 1.0, 0.1
    print("One pair, scores on a 0 to 5 scale, T = 1. The margin starts at 0, where p = 1/2 and every loss is ln 2.")
    print("A gradient below 0 pushes the student towards the revision, above 0 towards the original.\n")
    print("           score of                 rDPO (target tau)     plain DPO (target 1)")
    print("revision  original   margin    tau    loss  dloss/dm        loss  dloss/dm")
    for margin in (0.0, 2.0):
        for score_chosen, score_rejected in ((5, 1), (4, 3), (3, 3), (3, 4), (1, 5)):
            tau = preference_probability(torch.tensor([float(score_chosen)]), torch.tensor([float(score_rejected)]), temperature)
            cells = []
            for target in (tau, torch.ones(1)):
                m = torch.tensor([margin], requires_grad=True)
                # With every other log-probability at 0 the margin is beta * policy_chosen_logps.
                losses, _, _ = rdpo_loss(m / beta, torch.zeros(1), torch.zeros(1), torch.zeros(1), target, beta)
                losses.sum().backward()
                cells.append(f"{losses.item():6.3f}    {m.grad.item():+6.3f}")
            print(f"{score_chosen:8d}  {score_rejected:8d} {margin:8.1f} {tau.item():6.3f}  {cells[0]}      {cells[1]}")
        print()


if __name__ == "__main__":
    main()
