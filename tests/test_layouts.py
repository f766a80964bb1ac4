"""The fast paths of rdpo.sequence_logps: each prompt once, and logits a chunk at a time. Each against the model's own logits."""
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, WINDOWED, random_pairs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import rdpo
from data import CHOSEN, PROMPT, REJECTED, Pair, collate, load_pairs
from generate import load_model
from rdpo import TokenLogps, plain_sequence_logps, sequence_logps


def gradients(model, logps):
    """Of a sum in which every answer has a weight of its own."""
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def differ(batch, logps, right):
    """By how much two sums of log-probabilities differ at most, a token."""
    return ((logps - right).abs() / torch.tensor(batch.response_lengths)).max().item()


# ------------------------------------------------------------------------------------------------- each prompt once


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_layouts_equal_a_separate_plain_forward(name, shared):
    model, pairs = tiny_model(name), random_pairs(6)
    batch = collate(pairs, shared)
    right, fast = plain_sequence_logps(model, pairs), sequence_logps(model, batch)
    assert differ(batch, fast, right) < 1e-5
    right, fast = gradients(model, right), gradients(model, fast)
    assert (fast - right).abs().max() < 1e-5 * right.abs().max()
    # Control: the gradient of other pairs is another.
    assert (gradients(model, sequence_logps(model, collate(pairs[:3] * 2, shared))) - right).abs().max() > 1e-2 * right.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_controls_a_wrong_mask_and_wrong_positions_are_seen(name):
    model, pairs = tiny_model(name), random_pairs(6)
    right = plain_sequence_logps(model, pairs).detach()
    batch = collate(pairs, shared=True)
    batch.segments[batch.segments == REJECTED] = CHOSEN  # the rejected answer reads the chosen one
    assert differ(batch, sequence_logps(model, batch), right) > 1e-3
    batch = collate(pairs, shared=True)
    batch.position_ids = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)  # no restart
    assert differ(batch, sequence_logps(model, batch), right) > 1e-3
    batch = collate(pairs, shared=True)
    batch.segments[batch.segments == PROMPT] = CHOSEN  # the rejected answer does not see its prompt
    assert differ(batch, sequence_logps(model, batch), right) > 1e-3
    if name in WINDOWED:
        for window in (None, model.config.sliding_window + 1, model.config.sliding_window - 1):
            batch, model = collate(pairs, shared=True), tiny_model(name)
            model.config.sliding_window = window
            assert differ(batch, sequence_logps(model, batch), right) > 1e-3


def test_a_window_counts_places_of_the_conversation(monkeypatch):
    """Control: counted in the row, the rejected answer would stand too far from its prompt."""
    model, pairs = tiny_model("mistral_window"), random_pairs(6)
    batch = collate(pairs, shared=True)
    mask = rdpo.attention_mask(model, batch)
    row_distance = torch.arange(mask.shape[2])[:, None] - torch.arange(mask.shape[2])
    monkeypatch.setattr(rdpo, "attention_mask", lambda *_: mask.masked_fill(row_distance >= model.config.sliding_window, torch.finfo().min))
    assert differ(batch, sequence_logps(model, batch), plain_sequence_logps(model, pairs)) > 1e-3


@pytest.mark.parametrize("width", [16, 17, 23])
def test_what_a_gpu_asks_of_attention(width, tmp_path):
    """Its fused attention takes a mask as it is where all strides but the last are multiples of 8. cuDNN's attention is never used."""
    model = tiny_model("mistral_window")
    pairs = [Pair("", "", [1] * (width - 5), [2] * 3, [3] * 2, None, None)] * 2
    mask = rdpo.attention_mask(model, collate(pairs, shared=True))
    assert mask.shape == (2, 1, width, width) and mask.stride()[-1] == 1
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    model.save_pretrained(tmp_path)
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(str(tmp_path))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


