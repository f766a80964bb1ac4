"""The fast paths of rdpo.sequence_logps against the model's own logits.

They compute a prompt once for both answers, and logits one chunk at a time.
"""
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, WINDOWED, random_pairs, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import rdpo
from data import Pair, collate, load_pairs
from infra.models import TOY_STUDENT, load_model
from rdpo import TokenLogps, plain_sequence_logps, sequence_logps

PROMPT, REJECTED = 0, 2  # segment % 3, see data.Batch


def gradients(model, logps):
    """Flat weight gradients of a sum in which every answer has its own coefficient."""
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps))).sum().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def difference(batch, logps, right):
    """The largest difference between summed log-probabilities, per token."""
    return ((logps - right).abs() / torch.tensor(batch.answer_lengths)).max().item()


# --------------------------------------------------------------------------------- each prompt once


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_both_layouts_equal_a_separate_plain_forward(name):
    model, pairs = tiny_model(name), random_pairs(6)
    plain = plain_sequence_logps(model, pairs)
    plain_gradients = gradients(model, plain)
    size = plain_gradients.abs().max()
    for share_prefix in (False, True):
        batch = collate(pairs, share_prefix)
        fast = sequence_logps(model, batch)
        assert difference(batch, fast, plain) < 1e-5
        assert (gradients(model, fast) - plain_gradients).abs().max() < 1e-5 * size
        # Control: other pairs have other gradients.
        other = sequence_logps(model, collate(pairs[:3] * 2, share_prefix))
        assert (gradients(model, other) - plain_gradients).abs().max() > 1e-2 * size


@torch.no_grad()
def test_the_slow_way_is_exact_over_a_large_vocabulary():
    """float32 log_softmax is not: on a CPU it refused Gemma, whose vocabulary has this size."""
    model, pairs = tiny_model("gemma3", 2**18), random_pairs(3, 2**18)
    model.lm_head.weight *= 3
    sums = plain_sequence_logps(model, pairs)
    answers = [(pair.prompt_ids, pair.answers[a]) for a in (0, 1) for pair in pairs]
    for total, (prompt, answer) in zip(sums, answers):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
        logps = logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])
        assert abs(total - logps.sum()) < 1e-5 * len(answer)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_controls_a_wrong_mask_and_wrong_positions_are_seen(name):
    model, pairs = tiny_model(name), random_pairs(6)
    plain = plain_sequence_logps(model, pairs)

    def is_seen(change, rows=None):
        batch = collate(pairs, share_prefix=True, rows=rows)
        change(batch)
        return difference(batch, sequence_logps(model, batch), plain) > 1e-3

    def rejected_sees_chosen(batch):
        batch.segments -= (batch.segments % 3 == REJECTED).long()

    def rejected_does_not_see_its_prompt(batch):
        batch.segments += (batch.segments % 3 == PROMPT).long()

    def pairs_see_each_other(batch):
        batch.segments %= 3

    def positions_do_not_restart(batch):
        batch.position_ids = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)

    one_row = [[3, 0, 5, 1, 2, 4]]
    for rows in (None, [[i] for i in range(6)], [[0, 1], [2, 3], [5, 4]], one_row):
        assert not is_seen(lambda batch: None, rows)
    assert is_seen(pairs_see_each_other, one_row)
    assert is_seen(rejected_sees_chosen)
    assert is_seen(rejected_does_not_see_its_prompt)
    assert is_seen(positions_do_not_restart)
    if name in WINDOWED:
        window = model.config.sliding_window
        for wrong in (None, window + 1, window - 1):
            model = tiny_model(name)
            model.config.sliding_window = wrong
            assert is_seen(lambda batch: None)


