"""train.py as a user runs it: what it computes, what it leaves behind, and that killed and resumed equals never killed."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ARCHITECTURES, ROOT, build, random_pairs, read_metrics, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import rdpo
import train
from data import TOY_STUDENT, collate, longest_row, split_by_tokens


def args_for(**changes):
    args = train.parse_args(["--data", "none"])
    vars(args).update(changes)
    return args


def rows_of(model, pairs, args, tmp_path, shared=False):
    autocast = lambda: torch.autocast("cpu", enabled=False)  # noqa: E731
    cache = rdpo.ReferenceCache(tmp_path, model, "float32")
    return train.with_reference(pairs, args, model, cache, autocast, shared), autocast


def weights_of(folder):
    return load_file(os.path.join(folder, "model.safetensors"))


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# ------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("loss", ["rdpo", "dpo", "sft"])
def test_any_micro_batch_split_gives_the_same_gradient(loss, shared, tmp_path):
    model, pairs, args = tiny_model(), random_pairs(12), args_for(loss=loss, sft_weight=0.3)
    (rows, _), autocast = rows_of(tiny_model(seed=1), pairs, args, tmp_path, shared)  # another model, so that margins are not 0
    tokens = sum(len(pair.chosen_ids) for pair in pairs)

    def gradient(batches, pair_count=12, token_count=tokens):
        model.zero_grad()
        for batch in batches:
            columns = train.forward(model, rows, batch, args, autocast)
            train.total_loss(columns, pair_count, token_count, args).backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    whole = gradient([list(range(12))])
    for bound in (1, 60, 100, 150, 300):
        assert torch.allclose(gradient(split_by_tokens(pairs, range(12), bound, shared)), whole, atol=1e-6)
    # Control: each micro-batch averaged over itself, the mistake of other trainers, is something else.
    uneven = [list(range(10)), [10, 11]]
    wrong = sum(gradient([batch], len(batch), sum(len(pairs[i].chosen_ids) for i in batch)) for batch in uneven) / 2
    assert not torch.allclose(wrong, whole, atol=1e-4)


def test_losses_are_what_they_say(tmp_path):
    model, pairs = tiny_model(), random_pairs(8)
    for changes in (dict(loss="rdpo", temperature=2.0), dict(loss="dpo"), dict(loss="dpo", label_smoothing=0.1), dict(loss="rdpo", sft_weight=0.5),
                    dict(loss="sft"), dict(loss="dsc")):
        args = args_for(**changes)
        (rows, _), autocast = rows_of(tiny_model(seed=1), pairs, args, tmp_path)
        with torch.no_grad():
            parts = [train.forward(model, rows, batch, args, autocast) for batch in ([0, 1, 2], [3, 4, 5, 6, 7])]
        loss = train.summary(parts, rows, list(range(8)), args)["loss"]
        expected, chosen_tokens, chosen_sum = 0.0, sum(len(pair.chosen_ids) for pair in pairs), 0.0
        for i, pair in enumerate(pairs):
            policy, reference = (rdpo.plain_sequence_logps(m, [pair]).tolist() for m in (model, tiny_model(seed=1)))
            margin = args.beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
            tau = (1 / (1 + math.exp(-(pair.score_chosen - pair.score_rejected) / args.temperature)) if args.loss == "rdpo"
                   else 1 - args.label_smoothing)
            expected += (tau * math.log1p(math.exp(-margin)) + (1 - tau) * math.log1p(math.exp(margin))) / 8
            chosen_sum += policy[0]
        if args.loss in ("sft", "dsc"):
            expected = -chosen_sum / chosen_tokens
        else:
            expected -= args.sft_weight * chosen_sum / chosen_tokens
        assert loss == pytest.approx(expected, abs=1e-4), changes


def test_second_run_computes_no_reference_and_a_changed_weight_computes_all(tmp_path):
    model, pairs, args = tiny_model(), random_pairs(10), args_for()
    (rows, computed), _ = rows_of(model, pairs, args, tmp_path)
    (again, computed_again), _ = rows_of(model, pairs, args_for(beta=0.5, loss="dpo"), tmp_path)
    (_, computed_more), _ = rows_of(model, pairs + random_pairs(3, seed=5), args, tmp_path)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    (_, computed_changed), _ = rows_of(model, pairs, args, tmp_path)
    assert (computed, computed_again, computed_more, computed_changed) == (10, 0, 3, 10)
    assert torch.equal(rows.ref_chosen_logps, again.ref_chosen_logps)


def test_cache_of_one_layout_is_valid_for_the_other(run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    path, steps = write_rows(toy_rows[:60]), {}
    for shared in (True, False):
        monkeypatch.setattr(train, "choose_layout", lambda *_, shared=shared: (shared, "chosen by the test"))
        code, out, _ = run_train("--data", path, "--max_steps", 2, "--out_dir", tmp_path / f"out-{shared}")
        assert code == 0 and (": 0 pairs computed" in out) != shared  # the step-0 gate has compared live and cached
        steps[shared] = read_metrics(tmp_path / f"out-{shared}")[0]
    for one, other in zip(steps[True], steps[False]):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5) and one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_reference_pass_that_is_stopped_keeps_what_it_computed(tmp_path, monkeypatch):
    model, pairs, args = tiny_model(), random_pairs(10), args_for(tokens_per_batch=100)
    calls = []

    def stopped(*call):
        calls.append(call)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rdpo.sequence_logps(*call)

    monkeypatch.setattr(train, "policy_logps", stopped)
    with pytest.raises(KeyboardInterrupt):
        rows_of(model, pairs, args, tmp_path)
    monkeypatch.undo()
    (_, computed), _ = rows_of(model, pairs, args, tmp_path)
    assert 0 < computed < 10


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("flags", [["--loss", "rdpo", "--beta", 0.5, "--temperature", 3], ["--loss", "dpo", "--beta", 2], ["--loss", "dpo", "--label_smoothing", 0.2]])
def test_loss_starts_at_ln_2(run_train, tmp_path, toy_rows, write_rows, flags):
    code, _, _ = run_train("--data", write_rows(toy_rows[:60]), "--max_steps", 1, *flags)
    steps, evaluations = read_metrics(tmp_path / "out")
    assert code == 0
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert evaluations[0]["step"] == 0 and evaluations[0]["eval/loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert evaluations[0]["eval/rewards/accuracies"] == 0.5


def test_overfits_8_pairs(run_train, tmp_path, toy_rows, write_rows):
    rows = [row for row in toy_rows if row["score_chosen"] > row["score_rejected"]][:8]
    path = write_rows(rows)
    code, _, _ = run_train("--data", path, "--eval_data", path, "--epochs", 30, "--learning_rate", 1e-3, "--temperature", 0.5)
    steps, evaluations = read_metrics(tmp_path / "out")
    assert code == 0
    assert steps[-1]["rewards/accuracies"] == 1.0 and evaluations[-1]["eval/rewards/accuracies"] == 1.0
    assert steps[-1]["loss"] < 0.2


def test_overfitting_control_inverted_scores_turn_the_ranking_round(run_train, tmp_path, toy_rows, write_rows):
    rows = [row | {"score_chosen": row["score_rejected"], "score_rejected": row["score_chosen"]}
            for row in toy_rows if row["score_chosen"] > row["score_rejected"]][:8]
    path = write_rows(rows)
    run_train("--data", path, "--eval_data", path, "--epochs", 30, "--learning_rate", 1e-3, "--temperature", 0.5)
    steps, _ = read_metrics(tmp_path / "out")
    assert steps[-1]["rewards/accuracies"] == 0.0 and steps[-1]["rewards/score_agreement"] == 1.0


def test_what_a_run_leaves_behind(run_train, tmp_path, toy_rows, write_rows):
    code, out, err = run_train("--data", write_rows(toy_rows[:100]), "--epochs", 2)
    assert code == 0 and "Traceback" not in err
    folder = tmp_path / "out"
    names = set(os.listdir(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "args.json", "curves.png", "state"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    model, base = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(TOY_STUDENT)
    assert model.dtype == base.dtype and AutoTokenizer.from_pretrained(folder).chat_template
    assert not torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    steps, evaluations = read_metrics(folder)
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1)) and evaluations[-1]["step"] == len(steps)
    for name in ("epoch", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
                 "logps/rejected", "grad_norm", "lr", "tau/mean", "step_seconds", "tokens", "peak_memory_mib"):
        assert all(math.isfinite(line[name]) for line in steps), name
    changed = float(out.split("weights changed: ")[1].split(" %")[0])
    assert 1 < changed <= 100
    assert out.count("student:  ") == 3 and "reference  student" in out


def test_a_learning_rate_of_0_changes_no_weight(run_train, toy_rows, write_rows):
    _, out, _ = run_train("--data", write_rows(toy_rows[:40]), "--max_steps", 2, "--learning_rate", 0)
    assert "weights changed: 0.0 %" in out


def test_steps_follow_the_files_rows_once_an_epoch(run_train, tmp_path, toy_rows, write_rows):
    """100 pairs in batches of 16: the last batch of an epoch is short, and its tokens say that no pair is lost or repeated."""
    path = write_rows(toy_rows[:100])
    run_train("--data", path, "--eval_data", path, "--epochs", 2)
    steps, _ = read_metrics(tmp_path / "out")
    assert len(steps) == 14
    assert sum(line["tokens"] for line in steps[:7]) == sum(line["tokens"] for line in steps[7:])


def test_the_learning_rate_rises_and_falls(run_train, tmp_path, toy_rows, write_rows):
    run_train("--data", write_rows(toy_rows[:100]), "--max_steps", 20)
    rates = [line["lr"] for line in read_metrics(tmp_path / "out")[0]]
    assert rates[0] < rates[1] < rates[2] == max(rates) and rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 1e-5


def test_step_0_gate_stops_a_stale_cache(run_train, tmp_path, toy_rows, write_rows):
    path = write_rows(toy_rows[:60])
    run_train("--data", path, "--max_steps", 1)
    cache = next((tmp_path / "cache").iterdir())
    content = load_file(cache)
    content["logps"] += 0.5
    rdpo.save_file(content, cache)
    code, _, err = run_train("--data", path, "--max_steps", 1, "--overwrite")
    assert code == 2 and "step 0" in err and str(cache) in err and err.count("\n") == 1


def test_a_loss_scale_that_is_too_high_leaves_steps_out_and_says_so(run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    """As under float16, which needs a GPU: here the scaled gradients leave float32's range."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=2.0 ** 127))
    flags = ["--data", write_rows(toy_rows[:64]), "--batch_size", 8, "--max_new_tokens", 2, "--max_steps", 12]
    code, _, err = run_train(*flags)
    norms = [line["grad_norm"] for line in read_metrics(tmp_path / "out")[0]]
    left_out = norms.count(None)
    assert code == 0 and 0 < left_out < 12 and err.count("left out: its gradients are beyond float16 at a loss scale of") == left_out
    assert not same_weights(weights_of(TOY_STUDENT), weights_of(tmp_path / "out"))
    # A scale that cannot go lower is not what is wrong.
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: scaler("cpu", init_scale=1.0))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    code, _, err = run_train(*flags, "--overwrite")
    assert code == 2 and "step 1: loss" in err and "gradient norm inf" in err


