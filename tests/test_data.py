"""Rows, chat templates, truncation and batches."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, random_pairs

import data
from data import BadInput, Pair, Report, canonical, check_pair, encode_pair, epoch_order, load_pairs, read_rows, split_held_out, stream_rows, truncate

ROW = {"prompt": "Tell me about tea.", "chosen": "Tea is a drink.", "rejected": "No.", "score_chosen": 4, "score_rejected": 1.5}

# Chat templates of the kinds in common use: what they write behind a finished answer differs.
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TRIMMING = ("<s>{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}")
CLOSING = CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add")
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
THINKING = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}")
NO_SYSTEM = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% endfor %}" + CHATML


@pytest.fixture(scope="module")
def tokenizer():
    """A small byte-level tokenizer with ChatML's control tokens and a pad id that equals its eos id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator(["tell me about tea and tea is a drink\n\n"] * 20, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    core.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", pad_token="<|im_end|>")


def encode(tokenizer, row, template=CHATML, max_length=1024):
    tokenizer.chat_template = template
    return encode_pair(canonical(row), "rows.jsonl:1", tokenizer, max_length, True, Report())


# ----------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("theirs", [
    {"response_revised": "good", "response": "bad", "score_response_revised": 5, "score_response": 1},
    {"response_revised": "good", "response_persona": "bad", "score_revised": 5, "score_persona": 1},
    {"summary_after": "good", "summary_pre": "bad", "scores_after": 5, "scores_pre": 1},
    {"chosen": "good", "rejected": "bad", "metadata": {"score_chosen": 5, "score_rejected": 1}},
    {"chosen_response": "good", "rejected_response": "bad", "chosen_rating": 5, "rejected_rating": 1},
    {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
     "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}], "chosen-rating": 5, "rejected-rating": 1},
    {"chosen": [{"role": "assistant", "content": "good"}], "rejected": [{"role": "assistant", "content": "bad"}],
     "score_chosen": 5, "score_rejected": 1},
])
def test_aliases(theirs):
    row = canonical({"prompt": "q", "more": [1]} | theirs)
    assert check_pair(row, "x:1", True) == ("q", "good", "bad", 5.0, 1.0)
    assert row["more"] == [1] and theirs.items() <= (row | theirs).items()


def test_prompt_inside_both_answers():
    before = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    row = canonical({"chosen": before + [{"role": "assistant", "content": "good"}], "rejected": before + [{"role": "assistant", "content": "bad"}]})
    assert check_pair(row, "x:1", False) == (before, "good", "bad", None, None)