def test_a_window_counts_positions_of_the_conversation(monkeypatch):
    """Control: counted along the row, the rejected answer would be too far from its prompt."""
    model, pairs = tiny_model("mistral_window"), random_pairs(6)
    batch = collate(pairs, share_prefix=True, rows=[[i] for i in range(6)])
    mask = rdpo.attention_mask(model, batch)
    row_distance = torch.arange(mask.shape[2])[:, None] - torch.arange(mask.shape[2])
    too_far = row_distance >= model.config.sliding_window
    wrong_mask = mask.masked_fill(too_far, torch.finfo().min)
    monkeypatch.setattr(rdpo, "attention_mask", lambda *_: wrong_mask)
    plain = plain_sequence_logps(model, pairs)
    assert difference(batch, sequence_logps(model, batch), plain) > 1e-3


@pytest.mark.parametrize("width", [16, 17, 23])
def test_attention_on_a_gpu_needs_no_copy_of_the_mask_and_no_cudnn(width, tmp_path):
    """CUDA's fused attention copies no mask whose strides, but the last, are multiples of 8."""
    model = tiny_model("mistral_window")
    pairs = [Pair("", "", [1] * (width - 5), [2] * 3, [3] * 2)] * 2
    mask = rdpo.attention_mask(model, collate(pairs, share_prefix=True, rows=[[0], [1]]))
    assert mask.shape == (2, 1, width, width) and mask.stride()[-1] == 1
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    model.save_pretrained(tmp_path)
    torch.backends.cuda.enable_cudnn_sdp(True)
    load_model(str(tmp_path))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


ASK = {"role": "user", "content": "Tell me about tea."}
CHATS = {
    "one turn": [ASK],
    "system": [{"role": "system", "content": "You are brief."}, ASK],
    "turns": [{"role": "user", "content": "Hello."},
              {"role": "assistant", "content": "Good day to you."}, ASK],
    "long": [{"role": "user", "content": "Tell me about tea. " * 60}],
}


def test_chats_system_messages_and_long_prompts(toy_tokenizer, write_rows):
    answers = {"chosen": "Tea is a drink that many people like, though not everyone.",
               "rejected": "No!"}
    rows = [{"prompt": prompt} | answers for prompt in CHATS.values()]
    pairs, _ = load_pairs(write_rows(rows), toy_tokenizer, 480, needs_scores=False)
    assert len(pairs) == len(CHATS) and max(len(pair.prompt_ids) for pair in pairs) > 250
    model, batch = load_model(TOY_STUDENT), collate(pairs, share_prefix=True)
    with torch.no_grad():
        plain = plain_sequence_logps(model, pairs)
        assert difference(batch, sequence_logps(model, batch), plain) < 1e-5
        batch.position_ids[batch.segments % 3 == REJECTED] += 1  # control
        assert difference(batch, sequence_logps(model, batch), plain) > 1e-5


# --------------------------------------------------------------------------------- logits in chunks


def head_inputs(tokens=40, vocab=97, width=16, seed=0):
    """([hidden (N, D), weight (V, D), bias (V,)], targets (N,), coefficients (N,))."""
    rng = torch.Generator().manual_seed(seed)
    shapes = (tokens, width), (vocab, width), (vocab,)
    tensors = [torch.randn(shape, generator=rng).requires_grad_() for shape in shapes]
    targets = torch.randint(vocab, (tokens,), generator=rng)
    return tensors, targets, torch.randn(tokens, generator=rng)


def run_head(logps, tensors, coefficients):
    """Log-probabilities, and the gradients of their weighted sum by the tensors."""
    for tensor in tensors:
        tensor.grad = None
    (logps() * coefficients).sum().backward()
    return logps().detach(), *(tensor.grad for tensor in tensors)


@pytest.mark.parametrize("scale, cap", [(1.0, None), (0.3, None), (1.0, 3.0), (2.0, 3.0)])
def test_chunks_equal_full_logits(scale, cap, monkeypatch):
    tensors, targets, coefficients = head_inputs()

    def full(cap=cap):
        logits = scale * F.linear(*tensors)
        logits = cap * torch.tanh(logits / cap) if cap else logits
        return logits.log_softmax(1).gather(1, targets[:, None])[:, 0]

    expected = run_head(full, tensors, coefficients)
    for tokens in (1, 7, 40, 1000):
        monkeypatch.setitem(rdpo.HEAD_BYTES, "cpu", tokens * 4 * len(tensors[1]))
        fast = run_head(lambda: TokenLogps.apply(*tensors, targets, scale, cap), tensors,
                        coefficients)
        assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5)
                   for one, other in zip(fast, expected))
    control = run_head(lambda: full(cap=1.0), tensors, coefficients)
    assert not any(torch.allclose(one, other, atol=1e-2)
                   for one, other in zip(control, expected))