@pytest.mark.parametrize("count", [1, 50, 2000])
def test_16_bit_noise_passes_and_a_wrong_answer_does_not(count):
    exact = torch.tensor([-300.0])
    train.check_equal("they", exact + 0.2 * count ** 0.5, exact, [count], torch.bfloat16, "")
    for dtype, wrong in ((torch.bfloat16, 1 + 0.5 * count), (torch.float32, 2e-3 + 2e-5 * count)):
        with pytest.raises(train.BadInput, match="they differ"):
            train.check_equal("they", exact + wrong, exact, [count], dtype, "")


def test_dsc_trains_on_accepted_revisions_only(run_train, tmp_path, toy_rows, write_rows):
    rows = toy_rows[:100]
    _, out, _ = run_train("--data", write_rows(rows), "--eval_data", write_rows(rows, "eval.jsonl"), "--loss", "dsc", "--max_steps", 1)
    accepted = sum(row["score_chosen"] > row["score_rejected"] for row in rows)
    assert f"dsc: {accepted} of 100" in out and f"{accepted} pairs to train on, 100 held out" in out


# ---------------------------------------------------------------------------------- layout, memory and compilation


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2", "gpt2"])
def test_layout_is_shared_where_both_ways_agree(name):
    shared, why = train.choose_layout(tiny_model(name), random_pairs(12), args_for(), torch.float32, torch.no_grad)
    assert shared and "differ from those of separate rows by" in why


