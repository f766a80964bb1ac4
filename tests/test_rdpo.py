"""The algorithm against slow, independent computations, each with a control that must fail."""
import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, random_pairs, tiny_model

from data import PADDING, collate
from infra import reference
from infra.command import BadInput
from infra.reference import ReferenceCache, fingerprint, keys_of
from rdpo import (LOSSES, judged_tau, plain_sequence_logps, preference_probability, rdpo_loss,
                  score_gap, sequence_logps)


def four_logps(count=64, seed=0, requires_grad=False):
    rng = torch.Generator().manual_seed(seed)
    logps = -100 * torch.rand(4, count, generator=rng, dtype=torch.float64)
    return [row.clone().requires_grad_(requires_grad) for row in logps]


def all_tau(count=64):
    return torch.linspace(0, 1, count, dtype=torch.float64)


# -------------------------------------------------------------------------------- facts of the loss


def test_loss_and_rewards_equal_plain_python():
    logps, tau, beta = four_logps(), all_tau(), 0.1
    losses, chosen_rewards, rejected_rewards = rdpo_loss(*logps, tau, beta)
    for i in range(64):
        pc, pr, rc, rr = (row[i].item() for row in logps)
        p = 1 / (1 + math.exp(-beta * ((pc - rc) - (pr - rr))))
        expected = -(tau[i] * math.log(p) + (1 - tau[i]) * math.log(1 - p)).item()
        assert losses[i].item() == pytest.approx(expected, abs=1e-9)
        assert chosen_rewards[i].item() == pytest.approx(beta * (pc - rc))
        assert rejected_rewards[i].item() == pytest.approx(beta * (pr - rr))


def test_tau_one_is_dpo():
    pc, pr, rc, rr = four_logps()
    dpo = -F.logsigmoid(0.1 * ((pc - pr) - (rc - rr)))  # the DPO paper's equation 7
    assert torch.allclose(rdpo_loss(pc, pr, rc, rr, torch.ones(64), 0.1)[0], dpo, atol=1e-12)
    nearly_one = torch.full((64,), 0.99)  # control
    assert not torch.allclose(rdpo_loss(pc, pr, rc, rr, nearly_one, 0.1)[0], dpo, atol=1e-3)


def test_constant_tau_is_conservative_dpo():
    pc, pr, rc, rr = four_logps()
    logits, smoothing = 0.1 * ((pc - pr) - (rc - rr)), 0.2
    conservative = -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)
    tau = torch.full((64,), 1 - smoothing)
    assert torch.allclose(rdpo_loss(pc, pr, rc, rr, tau, 0.1)[0], conservative)


def test_policy_equal_to_reference_gives_ln_2_for_every_tau():
    pc, pr, _, _ = four_logps()
    for beta in (0.01, 0.1, 5.0):
        losses, _, _ = rdpo_loss(pc, pr, pc, pr, all_tau(), beta)
        assert torch.allclose(losses, torch.full((64,), math.log(2), dtype=torch.float64))


def test_gradient_by_the_margin_is_p_minus_tau():
    pc, pr, rc, rr = four_logps(requires_grad=True)
    beta, tau = 0.1, all_tau()
    rdpo_loss(pc, pr, rc, rr, tau, beta)[0].sum().backward()
    p = torch.sigmoid(beta * ((pc - rc) - (pr - rr)))
    assert torch.allclose(pc.grad, beta * (p - tau).detach())
    assert torch.allclose(pr.grad, -beta * (p - tau).detach())


def test_ties_inversions_and_hard_relabelling():
    tau = preference_probability(torch.tensor([0.0, -2.0, 4.0]))
    assert tau[0] == 0.5 and tau[1] < 0.5 < tau[2]
    assert tau[2].item() == pytest.approx(1 / (1 + math.exp(-4)))
    # A tie pulls a margin back to 0 from either side. An inversion swaps the two answers.
    for margin in (-3.0, 3.0):
        m = torch.tensor([margin], requires_grad=True)
        rdpo_loss(m, torch.zeros(1), torch.zeros(1), torch.zeros(1), tau[:1], 1.0)[0].backward()
        assert m.grad.sign() == torch.tensor(margin).sign()
    pc, pr, rc, rr = four_logps()
    swapped = rdpo_loss(pr, pc, rr, rc, 1 - all_tau(), 0.1)[0]
    assert torch.allclose(rdpo_loss(pc, pr, rc, rr, all_tau(), 0.1)[0], swapped)
    hard = preference_probability(torch.tensor([0.1, -0.1]), 1e-6)
    assert hard.tolist() == [1.0, 0.0]
    with pytest.raises(ValueError):
        preference_probability(torch.ones(1), 0.0)


