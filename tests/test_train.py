"""train.py as a user runs it: what it computes, what it leaves behind, killed equals not killed."""
import dataclasses
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from conftest import (ARCHITECTURES, GROUPED, ROOT, SMALL, assert_one_line, build, random_pairs,
                      read_lines, read_metrics, tiny_model)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

import eval as evaluation
import rdpo
import train
from data import batch_tokens, collate, count_chosen, epoch_order, load_pairs
from infra import models
from infra.command import BadInput
from infra.models import TOY_STUDENT
from infra.packing import longest_row, micro_batches
from infra.reference import ReferenceCache, keys_of
from infra.runlog import compile_note
from infra.selfcheck import check_equal, check_step_0
from infra.split import split_train_val


def args_for(**changes):
    args = train.get_args(["--data", "none", "--device", "cpu", "--dtype", "float32",
                           "--tokens_per_batch", "2048"])
    vars(args).update(changes)
    return args


def dataset_of(model, pairs, args, tmp_path, share_prefix=False):
    """(Dataset, number of pairs computed) with the model as the reference."""
    args.ref_cache_dir = str(tmp_path)
    cache = ReferenceCache(args, model)
    return train.make_dataset(model, pairs, share_prefix, cache, args), cache.computed


def weights_of(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("loss", ["rdpo", "dpo", "sft"])
def test_any_micro_batch_split_gives_the_same_gradient(
        loss, share_prefix, tmp_path, monkeypatch):
    model, pairs, args = tiny_model(), random_pairs(12), args_for(loss=loss, sft_weight=0.3)
    other = tiny_model(seed=1)  # as the reference, so that margins are not 0
    data, _ = dataset_of(other, pairs, args, tmp_path, share_prefix)
    tokens = count_chosen(pairs)

    def gradient(batches, pair_count=12, token_count=tokens):
        model.zero_grad()
        for batch in batches:
            losses, _ = train.forward(model, data.part(batch), args, pair_count, token_count)
            losses.sum().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    whole = gradient([list(range(12))])
    for bound in (1, 60, 100, 150, 300):
        split = micro_batches(pairs, range(12), bound, share_prefix)
        assert torch.allclose(gradient(split), whole, atol=1e-6)
    # A pair that is computed once more, for a rank without one, does not count.
    model.zero_grad()
    monkeypatch.setattr(train, "micro_batches", lambda *_: [list(range(12)), []])
    loss, pairs_found, values = train.forward_all(model, data, args, lambda loss: loss.backward())
    again = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    assert torch.allclose(again, whole, atol=1e-6)
    assert pairs_found == pairs and all(len(value) == 12 for value in values.values())
    # Control: each micro-batch averaged over itself, the mistake of other trainers.
    wrong = sum(gradient([batch], len(batch), count_chosen([pairs[i] for i in batch]))
                for batch in (list(range(10)), [10, 11])) / 2
    assert not torch.allclose(wrong, whole, atol=1e-4)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def plain_metrics(model, reference, pairs, args):
    """The metrics of some pairs, one pair at a time in plain Python."""
    rows = []
    for pair in pairs:
        policy, ref = (rdpo.plain_sequence_logps(m, [pair]).tolist() for m in (model, reference))
        chosen, rejected = (args.beta * (policy[i] - ref[i]) for i in (0, 1))
        margin, gap = chosen - rejected, pair.score_gap
        tau = {"rdpo": sigmoid(gap / args.tau_temperature), "dpo": 1 - args.label_smoothing}.get(
            args.loss, 1.0)
        loss = tau * math.log1p(math.exp(-margin)) + (1 - tau) * math.log1p(math.exp(margin))
        rows.append({"preference": pair.weight * loss, "imitation": pair.weight * -policy[0],
                     "logps/chosen": policy[0], "logps/rejected": policy[1],
                     "rewards/chosen": chosen, "rewards/rejected": rejected, "tau/mean": tau,
                     "rewards/margins": margin, "rewards/accuracies": float(margin > 0),
                     "agrees": None if gap == 0 else float((margin > 0) == (gap > 0))})
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]
             if name != "agrees"}
    agrees = [row["agrees"] for row in rows if row["agrees"] is not None]
    imitation = len(rows) * means.pop("imitation") / count_chosen(pairs)
    preference = means.pop("preference")
    means["loss"] = (imitation if args.loss in ("sft", "dsc")
                     else preference + args.sft_weight * imitation)
    return means | {"rewards/score_agreement": sum(agrees) / len(agrees)}


@pytest.mark.parametrize("flags", [
    dict(loss="rdpo", tau_temperature=2.0), dict(loss="dpo"), dict(loss="dpo", label_smoothing=0.1),
    dict(loss="rdpo", sft_weight=0.5), dict(loss="sft"), dict(loss="dsc")], ids=str)
def test_losses_and_metrics_are_what_they_say(tmp_path, flags):
    model, reference, pairs = tiny_model(), tiny_model(seed=1), random_pairs(8)
    args = args_for(**flags, tokens_per_batch=150)
    for i, pair in enumerate(pairs):
        pair.weight = (1.0, 0.25, 3.0)[i % 3]  # of the loss alone
    data, _ = dataset_of(reference, pairs, args, tmp_path)
    for i, pair in enumerate(pairs):
        pair.behaviour = "tea" if i < 3 else "coffee"
    found, found_pairs, values = train.evaluate(model, data, args)
    expected = plain_metrics(model, reference, pairs, args)
    for part, own in (("tea", pairs[:3]), ("coffee", pairs[3:])):  # each as if it were alone
        alone = plain_metrics(model, reference, own, args)
        for name in alone:
            assert found.pop(f"eval/{part}/{name}") == pytest.approx(alone[name], abs=1e-4)
    assert found == pytest.approx({f"eval/{k}": v for k, v in expected.items()}, abs=1e-4)
    rewards = zip(values["rewards/chosen"].tolist(), values["rewards/rejected"].tolist())
    for pair, both in zip(found_pairs, rewards, strict=True):
        policy, ref = (rdpo.plain_sequence_logps(m, [pair]) for m in (model, reference))
        assert both == pytest.approx((args.beta * (policy - ref)).tolist(), abs=1e-4)
    wrong = plain_metrics(model, reference, pairs, args_for(**flags | {"beta": 0.2}))
    assert found["eval/rewards/margins"] != pytest.approx(wrong["rewards/margins"], abs=1e-3)