@pytest.mark.parametrize("name, config", [("Mamba", dict(hidden_size=32, num_hidden_layers=2, state_size=8)),
                                          ("Bloom", dict(hidden_size=32, n_layer=2, n_head=4)),
                                          ("GPTNeo", dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=8))])
def test_layout_is_one_answer_a_row_where_they_do_not(name, config, monkeypatch):
    """A recurrent model, one that makes its own masks, one whose windows are not in its config's usual place."""
    monkeypatch.setitem(ARCHITECTURES, name, build(name, bos_token_id=0, eos_token_id=1, **config))
    shared, why = train.choose_layout(tiny_model(name), random_pairs(12), args_for(), torch.float32, torch.no_grad)
    assert not shared and "this model cannot read a prompt once for both" in why


def test_layout_is_tried_on_the_longest_pair_that_a_batch_holds(monkeypatch):
    pairs, tried = random_pairs(12), []
    monkeypatch.setattr(train, "collate", lambda some, shared=False: tried.append(some[0]) or collate(some, shared))
    for bound in (10**6, 60, 1):
        train.choose_layout(tiny_model(), pairs, args_for(tokens_per_batch=bound), torch.float32, torch.no_grad)
    lengths = [longest_row(pair) for pair in pairs]
    assert [longest_row(pair) for pair in tried[::2]] == [max(lengths), max(length for length in lengths if length <= 30), min(lengths)]