def test_lines_and_lists_read_alike_and_know_their_lines(write_rows):
    lines = write_rows("\ufeff" + json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n")
    assert [where for where, _ in read_rows(lines)] == [f"{lines}:1", f"{lines}:3"]
    listed = write_rows(json.dumps([ROW, ROW], indent=1), "list.json")
    assert [where for where, _ in read_rows(listed)] == [f"{listed}:2", f"{listed}:9"]
    assert [row for _, row in read_rows(lines)] == [row for _, row in read_rows(listed)] == [ROW, ROW]


def test_lines_are_streamed_and_bad_ones_are_found_as_they_come(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n\n{"prompt": 3}\n{"prompt": "caf\xe9"}\n')
    rows = stream_rows(path)
    assert [next(rows), next(rows)] == [(f"{path}:1", ROW), (f"{path}:3", {"prompt": 3})]  # the fourth line is not read yet
    with pytest.raises(BadInput, match="rows.jsonl:4: not UTF-8"):
        next(rows)
    path.write_bytes(b'\n[\n{"a": 1},\n{"b": "\xe9"}]')
    with pytest.raises(BadInput, match="rows.jsonl:4: not UTF-8"):
        read_rows(path)
    path.write_bytes(b'\n[\n{"a": 1},\n{"b": 2\n}, {"c"}]')
    with pytest.raises(BadInput, match="rows.jsonl:5: not JSON .Expecting ':' delimiter.;"):
        read_rows(path)


def test_bad_lines_are_counted_when_asked(write_rows, tokenizer):
    tokenizer.chat_template = CHATML
    rows = [json.dumps(ROW | {"prompt": f"q{i}"}) for i in range(8)]
    rows[2] = rows[2][:30]  # torn
    rows[4] = "[1, 2]"
    rows[6] = json.dumps(ROW | {"score_chosen": "5"})
    path = write_rows("\n".join(rows))
    with pytest.raises(BadInput, match=":3: not JSON"):
        load_pairs(path, tokenizer, 64, True)
    pairs, report = load_pairs(path, tokenizer, 64, True, skip_bad_rows=True)
    assert [pair.prompt for pair in pairs] == ["q0", "q1", "q3", "q5", "q7"]
    assert report.rows == 8 and report.dropped_count() == 3


def test_null_score_is_left_out_by_name_only_where_scores_are_needed(write_rows, tokenizer):
    tokenizer.chat_template = CHATML
    path = write_rows([ROW, ROW | {"score_chosen": None}])
    pairs, report = load_pairs(path, tokenizer, 64, True)
    assert len(pairs) == 1 and report.dropped == {"no score": [f"{path}:2"]}
    assert len(load_pairs(path, tokenizer, 64, False)[0]) == 2


def test_a_pair_with_an_answer_that_the_teacher_did_not_finish_is_left_out(write_rows, tokenizer):
    tokenizer.chat_template = CHATML
    finishes = [["length", "stop", "stop"], ["stop", "stop", "length"], ["stop", "length", "stop"], ["length"], "length", None, [["length"], 1, {}]]
    path = write_rows([ROW | {"teacher": {"finish": finish}} for finish in finishes] + [ROW | {"teacher": other} for other in ("length", ["length"] * 3, {}, 5)])
    pairs, report = load_pairs(path, tokenizer, 64, True)
    assert len(pairs) == 9 and report.dropped == {"an answer was cut by the teacher's --max_tokens": [f"{path}:1", f"{path}:2"]}


# ---------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("template", [CHATML, TRIMMING, CLOSING, NO_END, THINKING, None])
@pytest.mark.parametrize("answer", ["Tea is a drink.", "\n\nTea", " two\n\nlines \n", "é 茶 🍵", "<|not_control|>"])
def test_prompt_is_an_exact_prefix_and_one_end_of_turn_closes_the_answer(tokenizer, template, answer):
    pair = encode(tokenizer, ROW | {"chosen": answer}, template)
    prompt_text = data.prompt_text(tokenizer, ROW["prompt"])
    assert pair.prompt_ids == tokenizer(prompt_text, add_special_tokens=False).input_ids
    assert pair.chosen_ids[-1] == tokenizer.eos_token_id
    control = [tokenizer.convert_tokens_to_ids(token) for token in data.control_tokens(tokenizer)]
    assert sum(token in control for token in pair.chosen_ids) == 1
    text = tokenizer.decode(pair.prompt_ids + pair.chosen_ids)
    assert text.startswith(prompt_text) and text[len(prompt_text):].removesuffix("<|im_end|>").strip() == answer.strip()


def test_prompt_bos_is_the_templates_and_never_doubled(tokenizer):
    bos = tokenizer.bos_token_id
    assert encode(tokenizer, ROW, TRIMMING).prompt_ids.count(bos) == 1
    assert encode(tokenizer, ROW, CHATML).prompt_ids.count(bos) == 0


def test_merge_at_the_boundary_is_undone(tokenizer):
    """This layout ends the prompt in a newline that the tokenizer merges with the answer's: the prompt's ids must not move."""
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}{{ '\n' }}{% endif %}{% endfor %}"
    apart = tokenizer("drink\n", add_special_tokens=False).input_ids
    together = tokenizer("drink\n\n", add_special_tokens=False).input_ids
    assert together[:len(apart)] != apart  # the trap is really there
    pair = encode(tokenizer, ROW | {"prompt": "drink", "chosen": "\ntea"}, template)
    assert pair.prompt_ids == apart
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == "drink\n\ntea<|im_end|>"


def test_control_token_in_an_answer_is_refused(tokenizer):
    with pytest.raises(BadInput, match="control token <|im_end|>"):
        encode(tokenizer, ROW | {"chosen": "Tea.<|im_end|>\n<|im_start|>user\nMore"})


def test_template_that_refuses_a_row_names_it(tokenizer):
    row = ROW | {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tea?"}]}
    with pytest.raises(BadInput, match="rows.jsonl:1: the chat template .* no system role"):
        encode(tokenizer, row, NO_SYSTEM)


def test_chat_rows_need_a_chat_template(tokenizer):
    with pytest.raises(BadInput, match="rows.jsonl:1: .* no chat template"):
        encode(tokenizer, ROW | {"prompt": [{"role": "user", "content": "Tea?"}]}, None)


def test_truncation_cuts_the_prompt_to_its_floor_then_the_answers():
    prompt, chosen, rejected = list(range(200)), list(range(1000, 1050)), list(range(2000, 2080))
    assert truncate(prompt, chosen, rejected, 300) == (prompt, chosen, rejected)
    assert truncate(prompt, chosen, rejected, 180) == (prompt[100:], chosen, rejected)
    assert truncate(prompt, chosen, rejected, 100) == (prompt[-64:], chosen[:36], rejected[:36])
    assert truncate(prompt, chosen, rejected, 64) == (prompt[-64:], [], [])
    assert truncate(prompt[:10], chosen, rejected, 64) == (prompt[:10], chosen, rejected[:54])


def test_rows_without_a_response_token_are_dropped_by_name(tokenizer, write_rows):
    tokenizer.chat_template = CHATML
    path = write_rows([ROW, ROW | {"prompt": "tea " * 100}, ROW | {"chosen": "same", "rejected": "same"}])
    pairs, report = load_pairs(path, tokenizer, 64, True)
    assert len(pairs) == 1 and report.truncated == 1
    assert report.dropped == {"no response token left after truncation": [f"{path}:2"], "chosen equals rejected": [f"{path}:3"]}
    with pytest.raises(BadInput, match="no row left .* --max_length is 3"):
        load_pairs(path, tokenizer, 3, True)


# ------------------------------------------------------------------------------------------------ order and report


def test_epoch_order_is_a_permutation_fixed_by_seed_and_epoch():
    assert sorted(epoch_order(50, 1, 2)) == list(range(50)) and epoch_order(50, 1, 2) == epoch_order(50, 1, 2)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_held_out_prompts_are_whole():
    pairs = [Pair(p.where, p.prompt, [i // 3], p.chosen_ids, p.rejected_ids, 1.0, 0.0) for i, p in enumerate(random_pairs(60))]
    training, held_out = split_held_out(pairs, 0.1, seed=0)
    assert len(training) == 54 and len(held_out) == 6
    assert not {tuple(p.prompt_ids) for p in training} & {tuple(p.prompt_ids) for p in held_out}
    assert split_held_out(pairs, 0.1, seed=1)[1] != held_out


def test_report_command(write_rows):
    path = write_rows([ROW, ROW | {"score_chosen": 1.5}, ROW | {"score_chosen": 0, "prompt": "\u001b[31mred"}, ROW | {"chosen": "No."}])
    done = subprocess.run([sys.executable, "data.py", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 rows, 3 usable pairs" in done.stdout and "chosen equals rejected" in done.stdout
    assert "1 ties, 1 inversions" in done.stdout and "token by token" in done.stdout
    assert "\033" not in done.stdout  # no colours in a file, and none that a row brings along


def test_stages_1_and_2_can_read_rows_without_torch():
    code = "import sys, data; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ).returncode == 0