def test_a_chunk_fills_its_bytes_and_holds_a_token_at_least(monkeypatch):
    (hidden, weight, bias), *_ = head_inputs()
    for size, tokens in ((1, 1), (28 * len(weight), 7), (28 * len(weight) - 1, 6)):
        monkeypatch.setitem(rdpo.HEAD_BYTES, "cpu", size)
        chunks = [logits for _, logits in rdpo.logits_in_chunks(hidden, weight, bias, 1.0, None)]
        assert len(chunks[0]) == tokens and sum(map(len, chunks)) == len(hidden)


def test_the_heads_gradient_is_added_to_the_one_that_is_there():
    tensors, targets, coefficients = head_inputs()
    weight = tensors[1]

    def backward():
        (TokenLogps.apply(*tensors, targets, 1.0, None) * coefficients).sum().backward()

    backward()
    once = weight.grad.clone()
    backward()
    assert torch.allclose(weight.grad, 2 * once)
    weight.requires_grad_(False)
    weight.grad = None
    backward()
    assert weight.grad is None


@torch.no_grad()
def test_the_mask_has_the_dtype_of_the_models_products_and_strides_that_never_change():
    """Another dtype would be copied in every layer, or refused by the attention kernel."""
    model = tiny_model("mistral_window")
    assert rdpo.attention_mask(model, collate(random_pairs(2), True)).dtype == torch.float32
    pair = random_pairs(1)[0]
    for width in range(14, 34):  # CUDA's kernel copies what is not a multiple of 8
        pairs = [dataclasses.replace(pair, prompt_ids=[1] * (width - 4), chosen_ids=[2, 3],
                                     rejected_ids=[4, 5])]
        mask = rdpo.attention_mask(model.bfloat16(), collate(pairs, True))
        assert mask.dtype == torch.bfloat16 and mask.shape == (1, 1, width, width)
        assert mask.stride(2) % 8 == 0 and width < mask.stride(2) <= width + 8


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_bfloat16_is_the_models_own_up_to_rounding(name):
    model, pairs = tiny_model(name), random_pairs(6)
    exact = plain_sequence_logps(model, pairs)
    batch, model = collate(pairs), model.bfloat16()
    own, fast = plain_sequence_logps(model, pairs), sequence_logps(model, batch)
    shared = sequence_logps(model, collate(pairs, share_prefix=True))
    assert difference(batch, fast, own) < 0.05 and difference(batch, shared, own) < 0.05
    # Control: it was bfloat16.
    assert difference(batch, own, exact) > 1e-4


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation made."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        sizes = [tensor.numel() for tensor in tree_iter(result) if isinstance(tensor, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return result


@torch.no_grad()
def test_a_window_takes_no_wide_integers_of_rows_times_tokens_squared():
    model, batch = tiny_model("mistral_window"), collate(random_pairs(6), share_prefix=True)
    tokens = batch.input_ids.numel()

    class Integers(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and result.dtype == torch.int64:
                self.largest = max(self.largest, result.numel())
            return result

    with Integers() as integers:
        rdpo.attention_mask(model, batch)
    assert integers.largest <= tokens
    with Integers() as integers:  # control
        position = batch.position_ids
        position[:, :, None] - position[:, None, :]
    assert integers.largest > tokens


def test_no_tensor_of_tokens_times_vocabulary_ever_exists(monkeypatch):
    vocab, pairs = 10000, random_pairs(24)
    model, batch = tiny_model(vocab=vocab), collate(pairs, share_prefix=True)
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