def test_gradient_checkpointing_changes_no_result(run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    path, calls = write_rows(toy_rows[:60]), []
    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda *args, **kwargs: calls.append(torch.is_grad_enabled()) or forward(*args, **kwargs))
    for name, flags in (("plain", []), ("checkpointed", ["--gradient_checkpointing"])):
        assert run_train("--data", path, "--max_steps", 2, "--out_dir", tmp_path / name, *flags)[0] == 0
        calls.append(None)
    split = calls.index(None)
    assert sum(map(bool, calls[split:])) == 2 * sum(map(bool, calls[:split])) > 0  # each layer twice, in steps that learn
    for one, other in zip(read_metrics(tmp_path / "plain")[0], read_metrics(tmp_path / "checkpointed")[0]):
        assert all(one[name] == pytest.approx(other[name], abs=1e-6) for name in ("loss", "grad_norm", "logps/chosen"))
    assert same_weights(weights_of(tmp_path / "plain"), weights_of(tmp_path / "checkpointed"))


def test_compile_changes_no_result_and_is_bounded(run_train, tmp_path, toy_rows, write_rows, monkeypatch):
    """With dynamo's own backend: what is traced is tested, not the compiler behind it, which takes minutes."""
    compile_module, graphs = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, dynamic: compile_module(
        self, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph.forward))
    path = write_rows(toy_rows[:100])
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        assert run_train("--data", path, "--max_steps", 6, "--tokens_per_batch", 500, "--out_dir", tmp_path / name, *flags)[0] == 0
    assert 0 < len(graphs) <= 4  # with and without gradients, one row and several
    for one, other in zip(read_metrics(tmp_path / "plain")[0], read_metrics(tmp_path / "compiled")[0]):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
    assert weights_of(tmp_path / "plain").keys() == weights_of(tmp_path / "compiled").keys()


# -------------------------------------------------------------------------------------------------------- warnings


def test_warns_when_all_scores_tie_and_when_many_rows_are_dropped(run_train, toy_rows, write_rows):
    rows = [row | {"score_chosen": 3, "score_rejected": 3} for row in toy_rows[:40]]
    rows[:10] = [row | {"chosen": row["rejected"]} for row in rows[:10]]
    code, _, err = run_train("--data", write_rows(rows), "--max_steps", 1)
    assert code == 0 and "every pair's scores tie" in err and "10 of 40 rows were left out" in err
    _, _, err = run_train("--data", write_rows(toy_rows[:40]), "--max_steps", 1, "--overwrite")
    assert "warning" not in err