CHATS = {
    "one turn": [{"role": "user", "content": "Tell me about tea."}],
    "system": [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Tell me about tea."}],
    "turns": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day to you."}, {"role": "user", "content": "Tell me about tea."}],
    "long": [{"role": "user", "content": "Tell me about tea. " * 60}],
}


def test_chats_system_messages_and_long_prompts(toy_tokenizer, write_rows):
    from data import TOY_STUDENT
    rows = [{"prompt": prompt, "chosen": "Tea is a drink that many people like, though not everyone.", "rejected": "No!"} for prompt in CHATS.values()]
    pairs, _ = load_pairs(write_rows(rows), toy_tokenizer, 480, needs_scores=False)
    assert len(pairs) == len(CHATS) and max(len(pair.prompt_ids) for pair in pairs) > 250
    model, batch = load_model(TOY_STUDENT), collate(pairs, shared=True)
    with torch.no_grad():
        assert differ(batch, sequence_logps(model, batch), plain_sequence_logps(model, pairs)) < 1e-5
        batch.position_ids[batch.segments == REJECTED] += 1
        assert differ(batch, sequence_logps(model, batch), plain_sequence_logps(model, pairs)) > 1e-5


# --------------------------------------------------------------------------------------------- logits in chunks


def head_inputs(tokens=40, vocab=97, width=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    states, weight, bias = torch.randn(tokens, width, generator=rng), torch.randn(vocab, width, generator=rng), torch.randn(vocab, generator=rng)
    return [tensor.requires_grad_() for tensor in (states, weight, bias)], torch.randint(vocab, (tokens,), generator=rng), torch.randn(tokens, generator=rng)


def run_head(logps, inputs, weights):
    for tensor in inputs:
        tensor.grad = None
    (logps() * weights).sum().backward()
    return logps().detach(), *(tensor.grad for tensor in inputs)


@pytest.mark.parametrize("scale, cap", [(1.0, None), (0.3, None), (1.0, 3.0), (2.0, 3.0)])
def test_chunks_equal_full_logits(scale, cap, monkeypatch):
    (states, weight, bias), targets, weights = head_inputs()

    def full(cap=cap):
        logits = scale * F.linear(states, weight, bias)
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]

    right = run_head(full, (states, weight, bias), weights)
    for tokens in (1, 7, 40, 1000):
        monkeypatch.setitem(rdpo.HEAD_BYTES, "cpu", tokens * 4 * len(weight))
        fast = run_head(lambda: TokenLogps.apply(states, weight, bias, targets, scale, cap), (states, weight, bias), weights)
        assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(fast, right))
    control = run_head(lambda: full(cap=1.0), (states, weight, bias), weights)
    assert not any(torch.allclose(one, other, atol=1e-2) for one, other in zip(control, right))


def test_the_heads_gradient_is_added_to_what_is_there():
    (states, weight, bias), targets, weights = head_inputs()
    run_head(lambda: TokenLogps.apply(states, weight, bias, targets, 1.0, None), (states, weight, bias), weights)
    once = weight.grad.clone()
    (TokenLogps.apply(states, weight, bias, targets, 1.0, None) * weights).sum().backward()
    assert torch.allclose(weight.grad, 2 * once)
    weight.requires_grad_(False)
    weight.grad = None
    (TokenLogps.apply(states, weight, bias, targets, 1.0, None) * weights).sum().backward()
    assert weight.grad is None


def test_autocast_is_the_models_own_up_to_rounding():
    model, pairs = tiny_model(), random_pairs(6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own, fast = plain_sequence_logps(model, pairs), sequence_logps(model, collate(pairs))
        shared = sequence_logps(model, collate(pairs, shared=True))
    batch = collate(pairs)
    assert differ(batch, fast, own) < 0.05 and differ(batch, shared, own) < 0.05
    assert differ(batch, own, plain_sequence_logps(model, pairs)) > 1e-4  # control: bfloat16 it was


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation made."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.size = max([self.size] + [tensor.numel() for tensor in tree_iter(result) if isinstance(tensor, torch.Tensor)])
        return result


def test_no_tensor_of_tokens_times_vocabulary_ever_exists(monkeypatch):
    vocab, pairs = 5000, random_pairs(24)
    model, batch = tiny_model(vocab=vocab), collate(pairs, shared=True)
    tokens, head = len(batch.targets), 32 * vocab
    assert tokens > 3 * 32
    monkeypatch.setitem(rdpo.HEAD_BYTES, "cpu", 16 * 4 * vocab)
    with Largest() as largest:
        sequence_logps(model, batch).sum().backward()
    assert largest.size == head  # the output head's gradient; a chunk's logits are half of it
    with Largest() as largest:
        plain_sequence_logps(model, pairs[:1]).sum().backward()
        model(input_ids=batch.input_ids)
    assert largest.size >= tokens * vocab  # control