def test_a_known_scale_is_widened_and_a_rows_own_tau_stays():
    assert score_gap(1, 0, scale=1) == score_gap(5, 0, scale=5) == score_gap(5, 0) == 5
    assert score_gap(-2.5, 2.5, scale=10) == -2.5
    gaps, own = torch.tensor([4.0, math.nan, math.nan]), torch.tensor([math.nan, 0.9, 1.0])
    assert judged_tau(gaps, own).tolist() == pytest.approx([1 / (1 + math.exp(-4)), 0.9, 1.0])
    # T divides the log-odds of both kinds: tau^(1/T) against (1 - tau)^(1/T).
    odds = (0.9 / 0.1) ** 0.5
    assert judged_tau(gaps, own, 2.0).tolist() == pytest.approx(
        [1 / (1 + math.exp(-2)), odds / (1 + odds), 1.0])
    assert judged_tau(gaps, own, 1e-6).tolist() == [1.0, 1.0, 1.0]


def test_a_new_form_of_the_loss_is_a_function_of_margins_and_tau():
    """IPO with soft labels, as in toy/EXERCISES.md: its minimum is at m = tau - 1/2."""
    def ipo(margins, tau):
        return (margins - (tau - 0.5)) ** 2

    new = LOSSES["rdpo"]._replace(form=ipo)
    pc, pr, rc, rr = four_logps(requires_grad=True)
    losses, chosen, rejected = rdpo_loss(pc, pr, rc, rr, all_tau(), 0.1, new.form)
    losses.sum().backward()
    margins = (chosen - rejected).detach()
    assert torch.allclose(pc.grad, 0.2 * (margins - all_tau() + 0.5))


def test_equals_reward_aware_preference_loss_up_to_a_constant():
    """KL(Bernoulli(sigmoid(gap / T)) || Bernoulli(sigmoid(margin))) differs by tau's entropy."""
    gaps, temperature = torch.linspace(-4, 4, 64, dtype=torch.float64), 2.0
    tau = preference_probability(gaps, temperature)
    differences = []
    for seed in (0, 1):
        pc, pr, rc, rr = four_logps(seed=seed)
        margins, scaled = 0.1 * ((pc - rc) - (pr - rr)), gaps / temperature
        kl = (scaled.sigmoid() * (F.logsigmoid(scaled) - F.logsigmoid(margins))
              + (-scaled).sigmoid() * (F.logsigmoid(-scaled) - F.logsigmoid(-margins)))
        differences.append(rdpo_loss(pc, pr, rc, rr, tau, 0.1)[0] - kl)
    assert torch.allclose(differences[0], differences[1], atol=1e-12)


def test_safe_at_margins_of_100000():
    for dtype in (torch.float32, torch.float64):
        m = torch.tensor([1e5, -1e5, 1e5, -1e5], dtype=dtype, requires_grad=True)
        zeros, tau = torch.zeros(4, dtype=dtype), torch.tensor([1.0, 1.0, 0.0, 0.5], dtype=dtype)
        losses, _, _ = rdpo_loss(m, zeros, zeros, zeros, tau, 1.0)
        losses.sum().backward()
        assert losses.tolist() == pytest.approx([0.0, 1e5, 1e5, 5e4])
        assert m.grad.tolist() == pytest.approx([0.0, -1.0, 1.0, -0.5])


# -------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logps_equal_transformers_own_loss(name):
    """Sum of logps = -(the model's own mean cross-entropy) * tokens, one unpadded answer a call."""
    model, pairs = tiny_model(name), random_pairs(5)
    fast = sequence_logps(model, collate(pairs))
    slow = []
    for side in ("chosen_ids", "rejected_ids"):
        for pair in pairs:
            response = getattr(pair, side)
            ids = torch.tensor([pair.prompt_ids + response])
            labels = ids.clone()
            labels[:, :len(pair.prompt_ids)] = -100
            slow.append(-model(input_ids=ids, labels=labels).loss.item() * len(response))
    assert torch.allclose(fast, torch.tensor(slow), atol=1e-4)
    assert torch.allclose(fast, plain_sequence_logps(model, pairs), atol=1e-4)