def test_warns_when_the_chosen_answers_grow_ever_less_likely(run_train, toy_rows, write_rows):
    """Unlearning: chosen answers that the student likes to write, paired with answers it likes even more."""
    rows = [row | {"chosen": row["rejected"] + " x", "score_chosen": 0, "score_rejected": 5} for row in toy_rows[:64]]
    path = write_rows(rows)
    _, _, err = run_train("--data", path, "--eval_data", path, "--max_steps", 10, "--eval_every", 1)
    assert "the chosen answers grow ever less likely" in err


# ------------------------------------------------------------------------------------------------ never lose work


def command(data_path, out_dir, tmp_path, *more):
    return [sys.executable, "train.py", "--data", data_path, "--out_dir", str(out_dir), "--cache_dir", str(tmp_path / "cache"),
            "--epochs", "3", "--batch_size", "8", "--save_every", "4", "--eval_every", "7", *more]


def wait_for_step(folder, step, process):
    path, deadline = os.path.join(folder, "metrics.jsonl"), time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if os.path.exists(path) and f'"step": {step},' in open(path, encoding="utf-8").read():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was never logged: {process.stderr.read()}")


def without_clock(folder):
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl", encoding="utf-8")]
    return [{name: value for name, value in line.items() if name not in ("step_seconds", "peak_memory_mib")} for line in lines]


def test_killed_and_resumed_equals_never_killed_to_the_bit(tmp_path, toy_rows, write_rows):
    path = write_rows(toy_rows[:150])
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    subprocess.run(command(path, straight, tmp_path), cwd=ROOT, check=True, capture_output=True)
    steps = len(read_metrics(straight)[0])
    step = random.randint(5, steps - 5)
    process = subprocess.Popen(command(path, killed, tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_step(killed, step, process)
    process.kill()
    process.wait()
    assert not (killed / "model.safetensors").exists()
    done = subprocess.run(command(path, killed, tmp_path, "--resume"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "from step" in done.stdout
    assert same_weights(weights_of(straight), weights_of(killed)), f"killed after step {step}"
    last = f"state/step-{steps:08d}"
    assert same_weights(weights_of(straight / last), weights_of(killed / last))
    assert without_clock(straight) == without_clock(killed)
    # Control: one more optimizer step would show.
    assert not same_weights(weights_of(straight), load_file(os.path.join(TOY_STUDENT, "model.safetensors")))


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits(tmp_path, toy_rows, write_rows, number, code):
    path, out = write_rows(toy_rows[:150]), tmp_path / "out"
    process = subprocess.Popen(command(path, out, tmp_path, "--save_every", "1000"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(out, 6, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == code and stderr == ""
    step = int(os.listdir(out / "state")[0].removeprefix("step-"))
    assert step >= 6 and f"stopped after step {step}" in stdout and "--resume" in stdout


def test_resume_needs_the_same_flags_and_rows(run_train, tmp_path, toy_rows, write_rows):
    path = write_rows(toy_rows[:60])
    assert run_train("--data", path, "--max_steps", 2)[0] == 0
    code, _, err = run_train("--data", path, "--max_steps", 2, "--beta", 0.3, "--resume")
    assert code == 2 and "--beta is 0.3" in err and "0.1" in err
    write_rows(toy_rows[:50])
    code, _, err = run_train("--data", path, "--max_steps", 2, "--resume")
    assert code == 2 and "other rows" in err
    write_rows(toy_rows[:60])
    before = weights_of(tmp_path / "out")
    assert run_train("--data", path, "--max_steps", 2, "--resume")[0] == 0  # a finished run ends as it did
    assert same_weights(before, weights_of(tmp_path / "out"))


def test_resume_refuses_a_student_whose_weights_have_changed(run_train, tmp_path, toy_rows, write_rows):
    shutil.copytree(TOY_STUDENT, tmp_path / "student")
    flags = ["--data", write_rows(toy_rows[:32]), "--model", tmp_path / "student", "--max_steps", 2, "--max_new_tokens", 2, "--lora_rank", 2]
    assert run_train(*flags)[0] == 0
    assert run_train(*flags, "--resume")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    model.save_pretrained(tmp_path / "student")
    code, _, err = run_train(*flags, "--resume")
    assert code == 2 and "weights of --model" in err


def test_a_run_killed_before_its_first_state_begins_again(run_train, tmp_path, toy_rows, write_rows):
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
    assert run_train("--data", path, "--max_steps", 2, "--resume")[0] == 0