def test_second_run_computes_no_reference_and_a_changed_weight_computes_all(tmp_path):
    model, pairs, args = tiny_model(), random_pairs(10), args_for()
    data, computed = dataset_of(model, pairs, args, tmp_path)
    again, computed_again = dataset_of(model, pairs, args_for(beta=0.5, loss="dpo"), tmp_path)
    _, computed_more = dataset_of(model, pairs + random_pairs(3, seed=5), args, tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    _, computed_changed = dataset_of(model, pairs, args, tmp_path)
    assert (computed, computed_again, computed_more, computed_changed) == (10, 0, 3, 10)
    assert torch.equal(data.ref_chosen_logps, again.ref_chosen_logps)
    assert torch.equal(data.ref_rejected_logps, again.ref_rejected_logps)


def test_cache_of_one_layout_is_valid_for_the_other(
        run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    path, steps = write_rows(toy_rows[:60]), {}
    for shared in (True, False):
        monkeypatch.setattr(train, "choose_layout", lambda *_, shared=shared: shared)
        code, out, _ = run_train("--data", path, "--max_steps", 2,
                                 "--out_dir", tmp_path / f"out-{shared}")
        # The step-0 gate has compared live and cached log-probabilities.
        assert code == 0 and ("reference computed for 0 in" in out) != shared
        steps[shared] = read_metrics(tmp_path / f"out-{shared}")[0]
    for one, other in zip(steps[True], steps[False]):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_reference_pass_that_is_stopped_keeps_what_it_computed(tmp_path, monkeypatch):
    model, pairs, args = tiny_model(), random_pairs(10), args_for(tokens_per_batch=100)
    calls = []

    def stopped(*call):
        calls.append(call)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rdpo.sequence_logps(*call)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "policy_logps", stopped)
        dataset_of(model, pairs, args, tmp_path)
    _, computed = dataset_of(model, pairs, args, tmp_path)
    assert 0 < computed < 10


# ------------------------------------------------------------------------------------ whole runs


@pytest.mark.parametrize("flags", [["--loss", "rdpo", "--beta", 0.5, "--tau_temperature", 3],
                                   ["--loss", "dpo", "--beta", 2],
                                   ["--loss", "dpo", "--label_smoothing", 0.2]])
def test_loss_starts_at_ln_2(run_train, tmp_path, toy_rows, write_rows, flags):
    code, _, _ = run_train("--data", write_rows(toy_rows[:60]), "--max_steps", 1, *flags)
    steps, evaluations = read_metrics(tmp_path / "out")
    assert code == 0
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert evaluations[0]["step"] == 0
    assert evaluations[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert evaluations[0]["eval/rewards/accuracies"] == 0.5


OVERFIT = ["--epochs", 30, "--learning_rate", 1e-3, "--tau_temperature", 0.5, "--eval_every", 1000]


def test_overfits_8_pairs(run_train, tmp_path, toy_rows, write_rows):
    rows = [row for row in toy_rows if row["score_chosen"] > row["score_rejected"]][:8]
    paths = "--data", write_rows(rows), "--eval_data", write_rows(rows, "the_same.jsonl")
    assert run_train(*paths, *OVERFIT)[0] == 0
    steps, evaluations = read_metrics(tmp_path / "out")
    assert steps[-1]["rewards/accuracies"] == evaluations[-1]["eval/rewards/accuracies"] == 1.0
    assert steps[-1]["loss"] < 0.2


def test_overfitting_control_inverted_scores_turn_the_ranking_round(
        run_train, tmp_path, toy_rows, write_rows):
    rows = [row | {"score_chosen": row["score_rejected"], "score_rejected": row["score_chosen"]}
            for row in toy_rows if row["score_chosen"] > row["score_rejected"]][:8]
    paths = "--data", write_rows(rows), "--eval_data", write_rows(rows, "the_same.jsonl")
    run_train(*paths, *OVERFIT)
    steps, _ = read_metrics(tmp_path / "out")
    assert steps[-1]["rewards/accuracies"] == 0.0
    assert steps[-1]["rewards/score_agreement"] == 1.0


def test_what_a_run_leaves_and_prints(run_train, tmp_path, toy_rows, write_rows):
    code, out, err = run_train("--data", write_rows(toy_rows[:100]), "--max_new_tokens", 64,
                               curves=True)
    folder = tmp_path / "out"
    assert code == 0 and err == ""
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "args.json",
            "curves.png", "state"} <= set(os.listdir(folder))
    assert (folder / "curves.png").stat().st_size > 20_000
    model, base = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, TOY_STUDENT))
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert model.dtype == torch.bfloat16  # as the student came
    assert not torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    steps, evaluations = read_metrics(folder)
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert evaluations[-1]["step"] == len(steps)
    for name in ("epoch", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
                 "rewards/accuracies", "logps/chosen", "logps/rejected", "grad_norm", "lr",
                 "tau/mean", "step_seconds", "tokens", "peak_memory_mib"):
        assert all(math.isfinite(line[name]) for line in steps), name
    changed = float(out.split("student saved (")[1].split(" %")[0])
    assert 1 < changed <= 100
    assert out.count("student:   ") == 3 and "reference  student" in out
    # The first screen is calm: no warning, no library detail, at most 100 columns but for answers.
    assert "warning" not in out + err and "layout" not in out
    assert all(len(line) <= 100 for line in out.split("\nprompt:")[0].splitlines()[3:])