def test_logps_control_a_shift_by_one_is_seen():
    model, batch = tiny_model(), collate(random_pairs(5))
    right = sequence_logps(model, batch)
    batch.hidden_index = batch.hidden_index - 1
    assert (sequence_logps(model, batch) - right).abs().max() > 0.1


def test_batch_mates_and_padding_change_nothing():
    model, pairs = tiny_model(), random_pairs(6)
    for share_prefix in (False, True):
        batch = collate(pairs, share_prefix)
        together = sequence_logps(model, batch)
        alone = torch.stack([sequence_logps(model, collate([pair], share_prefix))
                             for pair in pairs])  # (P, 2)
        assert torch.allclose(together, torch.cat([alone[:, 0], alone[:, 1]]), atol=1e-4)
        # The padding's ids do not matter (a pad id may equal the eos id).
        batch.input_ids[batch.segments == PADDING] = 5
        assert torch.equal(sequence_logps(model, batch), together)
        batch.input_ids[batch.segments == 0] = 5  # control: other ids are seen
        assert not torch.allclose(sequence_logps(model, batch), together, atol=1e-2)


def test_prompt_tokens_do_not_count_and_the_last_token_does():
    model, pair = tiny_model(), random_pairs(1)[0]
    logps = sequence_logps(model, collate([pair]))[0]
    ids = torch.tensor([pair.prompt_ids + pair.chosen_ids])
    logits = model(input_ids=ids).logits[0, :-1]  # (L-1, V)
    token_logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]  # (L-1,)
    start = len(pair.prompt_ids) - 1
    assert logps.item() == pytest.approx(token_logps[start:].sum().item(), abs=1e-4)
    for wrong in (token_logps[start:-1], token_logps):  # no end-of-turn token; with the prompt
        assert abs(logps.item() - wrong.sum().item()) > 1e-2


# ---------------------------------------------------------------------------------- reference cache


def cache_of(folder, model):
    return ReferenceCache(SimpleNamespace(ref_cache_dir=str(folder), dtype="float32", fsdp=False,
                                          compile=False), model)


def keys(prompt_ids, *answers):
    return keys_of(SimpleNamespace(prompt_ids=prompt_ids, answers=answers))


def test_cache_keeps_what_it_was_given(tmp_path):
    model, pairs = tiny_model(), random_pairs(3)
    cache = cache_of(tmp_path, model)
    assert cache.missing(pairs) == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt), cache.filling():
        cache.add(pairs[:2], torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
        raise KeyboardInterrupt
    other = cache_of(tmp_path, copy.deepcopy(model))
    assert other.logps == cache.logps and other.missing(pairs) == [2]
    assert other.lookup(pairs[:2]).tolist() == [[-1.0, -3.0], [-2.0, -4.0]]
    # Two runs that write one file keep each other's entries.
    other.logps |= dict.fromkeys(keys([9], [9]), -9.0)
    other.save()
    cache.logps |= dict.fromkeys(keys([8], [8]), -8.0)
    cache.save()
    assert len(cache_of(tmp_path, model).logps) == 6


def test_cache_takes_no_number_that_is_not_finite(tmp_path):
    cache, (pair,) = cache_of(tmp_path, tiny_model()), random_pairs(1)
    with pytest.raises(BadInput, match="random:0: the reference's log-probability is not finite"), \
            cache.filling():
        cache.add([pair], torch.tensor([[-1.0, math.nan]]))
    assert not list(tmp_path.iterdir())


def test_cache_key_changes_with_each_of_its_parts(monkeypatch):
    answers = [([1, 2], [3]), ([1, 2], [4]), ([1], [2, 3]), ([0, 2], [3])]
    assert len({keys(*answer)[0] for answer in answers}) == 4
    assert keys([1, 2], [3]) == keys([1, 2], [3])
    model = tiny_model()
    names = [fingerprint(model, "float32"), fingerprint(model, "bfloat16")]
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-6
    names.append(fingerprint(changed, "float32"))
    changed = copy.deepcopy(model)
    changed.config.rms_norm_eps = 1e-3
    names.append(fingerprint(changed, "float32"))
    changed = copy.deepcopy(model)
    changed.set_attn_implementation("eager")
    names.append(fingerprint(changed, "float32"))
    assert len(set(names)) == 5
    # The same weights in another folder are the same reference.
    renamed = copy.deepcopy(model)
    renamed.config._name_or_path = "elsewhere"
    assert fingerprint(renamed, "float32") == names[0]
    monkeypatch.setattr(reference, "VERSION", 0)  # the values of a program that was wrong
    assert fingerprint(model, "float32") not in names