def test_the_saved_student_is_asked_as_it_was_trained(
        run_train, run_stage, tmp_path, toy_rows, write_rows):
    model = tmp_path / "model"
    shutil.copytree(TOY_STUDENT, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(
        template.replace("}}<|end|>", "}}{% if think %} well{% endif %}<|end|>"))
    flags = ["--data", write_rows(toy_rows[:24]), "--model", model, "--max_steps", 1]
    code, out, _ = run_train(*flags, "--template_kwargs", '{"think": true}')
    assert code == 0 and "template:" not in out
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    assert args["template_kwargs"] == {"think": True}
    asked = [AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Hi."}], tokenize=False, add_generation_prompt=True)
        for folder in (model, tmp_path / "out")]
    assert asked == ["<|user|>Hi.<|end|><|assistant|>", "<|user|>Hi. well<|end|><|assistant|>"]
    # eval.py asks the base in the same way: prompt ids in answers.jsonl are equal
    code, _, err = run_stage(
        evaluation, "--prompts", write_rows(toy_rows[:3], "prompts.jsonl"), "--model",
        tmp_path / "out", "--base_model", model, "--max_new_tokens", 2, "--out_dir",
        tmp_path / "eval")
    assert code == 0, err
    answers = read_lines(tmp_path / "eval" / "answers.jsonl")
    ids = {row["answered_by"]: row["prompt_ids"] for row in answers
           if row["row"] == toy_rows[0]["id"]}
    assert len(ids) == 2 and len(set(map(tuple, ids.values()))) == 1


@pytest.mark.parametrize("value", ["{", "[]", '{"a b": 1}', '{"a": {}}', '{"a": null}', "true"])
def test_template_kwargs_that_cannot_be_right_are_one_line(run_train, value):
    assert_one_line(run_train("--data", "none", "--template_kwargs", value), "--template_kwargs")


def test_several_files_judges_and_behaviours(run_train, tmp_path, toy_rows, write_rows):
    """Scores of 0 and 1 beside scores of 0 to 5: equal gaps in points of 5 give equal targets."""
    one, two = toy_rows[:60], toy_rows[60:120]
    files = write_rows(one, "one.jsonl"), write_rows(two, "two.jsonl")
    flags = ["--max_steps", 1, "--loss", "rdpo"]
    assert run_train("--data", write_rows(one + two), *flags)[0] == 0
    code, out, _ = run_train("--data", *files, *flags, "--out_dir", tmp_path / "several")
    assert code == 0
    assert same_weights(weights_of(tmp_path / "out"), weights_of(tmp_path / "several"))
    # The last evaluation, once more for each behaviour: their losses add up to the whole.
    lines = [line.split("|") for line in out.splitlines() if "|" in line][1:]
    lines = [(first.strip(), float(rest.split()[0])) for first, rest in lines]
    (_, whole), *parts = lines[[first[0] for first, _ in lines].index("1"):]
    assert len(parts) > 1
    pairs, _ = load_pairs(files[0], AutoTokenizer.from_pretrained(TOY_STUDENT), 1024, True)
    more, _ = load_pairs(files[1], AutoTokenizer.from_pretrained(TOY_STUDENT), 1024, True)
    _, val = split_train_val(pairs + more, 0.1, 0)
    sizes = Counter(pair.behaviour for pair in val)
    total = sum(loss * sizes[name] for name, loss in parts)
    assert total / len(val) == pytest.approx(whole, abs=1e-4)

    safety = [row | {"judge": {"model": "m", "scale": [0, 1]}, "score_chosen": 1,
                     "score_rejected": 0} for row in two]
    as_points = [row | {"score_chosen": 5, "score_rejected": 0} for row in two]
    run_train("--data", files[0], write_rows(safety, "two.jsonl"), *flags, "--overwrite")
    run_train("--data", files[0], write_rows(as_points, "two.jsonl"), *flags, "--out_dir",
              tmp_path / "several", "--overwrite")
    assert same_weights(weights_of(tmp_path / "out"), weights_of(tmp_path / "several"))
    mixed = write_rows([row | {"judge": "m"} for row in safety], "two.jsonl")
    assert_one_line(run_train("--data", files[0], mixed, *flags, "--overwrite"),
                    "two.jsonl:1: scored by m on an unknown scale")
    assert run_train("--data", files[0], mixed, "--max_steps", 1, "--loss", "dpo",
                     "--overwrite")[0] == 0  # it does not use the scores


def test_a_learning_rate_of_0_changes_no_weight(run_train, toy_rows, write_rows):
    _, out, _ = run_train("--data", write_rows(toy_rows[:40]), "--max_steps", 2,
                          "--learning_rate", 0)
    assert "student saved (0.0 % of its weights changed)" in out


def test_steps_follow_the_files_rows_once_an_epoch(run_train, tmp_path, toy_rows, write_rows):
    """100 pairs in batches of 16: an epoch's last batch is short, no pair is lost or repeated."""
    run_train("--data", write_rows(toy_rows[:100]), "--epochs", 2, "--eval_every", 1000,
              "--eval_data", write_rows(toy_rows[:100], "the_same.jsonl"))
    steps, _ = read_metrics(tmp_path / "out")
    assert len(steps) == 14
    assert sum(line["tokens"] for line in steps[:7]) == sum(line["tokens"] for line in steps[7:])


def test_the_learning_rate_rises_and_falls():
    args = args_for(learning_rate=1e-3, warmup_ratio=0.1)
    rates = [train.learning_rate(step, 20, args) for step in range(20)]
    assert rates[0] < rates[1] < rates[2] == max(rates) == 1e-3
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 1e-5


def test_step_0_gate_stops_a_stale_cache(run_train, tmp_path, toy_rows, write_rows):
    path = write_rows(toy_rows[:60])
    run_train("--data", path, "--max_steps", 1)
    cache = next((tmp_path / "cache").iterdir())
    content = load_file(cache)
    content["logps"] += 0.5
    save_file(content, cache)
    code, _, err = run_train("--data", path, "--max_steps", 1, "--overwrite")
    assert code == 2 and "step 0" in err and str(cache) in err and err.count("\n") == 1


@pytest.mark.parametrize("stale", ["one validation pair", "the first batch"])
def test_a_stale_pair_of_what_step_0_computes_is_found(
        run_train, tmp_path, toy_rows, write_rows, toy_tokenizer, stale):
    flags = ["--data", write_rows(toy_rows[:100]), "--max_steps", 1, "--batch_size", 8]
    assert run_train(*flags)[0] == 0
    train_pairs, val_pairs = train.load_train_val(args_for(data=[flags[1]]), toy_tokenizer)
    first_batch = [train_pairs[i] for i in epoch_order(len(train_pairs), 0, 0)[:8]]
    pairs = val_pairs[-1:] if stale == "one validation pair" else first_batch
    keys = {keys_of(pair)[0] for pair in pairs}
    (cache,) = (tmp_path / "cache").iterdir()
    content = load_file(cache)
    content["logps"] += 20 * torch.tensor([key.numpy().tobytes() in keys
                                           for key in content["keys"]])
    save_file(content, cache)
    code, _, err = run_train(*flags, "--overwrite")
    assert code == 2 and "differ by up to 20" in err and f"delete {cache}" in err


def test_a_loss_scale_that_is_too_high_skips_steps_and_says_so(
        run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    """As under float16, which needs a GPU: here the scaled gradients leave float32's range."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=2.**127))
    flags = ["--data", write_rows(toy_rows[:64]), "--batch_size", 8, "--max_steps", 12]
    code, _, err = run_train(*flags)
    norms = [line["grad_norm"] for line in read_metrics(tmp_path / "out")[0]]
    skipped = norms.count(None)
    assert code == 0 and 0 < skipped < 12
    assert err.count("skipped: its gradients overflow float16 at a loss scale of") == skipped
    assert not same_weights(weights_of(TOY_STUDENT), weights_of(tmp_path / "out"))
    # A scale that cannot be lowered is not the cause.
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=1.0))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    code, _, err = run_train(*flags, "--overwrite")
    assert code == 2 and "step 1: loss" in err and "gradient norm inf" in err


@pytest.mark.parametrize("count", [1, 50, 2000])
def test_16_bit_noise_passes_and_a_wrong_answer_does_not(count):
    exact = torch.tensor([-300.0])
    check_equal("they", exact + 0.2 * count ** 0.5, exact, [count], torch.bfloat16, "")
    for dtype, wrong in ((torch.bfloat16, 1 + 0.5 * count), (torch.float32, 2e-3 + 2e-5 * count)):
        with pytest.raises(BadInput, match="they differ"):
            check_equal("they", exact + wrong, exact, [count], dtype, "")


def test_at_step_0_a_long_prompt_allows_no_more_noise():
    (pair,) = random_pairs(1)
    pair, args = dataclasses.replace(pair, prompt_ids=[1] * 900), args_for(dtype="bfloat16")

    def check(per_token):
        off = args.beta * per_token * torch.tensor([[len(ids)] for ids in pair.answers]).sqrt()
        check_step_0([pair], {"rewards/chosen": off[0], "rewards/rejected": off[1]}, args, "it")

    check(0.3)
    with pytest.raises(BadInput, match="policy and cached reference differ .*; delete it"):
        check(1)


def test_dsc_trains_on_accepted_revisions_only(toy_rows, write_rows, toy_tokenizer, capsys):
    path, eval_path = write_rows(toy_rows[:100]), write_rows(toy_rows[:100], "eval.jsonl")
    args = args_for(loss="dsc", data=[path], eval_data=[eval_path])
    train_pairs, val_pairs = train.load_train_val(args, toy_tokenizer)
    accepted = sum(row["score_chosen"] > row["score_rejected"] for row in toy_rows[:100])
    assert f"dsc: {accepted} of 100" in capsys.readouterr().out
    assert len(train_pairs) == accepted < 100 == len(val_pairs)
    assert all(pair.score_gap > 0 for pair in train_pairs)


# -------------------------------------------------------------- layout, memory and compilation


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2", "gemma3", "gpt2"])
def test_layout_is_shared_where_both_ways_agree(name, dtype, capsys):
    model = tiny_model(name).to(getattr(torch, dtype))
    assert train.choose_layout(model, random_pairs(12), [], args_for(dtype=dtype)) is True
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name, config, why", [
    ("Lfm2", dict(layer_types=["conv", "full_attention"], **GROUPED), "conv layers"),
    ("FalconH1", dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
                      mamba_chunk_size=16, head_dim=8, **GROUPED), "hybrid layers"),
    ("Qwen3_5", dict(layer_types=["linear_attention", "full_attention"], head_dim=8,
                     linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
                     linear_value_head_dim=8, **GROUPED), "linear_attention layers"),
    # Its last states are float32 all the same.
    ("Mamba", dict(hidden_size=32, num_hidden_layers=2, state_size=8), "linear_attention layers"),
    ("Rwkv", dict(hidden_size=32, num_hidden_layers=2), "its layers have states"),
    ("Falcon", dict(alibi=True, **SMALL), "its config has alibi"),
    ("Mpt", dict(d_model=32, n_layers=2, n_heads=4), "its config has alibi")])
def test_layout_is_one_answer_a_row_though_16_bits_hide_what_neighbours_do(
        name, config, why, monkeypatch, capsys):
    monkeypatch.setitem(ARCHITECTURES, name, build(name, **config))
    model = tiny_model(name)
    for weight in model.parameters():
        weight.data = (weight / 4).bfloat16()
    pairs, args = random_pairs(12), args_for(dtype="bfloat16")
    assert train.choose_layout(model, pairs, [], args) is False
    assert f"cannot read several in one ({why})" in capsys.readouterr().out


def test_attention_that_padding_changes_in_long_rows_is_refused(monkeypatch):
    """DeepSeek-V3.2's, beyond index_topk tokens; the rows tried with plain logits are shorter."""
    monkeypatch.setitem(ARCHITECTURES, "dsa", build(
        "DeepseekV32", **SMALL, num_key_value_heads=4, moe_intermediate_size=16, n_group=1,
        topk_group=1, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=2,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        index_topk=16, index_head_dim=16, index_n_heads=2))
    model, args = tiny_model("dsa"), args_for(tokens_per_batch=30)
    short = [pair for pair in random_pairs(60) if longest_row(pair) <= 15]
    long = [dataclasses.replace(short[0], prompt_ids=[7] * 20, chosen_ids=[*range(9, 40)])]
    assert train.choose_layout(model, short, [], args) is False  # separate rows are right
    with pytest.raises(BadInput, match="with and without padding differ.*; lower --max_length"):
        train.choose_layout(model, short + long, [], args)


@pytest.mark.parametrize("name, config", [
    ("Mamba", dict(hidden_size=32, num_hidden_layers=2, state_size=8)),  # recurrent
    ("Bloom", dict(hidden_size=32, n_layer=2, n_head=4)),  # makes its own masks
    ("GPTNeo", dict(hidden_size=32, num_layers=2, num_heads=4, window_size=8,  # an unusual window
                    attention_types=[[["global", "local"], 1]]))])
def test_layout_is_one_answer_a_row_where_they_do_not(name, config, monkeypatch, capsys):
    monkeypatch.setitem(ARCHITECTURES, name, build(name, bos_token_id=0, eos_token_id=1, **config))
    assert train.choose_layout(tiny_model(name), random_pairs(12), [], args_for()) is False
    assert "layout: one answer per row" in capsys.readouterr().out


def test_layout_is_one_answer_a_row_whatever_the_trial_raises(monkeypatch, capsys):
    forward = LlamaModel.forward

    def raises(*args, attention_mask=None, **kwargs):
        return attention_mask.no_such_name if attention_mask is not None else forward(
            *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", raises)
    assert train.choose_layout(tiny_model(), random_pairs(12), [], args_for()) is False
    assert "'Tensor' object has no attribute 'no_such_name'" in capsys.readouterr().out


@pytest.mark.parametrize("chunk", [8, 1000])
def test_llama_4_whose_class_names_another_models_decoder(
        run_train, write_rows, tmp_path, toy_rows, toy_tokenizer, monkeypatch, chunk):
    """Its attention sees chunks of columns: a row that packs pairs may be longer than one."""
    monkeypatch.setitem(ARCHITECTURES, "llama4", build(
        "Llama4", **GROUPED, head_dim=8, num_local_experts=2, intermediate_size_mlp=48,
        attention_chunk_size=chunk))
    tiny_model("llama4", len(toy_tokenizer)).save_pretrained(tmp_path / "model")
    toy_tokenizer.save_pretrained(tmp_path / "model")
    code, out, err = run_train("--data", write_rows(toy_rows[:30]), "--max_steps", 1, "--model",
                               tmp_path / "model")
    assert code == 0, err
    assert "one answer per row" in out and "its config has attention_chunk_size" in out


def test_layout_is_tried_on_the_longest_pair_that_a_batch_holds(monkeypatch):
    pairs, tried = random_pairs(12), []

    def record(batch, share_prefix=False, rows=None):
        tried.append(batch[0])
        return collate(batch, share_prefix, rows)

    monkeypatch.setattr(train, "collate", record)
    for bound in (10**6, 60, 1):
        train.choose_layout(tiny_model(), pairs, [], args_for(tokens_per_batch=bound))
    lengths = [longest_row(pair) for pair in pairs]
    fitting = max(length for length in lengths if length <= 30)
    firsts = [longest_row(pair) for pair in tried]
    # Every result is computed once: apart, with padding, without, the full batch; three in a row.
    assert len(firsts) == 3 * 7 and firsts[::7] == [max(lengths), fitting, min(lengths)]
    assert firsts[5::7] == 3 * [max(lengths)]  # the longest of all too, whether it fits or not


@pytest.mark.parametrize("columns", [None, 8])
def test_an_architecture_that_differs_on_long_rows_only(monkeypatch, capsys, tmp_path, columns):
    """A window of columns: right where the rows are short, which is all that a batch can hold.

    columns=None: control, an ordinary model keeps the shared layout on the same rows.
    """
    short, long = random_pairs(40), []
    short = [pair for pair in short if batch_tokens(pair, True) <= 24][:4]
    for pair in random_pairs(4, seed=1):
        long.append(dataclasses.replace(pair, where=f"long {pair.where}",
                                        prompt_ids=pair.prompt_ids * 9))
    model = tiny_model()
    monkeypatch.setattr(rdpo, "attention_mask", windowed(columns, rdpo.attention_mask))
    args = args_for(tokens_per_batch=60)
    shared = train.choose_layout(model, short + long, [], args)
    assert shared == (columns is None)
    data, _ = dataset_of(model, short + long, args, tmp_path, shared)
    plain = rdpo.plain_sequence_logps(model, short + long).view(2, -1)
    assert torch.allclose(data.ref_chosen_logps, plain[0], atol=1e-3)
    assert torch.allclose(data.ref_rejected_logps, plain[1], atol=1e-3)


def windowed(columns, attention_mask):
    """attention_mask, but beyond 60 columns a token sees only so many of them."""
    def mask_of(model, batch):
        mask = attention_mask(model, batch)
        width = mask.shape[-1]
        if columns and width > 60:
            far = torch.arange(width)[:, None] - torch.arange(width) >= columns
            mask = mask.masked_fill(far, torch.finfo(mask.dtype).min)
        return mask

    return mask_of


@pytest.mark.parametrize("name, rope, message", [
    ("Phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4},
     r"rope \(longrope\) depends on the batch beyond 24; --max_length 24"),
    ("Llama", {"rope_type": "dynamic", "factor": 4.0}, "the model takes 24; --max_length 24")])
def test_rope_that_depends_on_the_batch_is_refused_beyond_its_limit(
        monkeypatch, name, rope, message):
    limit = {"original_max_position_embeddings": 24} if name == "Phi3" else {
        "max_position_embeddings": 24}
    monkeypatch.setitem(ARCHITECTURES, "rope", build(
        name, **GROUPED | limit, rope_parameters=rope | {"rope_theta": 10000.0}))
    model, pairs = tiny_model("rope"), random_pairs(40)
    within = [pair for pair in pairs if longest_row(pair) <= 24]
    beyond = [pair for pair in pairs if longest_row(pair) > 24]
    assert train.choose_layout(model, within, [], args_for())
    with pytest.raises(BadInput, match=message):
        train.choose_layout(model, within + beyond[:1], [], args_for())
    # The trap is there: a neighbour changes a pair's log-probability.
    alone, beside = (rdpo.sequence_logps(model, collate(group))[0]
                     for group in (within[:1], within[:1] + beyond[:1]))
    assert (alone - beside).abs() > 1e-3


def test_gradient_checkpointing_changes_no_result(
        run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    path, calls = write_rows(toy_rows[:60]), []
    forward = LlamaDecoderLayer.forward

    def counted(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    for name, flags in (("plain", []), ("checkpointed", ["--gradient_checkpointing"])):
        result = run_train("--data", path, "--max_steps", 2, "--out_dir", tmp_path / name, *flags)
        assert result[0] == 0
        calls.append(None)
    split = calls.index(None)
    # Each layer runs twice in steps that learn.
    assert sum(map(bool, calls[split:])) == 2 * sum(map(bool, calls[:split])) > 0
    plain, other = (read_metrics(tmp_path / name)[0] for name in ("plain", "checkpointed"))
    for one, two in zip(plain, other):
        assert all(one[name] == pytest.approx(two[name], abs=1e-6)
                   for name in ("loss", "grad_norm", "logps/chosen"))
    assert same_weights(weights_of(tmp_path / "plain"), weights_of(tmp_path / "checkpointed"))


def test_a_saved_student_goes_to_the_gpu_only_if_it_leaves_room(monkeypatch):
    model = tiny_model()
    size = sum(weight.nbytes for weight in model.parameters())
    for free, fits in ((1.2 * size, False), (1.5 * size, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 0))
        assert models.fits(model, "cuda") == fits
    assert models.fits(model, "cpu")


def test_the_default_tokens_per_batch_knows_every_architecture_and_wide_layers(monkeypatch):
    def tokens(model, free):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 0))
        return models.tokens_that_fit(model, False)

    for name in ARCHITECTURES:
        assert tokens(tiny_model(name), 0) == 1024 and tokens(tiny_model(name), 2**40) == 8192
    narrow, wide = (build("Llama", **GROUPED | {"intermediate_size": size})(97)
                    for size in (128, 1024))
    free = 1_140_000_000  # 1 GB and a tenth are set aside
    assert 8192 > tokens(narrow, free) > tokens(wide, free) >= 1024


def test_checkpointing_saves_no_state_of_random_numbers(monkeypatch):
    """Nothing draws any; on a GPU each save would wait."""
    model, calls = tiny_model(), []
    monkeypatch.setattr(torch, "get_rng_state", lambda: calls.append(1))
    models.checkpoint_layers(model)
    model(input_ids=torch.arange(5)[None]).logits.sum().backward()
    assert not calls and model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_a_line_says_that_the_limit_of_graphs_was_met(monkeypatch):
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["unimplemented"]
    counters.clear()
    assert compile_note() == ""
    torch._dynamo.config.recompile_limit = 2
    function = torch.compile(lambda x, n: x * n, backend="eager", dynamic=False)
    for number in range(4):
        function(torch.ones(2), number)
    torch._dynamo.config.recompile_limit = limit
    assert "met the limit of graphs" in compile_note()
    counters.clear()


def test_compile_changes_no_result_and_is_bounded(
        run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    """With dynamo's own backend: tests what is traced, not the compiler, which takes minutes."""
    compile_function, graphs = torch.compile, []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(compile_function, backend=backend))
    path = write_rows(toy_rows[:100])
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        assert run_train("--data", path, "--max_steps", 6, "--tokens_per_batch", 500,
                         "--out_dir", tmp_path / name, *flags)[0] == 0
    assert 0 < len(graphs) <= 4  # with and without gradients, one row and several
    plain, compiled = (read_metrics(tmp_path / name)[0] for name in ("plain", "compiled"))
    for one, other in zip(plain, compiled):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert (weights_of(tmp_path / "plain").keys() == weights_of(tmp_path / "compiled").keys()
            == weights_of(TOY_STUDENT).keys())


def test_warns_when_all_scores_tie_and_when_many_rows_are_dropped(
        toy_rows, write_rows, toy_tokenizer, capsys):
    rows = [row | {"score_chosen": 3, "score_rejected": 3} for row in toy_rows[:40]]
    rows[:10] = [row | {"chosen": row["rejected"]} for row in rows[:10]]
    train.load_train_val(args_for(data=[write_rows(rows)]), toy_tokenizer)
    err = capsys.readouterr().err
    assert "all scores tie" in err and "10 of 40 rows were left out" in err
    train.load_train_val(args_for(data=[write_rows(toy_rows[:40])]), toy_tokenizer)
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------- never lose work


def command(data_path, out_dir, tmp_path, *more):
    flags = ["--data", data_path, "--out_dir", out_dir, "--ref_cache_dir", tmp_path / "cache",
             "--epochs", 3, "--batch_size", 8, "--save_every", 4, "--eval_every", 7,
             "--max_new_tokens", 2, *more]
    return [sys.executable, "train.py", *map(str, flags)]


def wait_for_step(folder, step, process):
    path, deadline = os.path.join(folder, "metrics.jsonl"), time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                if f'"step": {step},' in file.read():
                    return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was never logged: {process.stderr.read()}")


def without_clock(folder):
    return [{name: value for name, value in line.items()
             if name not in ("step_seconds", "peak_memory_mib")}
            for line in read_lines(os.path.join(folder, "metrics.jsonl"))]


@pytest.mark.slow
def test_killed_and_resumed_equals_never_killed_to_the_bit(tmp_path, toy_rows, write_rows):
    path, quiet = write_rows(toy_rows[:150]), dict(cwd=ROOT, stderr=subprocess.PIPE, text=True)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run(command(path, straight, tmp_path), cwd=ROOT, check=True, capture_output=True)
    steps = len(read_metrics(straight)[0])
    step = random.randint(5, steps - 5)
    process = subprocess.Popen(command(path, killed, tmp_path), stdout=subprocess.DEVNULL, **quiet)
    wait_for_step(killed, step, process)
    process.kill()
    process.wait()
    assert not (killed / "model.safetensors").exists()
    done = subprocess.run(command(path, killed, tmp_path, "--resume"), stdout=subprocess.PIPE,
                          **quiet)
    assert done.returncode == 0, done.stderr
    assert "from step" in done.stdout
    assert same_weights(weights_of(straight), weights_of(killed)), f"killed after step {step}"
    last = f"state/step-{steps:08d}"
    assert same_weights(weights_of(straight / last), weights_of(killed / last))
    assert without_clock(straight) == without_clock(killed)
    # Control: training changes weights.
    assert not same_weights(weights_of(straight), weights_of(TOY_STUDENT))


class Died(Exception):
    """Stands for a kill in tests that resume within this process."""


def run_until(run_train, monkeypatch, last_step, *flags):
    """Run train.py and let it die in a step (the first is 1), just before its update."""
    learning_rate = train.learning_rate

    def dies(step, *arguments):
        if step + 1 == last_step:
            raise Died
        return learning_rate(step, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(train, "learning_rate", dies)
        run_train(*flags)


@pytest.mark.parametrize("lora", [[], ["--lora_rank", 2]], ids=["full", "lora"])
def test_a_run_that_died_is_resumed_to_the_bit(
        run_train, tmp_path, toy_rows, write_rows, monkeypatch, lora):
    flags = ["--data", write_rows(toy_rows[:60]), "--max_steps", 5, "--save_every", 2,
             "--eval_every", 5, *lora]
    assert run_train(*flags, "--out_dir", tmp_path / "straight")[0] == 0
    run_until(run_train, monkeypatch, 4, *flags)
    code, out, _ = run_train(*flags, "--resume")
    assert code == 0 and "from step 2" in out
    assert without_clock(tmp_path / "out") == without_clock(tmp_path / "straight")
    assert same_weights(weights_of(tmp_path / "out"), weights_of(tmp_path / "straight"))
    steps, _ = read_metrics(tmp_path / "out")
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert steps[1]["loss"] != steps[0]["loss"]


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits(tmp_path, toy_rows, write_rows, number, code):
    path, out = write_rows(toy_rows[:150]), tmp_path / "out"
    process = subprocess.Popen(command(path, out, tmp_path, "--save_every", 1000), cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(out, 6, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == code and stderr == ""
    step = int(os.listdir(out / "state")[0].removeprefix("step-"))
    assert step >= 6 and f"stopped after step {step}" in stdout and "--resume" in stdout


def test_a_signal_within_the_loop_saves_and_a_second_one_ends(
        run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    """In this process: the second SIGINT is Python's own again, unless several ranks run."""
    learning_rate, handlers = train.learning_rate, []

    def interrupted(step, *others):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
            handlers.append(signal.getsignal(signal.SIGINT))
        return learning_rate(step, *others)

    monkeypatch.setattr(train, "learning_rate", interrupted)
    flags = ["--data", write_rows(toy_rows[:60]), "--max_steps", 5]
    code, out, err = run_train(*flags)
    assert code == 130 and "stopped after step 3, saved" in out and err == ""
    assert os.listdir(tmp_path / "out" / "state") == ["step-00000003"]
    assert handlers == [signal.SIG_DFL]
    monkeypatch.setattr(train.ranks, "world_size", lambda: 2)
    stop = train.checkpoint.StopSignal()
    signal.raise_signal(signal.SIGTERM)
    assert stop.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == stop.receive


def test_resume_needs_the_same_flags_and_rows(run_train, tmp_path, toy_rows, write_rows):
    path, out = write_rows(toy_rows[:60]), tmp_path / "out"
    assert run_train("--data", path, "--max_steps", 2)[0] == 0
    code, _, err = run_train("--data", path, "--max_steps", 2, "--beta", 0.3, "--resume")
    assert code == 2 and "--beta is 0.3" in err and "0.1" in err
    write_rows(toy_rows[:50])
    code, _, err = run_train("--data", path, "--max_steps", 2, "--resume")
    assert code == 2 and "other rows" in err
    write_rows(toy_rows[:60])
    before = weights_of(out)
    # A finished run ends as it did. A flag that an older version did not know takes its default.
    args = json.loads((out / "args.json").read_text())
    del args["sft_weight"]
    (out / "args.json").write_text(json.dumps(args | {"lora_dropout": 0.0}))
    assert run_train("--data", path, "--max_steps", 2, "--resume")[0] == 0
    assert same_weights(before, weights_of(out))


def test_resume_refuses_a_student_whose_weights_have_changed(
        run_train, tmp_path, toy_rows, write_rows):
    shutil.copytree(TOY_STUDENT, tmp_path / "student")
    flags = ["--data", write_rows(toy_rows[:32]), "--model", tmp_path / "student",
             "--max_steps", 2, "--lora_rank", 2]
    assert run_train(*flags)[0] == 0
    assert run_train(*flags, "--resume")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    model.save_pretrained(tmp_path / "student")
    code, _, err = run_train(*flags, "--resume")
    assert code == 2 and "weights of --model" in err


def test_a_run_killed_before_its_first_state_begins_again(
        run_train, tmp_path, toy_rows, write_rows):
    path = write_rows(toy_rows[:60])
    run_train("--data", path, "--max_steps", 2)
    before = without_clock(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "state")
    with open(tmp_path / "out" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')  # killed in the middle of a line
    assert run_train("--data", path, "--max_steps", 2, "--resume")[0] == 0
    assert without_clock(tmp_path / "out") == before


def test_a_half_written_state_is_not_used(run_train, tmp_path, toy_rows, write_rows):
    path = write_rows(toy_rows[:60])
    run_train("--data", path, "--max_steps", 2)
    (tmp_path / "out" / "state" / "step-00000009.tmp").mkdir()
    code, out, _ = run_train("--data", path, "--max_steps", 2, "--resume")
    assert code == 0 and "from step 2" in out


# ----------------------------------------------------------------- what a person is told at the end


def test_each_file_of_eval_data_has_its_own_line_and_is_logged(
        run_train, toy_rows, write_rows, tmp_path):
    """Alone, a file has the same numbers. Two files of one name are told apart by their folders."""
    (tmp_path / "more").mkdir()
    paths = write_rows(toy_rows[60:70], "a.jsonl"), write_rows(toy_rows[70:85], "b.jsonl")
    same_name = write_rows(toy_rows[70:85], "more/a.jsonl")
    flags = ("--data", write_rows(toy_rows[:60]), "--max_steps", 2)
    code, out, err = run_train(*flags, "--eval_data", *paths)
    assert code == 0, err
    _, evaluations = read_metrics(tmp_path / "out")
    last = evaluations[-1]
    assert last["eval/loss"] == pytest.approx(
        (10 * last["eval/a.jsonl/loss"] + 15 * last["eval/b.jsonl/loss"]) / 25, abs=1e-6)
    assert f"a.jsonl        |           {last['eval/a.jsonl/loss']:.4f}" in out
    code, out, err = run_train(*flags, "--eval_data", paths[1], "--out_dir", tmp_path / "alone")
    assert code == 0, err
    _, alone = read_metrics(tmp_path / "alone")
    for name in ("loss", "rewards/margins", "logps/chosen", "rewards/accuracies"):
        assert last[f"eval/b.jsonl/{name}"] == pytest.approx(alone[-1][f"eval/{name}"], abs=1e-5)
    code, out, err = run_train(*flags, "--eval_data", paths[0], same_name, "--overwrite")
    assert code == 0, err
    _, evaluations = read_metrics(tmp_path / "out")
    assert {f"eval/{path}/loss" for path in (paths[0], same_name)} <= evaluations[-1].keys()


def test_the_toys_own_folder_is_the_toy(run_train, toy_rows, write_rows, tmp_path):
    flags = ("--data", write_rows(toy_rows[:40]), "--max_steps", 1)
    assert run_train(*flags)[0] == 0
    code, out, _ = run_train(*flags, "--model", os.path.relpath(TOY_STUDENT, os.getcwd()),
                             "--out_dir", tmp_path / "named")
    assert code == 0 and "learning rate 0.0003" in out and "right answers" in out
    assert same_weights(weights_of(tmp_path / "out"), weights_of(tmp_path / "named"))


def test_a_validation_loss_that_rose_is_said(run_train, toy_rows, write_rows):
    flags = ("--data", write_rows(toy_rows[:60]), "--max_steps", 3, "--eval_every", 1)
    code, _, err = run_train(*flags)
    assert code == 0 and err == ""
    code, _, err = run_train(*flags, "--learning_rate", 0.05, "--overwrite")
    assert code == 0
    assert re.search(r"warning: the validation loss was 0.6931 after step 0, and is \d", err), err
