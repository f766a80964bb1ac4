"""Rows, chat templates, truncation, splits and micro-batches."""
import copy
import dataclasses
import json
import math
import os
import random
import types

import pytest
import torch
from conftest import ROOT, random_pairs, read_metrics

import data
from data import (Pair, batch_tokens, collate, encode_pair, epoch_order, load_pairs, truncate)
from infra import packing
from infra.command import BadInput
from infra.formats import canonical
from infra.models import load_tokenizer
from infra.packing import micro_batches, pack
from infra.rows import (RowCounts, check_judges, check_pair, check_prompt, read_rows,
                        stream_rows)
from infra.templates import control_tokens, end_of_turn
from infra.split import families, split_train_val

ROW = {"prompt": "Tell me about tea.", "chosen": "Tea is a drink.", "rejected": "No.",
       "score_chosen": 4, "score_rejected": 1.5}

# Common kinds of chat templates. They differ in what they write after a finished answer.
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
CHATML = ("{% for m in messages %}" + TURN + "{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TRIMMING = ("<s>" + CHATML.replace("m.content", "m.content | trim")
            .replace("{{ m.role }}", "{{ 'model' if m.role == 'assistant' else m.role }}")
            .replace("<|im_start|>assistant", "<|im_start|>model"))
CLOSING = CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add")
NO_END = ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
          "{% if add_generation_prompt %}assistant: {% endif %}")
THINKING = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
# As in Qwen3: a finished answer has a block of thoughts, empty if it has none. The model is asked
# without one, to think first, unless enable_thinking is false.
EMPTY_BLOCK = "<think>\n\n</think>\n\n"
SWITCHED = (CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' %}" + EMPTY_BLOCK
                           + "{% endif %}{{ m.content }}")
            .replace("assistant\n{% endif %}", "assistant\n{% if enable_thinking is defined and "
                     "enable_thinking is false %}" + EMPTY_BLOCK + "{% endif %}{% endif %}"))
NO_SYSTEM = CHATML.replace(TURN, "{% if m.role == 'system' %}"
                                 "{{ raise_exception('no system role') }}{% endif %}" + TURN)


@pytest.fixture(scope="module")
def tokenizer():
    """A small byte-level tokenizer with ChatML's control tokens. Its pad id equals its eos id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(["tell me about tea and tea is a drink\n\n"] * 20, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    core.add_special_tokens([AddedToken(token, special=True)
                             for token in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>",
                                   pad_token="<|im_end|>")


def encode(tokenizer, row, template=CHATML, max_length=1024):
    tokenizer.chat_template = template
    end_of_turn.cache_clear()
    control_tokens.cache_clear()
    return encode_pair(canonical(row), "rows.jsonl:1", tokenizer, max_length, True, RowCounts())


def answered(tokenizer, prompt, answer):
    end_of_turn.cache_clear()
    return data.answer_text(tokenizer, prompt, data.prompt_text(tokenizer, prompt), answer)


# --------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("theirs", [
    {"response_revised": "good", "response": "bad", "score_response_revised": 5,
     "score_response": 1},
    {"response_revised": "good", "response_persona": "bad", "score_revised": 5,
     "score_persona": 1},
    {"summary_after": "good", "summary_pre": "bad", "scores_after": 5, "scores_pre": 1},
    {"chosen": "good", "rejected": "bad", "metadata": {"score_chosen": 5, "score_rejected": 1}},
    {"chosen_response": "good", "rejected_response": "bad", "chosen_rating": 5,
     "rejected_rating": 1},
    {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
     "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
     "chosen-rating": 5, "rejected-rating": 1},
    {"chosen": [{"role": "assistant", "content": "good"}],
     "rejected": [{"role": "assistant", "content": "bad"}],
     "score_chosen": 5, "score_rejected": 1},
])
def test_aliases(theirs):
    row = canonical({"prompt": "q", "more": [1]} | theirs)
    assert check_pair(row, "x:1", True)[:4] == ("q", "good", "bad", [5.0, 1.0])
    assert row["more"] == [1] and theirs.items() <= (row | theirs).items()


def test_prompt_inside_both_answers():
    before = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    row = canonical({"chosen": before + [{"role": "assistant", "content": "good"}],
                     "rejected": before + [{"role": "assistant", "content": "bad"}]})
    assert check_pair(row, "x:1", False)[:4] == (before, "good", "bad", [None, None])


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


KIND = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize("row, prompt", [
    ({"instruction": "Sum up.", "input": "Tea is hot."}, "Sum up.\n\nTea is hot."),
    ({"instruction": "Sum up.", "input": " Tea\n"}, "Sum up.\n\n Tea\n"),
    ({"instruction": "Sum up.", "input": " \n"}, "Sum up."),
    ({"instruction": "Sum up.", "input": ""}, "Sum up."),
    ({"instruction": "Sum up.", "input": None}, "Sum up."),
    ({"instruction": "Sum up."}, "Sum up."),
    ({"instruction": [user("Sum up.")], "input": ""}, [user("Sum up.")]),
    ({"prompt": "Sum up: Tea", "instruction": "Sum up", "input": "Tea"}, "Sum up: Tea"),
    ({"prompt": "Ours.", "input": [1]}, "Ours."),
    ({"instruction": "Sum up.", "input": 7}, "cannot be joined"),
    ({"instruction": "Sum up.", "input": ["Tea"]}, "cannot be joined"),
    ({"instruction": [user("Sum up.")], "input": "Tea"}, "cannot be joined"),
], ids=str)
def test_alpacas_input_follows_its_instruction(row, prompt):
    row = canonical(row | {"output": "Tea.", "chosen": "good", "rejected": "bad"})
    if prompt == "cannot be joined":
        for check in (check_prompt, lambda *row: check_pair(*row, False)):
            with pytest.raises(BadInput, match="x:1: `instruction` and `input` cannot be joined"):
                check(row, "x:1")
    else:
        check_prompt(row, "x:1")
        assert check_pair(row, "x:1", False)[:3] == (prompt, "good", "bad")
        assert canonical(row) == row  # as the next stage reads it


def test_joined_prompts_are_counted_and_tokenized(tokenizer, write_rows, run_stage):
    tokenizer.chat_template = CHATML
    alpaca = {"instruction": "Sum up.", "chosen": "Tea.", "rejected": "No."}
    path = write_rows([alpaca | {"input": text} for text in ("Tea is hot.", "", "Tea is cold.")])
    pairs, counts = load_pairs(path, tokenizer, 64, False)
    assert "Sum up.\n\nTea is hot.<|im_end|>" in tokenizer.decode(pairs[0].prompt_ids)
    assert "Sum up.<|im_end|>" in tokenizer.decode(pairs[1].prompt_ids)
    line = "read `instruction`, an empty line and `input` as `prompt`: 2 of 3 rows\n"
    assert line[:-1] in counts.lines() and line in run_stage(data, path)[1]


HH = "\n\nHuman: Tea?\n\nAssistant: Which?\n\nHuman: Green:\n\n1. hot\n\nAssistant:"
TURNS = [user("Tea?"), assistant("Which?"), user("Green:\n\n1. hot")]


@pytest.mark.parametrize("begin, end, expected", [
    (HH, (" Yes.\n\nHere.", " No."), (TURNS, "Yes.\n\nHere.", "No.")),
    (HH, ("Yes. ", "No.\n"), (TURNS, "Yes.", "No.")),
    (HH.strip(), (" Yes.", " No."), (TURNS, "Yes.", "No.")),
    (HH, (" Human: x\nAssistant: y", " No."), (TURNS, "Human: x\nAssistant: y", "No.")),
    ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", ("c", "d"), ([user("a"), user("b")], "c", "d")),
    (HH, ("", "No."), "`chosen` is empty"),
    (HH, ("Yes.\n\nHuman: Thanks", "No."), "must be equal up to the last Assistant turn"),
    (HH, ("Yes.\n\nHuman: Why?\n\nAssistant: So.", "No."), "must be equal up to"),
    ("\n\nHuman: a\n\nHuman:", ("Yes.", "No."), "must be equal up to"),
    ("\n\nHuman:\n\nAssistant:", ("Yes.", "No."), "`prompt` must hold messages"),
    ("\n\nAssistant: hi\n\nAssistant:", ("Yes.", "No."), "must be equal up to"),
    ("Tea, please. Assistant:", ("Yes.", "No."), "no `prompt`"),
])
def test_transcripts_of_hh_rlhf(begin, end, expected):
    row = canonical({"chosen": begin + end[0], "rejected": begin + end[1]})
    if isinstance(expected, str):
        with pytest.raises(BadInput, match="x:1: .*" + expected):
            check_pair(row, "x:1", False)
    else:
        assert check_pair(row, "x:1", False)[:3] == expected
        assert canonical(row) == row


def test_a_transcript_beside_a_prompt_is_left_alone():
    row = {"prompt": "Write a play.", "chosen": HH + "Yes.", "rejected": "No."}
    assert check_pair(canonical(row), "x:1", False)[1] == HH + "Yes."


@pytest.mark.parametrize("prompt, before, expected", [
    ("Tea?", [user("Tea?")], "Tea?"),  # ultrafeedback_binarized
    (None, [user("Tea?")], [user("Tea?")]),
    ("Tea?", [KIND, user("Tea?")], [KIND, user("Tea?")]),
    ("Tea?", [user("Tea?"), assistant("Which?"), user("Green.")],
     [user("Tea?"), assistant("Which?"), user("Green.")]),
    ([KIND, user("Tea?")], [user("Tea?")], [KIND, user("Tea?")]),
    ([KIND, user("Tea?")], [KIND, user("Tea?")], [KIND, user("Tea?")]),
], ids=str)
def test_binarised_ultrafeedback(tokenizer, prompt, before, expected):
    """Both answers are whole conversations. What they answer is never shortened to `prompt`."""
    row = {"prompt": prompt, "prompt_id": "a1b2", "chosen": before + [assistant("Yes.")],
           "rejected": before + [assistant("No.")], "messages": before + [assistant("Yes.")],
           "score_chosen": 8.5, "score_rejected": 7}
    assert check_pair(canonical(row), "x:1", True)[:4] == (expected, "Yes.", "No.", [8.5, 7.0])
    assert encode(tokenizer, row).score_gap == 1.5
    if expected == "Tea?":
        assert encode(tokenizer, row, template=None).prompt == "Tea?"


def test_lines_and_lists_read_alike_and_name_their_rows(write_rows):
    lines = write_rows("\ufeff" + json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n")
    assert [where for where, _ in read_rows(lines)] == [f"{lines}:1", f"{lines}:3"]
    listed = write_rows(json.dumps([ROW, ROW], indent=1), "list.json")
    assert [where for where, _ in read_rows(listed)] == [f"{listed}, item 1", f"{listed}, item 2"]
    for path in (lines, listed):
        assert [row for _, row in read_rows(path)] == [ROW, ROW]
    marked = write_rows("\ufeff" + json.dumps([ROW]), "list.json")
    assert read_rows(marked) == [(f"{marked}, item 1", ROW)]
    with pytest.raises(BadInput, match="list.json, item 2: a row must be a JSON object"):
        read_rows(write_rows(json.dumps([ROW, []]), "list.json"))


def test_brackets_of_any_depth_are_read_or_refused(write_rows):
    """Python's bound lies near a depth of 1,000: a row that can be read must be writable too."""
    for depth in range(900, 1000):
        try:
            (_, row), = read_rows(write_rows('{"a": ' + "[" * depth + "]" * depth + "}"))
        except BadInput as error:
            assert "too deep" in str(error)
        else:
            json.dumps(row)
    with pytest.raises(BadInput, match="too deep"):
        read_rows(write_rows('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}"))


def test_lines_are_streamed_and_bad_ones_are_refused_when_reached(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n\n{"prompt": 3}\n{"prompt": "caf\xe9"}\n')
    rows = stream_rows(path)
    # The fourth line is not read yet.
    assert [next(rows), next(rows)] == [(f"{path}:1", ROW), (f"{path}:3", {"prompt": 3})]
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
    pairs, counts = load_pairs(path, tokenizer, 64, True, skip_bad_rows=True)
    assert [pair.prompt for pair in pairs] == ["q0", "q1", "q3", "q5", "q7"]
    assert counts.rows == 8 and counts.dropped_count() == 3


def test_null_score_is_left_out_by_name_only_where_scores_are_needed(write_rows, tokenizer):
    tokenizer.chat_template = CHATML
    path = write_rows([ROW, ROW | {"score_chosen": None}])
    pairs, counts = load_pairs(path, tokenizer, 64, True)
    assert len(pairs) == 1 and counts.dropped == {"no score": [f"{path}:2"]}
    assert len(load_pairs(path, tokenizer, 64, False)[0]) == 2


def test_a_pair_with_an_answer_that_the_teacher_did_not_finish_is_left_out(write_rows, tokenizer):
    tokenizer.chat_template = CHATML
    finishes = [["length", "stop", "stop"], ["stop", "stop", "length"], ["length"],  # left out
                ["stop", "stop", "stop", "stop", "length"],  # left out: two rounds, a cut rewrite
                ["stop", "length", "stop"], ["stop", "stop", "length", "stop", "stop"],
                "length", None, ["eos", "length", "end_turn"], [None, "length", ""],
                ["content_filter", "stop", "stop"], [["length"], 1, {}]]  # left out: not known
    teachers = [{"finish": finish} for finish in finishes] + ["length", ["length"] * 3, {}, 5]
    path = write_rows([ROW | {"teacher": teacher} for teacher in teachers])
    pairs, counts = load_pairs(path, tokenizer, 64, True)
    assert len(pairs) == 10
    assert counts.dropped == {"the teacher did not finish an answer (see teacher.finish)":
                              [f"{path}:{line}" for line in (1, 2, 3, 4, 11, 12)]}


# ------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("template", [CHATML, TRIMMING, CLOSING, NO_END, THINKING, None])
@pytest.mark.parametrize("answer", ["Tea is a drink.", "\n\nTea", " two\n\nlines \n", "é 茶 🍵",
                                    "<|not_control|>"])
def test_prompt_ids_are_a_prefix_and_one_end_of_turn_closes_the_answer(tokenizer, template, answer):
    pair = encode(tokenizer, ROW | {"chosen": answer}, template)
    prompt_text = data.prompt_text(tokenizer, ROW["prompt"])
    assert pair.prompt_ids == tokenizer(prompt_text, add_special_tokens=False).input_ids
    assert pair.chosen_ids[-1] == tokenizer.eos_token_id
    control = tokenizer.convert_tokens_to_ids(control_tokens(tokenizer))
    assert sum(token in control for token in pair.chosen_ids) == 1
    text = tokenizer.decode(pair.prompt_ids + pair.chosen_ids)
    assert text.startswith(prompt_text)
    said = text[len(prompt_text):].removesuffix("<|im_end|>").removeprefix("\n</think>\n")
    assert said.strip() == answer.strip()


def test_an_answer_that_the_template_rewrites_is_trained_as_it_is(tokenizer):
    tokenizer.chat_template = CHATML.replace(
        "m.content", "(m.content | upper if m.role == 'assistant' else m.content)")
    assert "YES" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}], tokenize=False)
    for prompt in ("Say yes.", "Say no."):
        assert answered(tokenizer, prompt, "yes") == "yes<|im_end|>"


def test_template_kwargs_become_defaults_that_a_saved_tokenizer_keeps(tokenizer, tmp_path):
    tokenizer.chat_template = SWITCHED
    tokenizer.save_pretrained(tmp_path)
    asked = "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    thinking = load_tokenizer(str(tmp_path))
    assert data.prompt_text(thinking, "Hi.") == asked
    assert answered(thinking, "Hi.", "Yes.") == EMPTY_BLOCK + "Yes.<|im_end|>"
    assert repr(EMPTY_BLOCK) in data.template_note(thinking)

    load_tokenizer(str(tmp_path), {"enable_thinking": False}).save_pretrained(tmp_path / "saved")
    without = load_tokenizer(str(tmp_path / "saved"))
    assert data.prompt_text(without, "Hi.") == asked + EMPTY_BLOCK
    assert answered(without, "Hi.", "Yes.") == "Yes.<|im_end|>"
    assert data.template_note(without) == ""
    messages = [{"role": "user", "content": "Hi."}]  # whoever asks may still choose
    assert without.apply_chat_template(messages, tokenize=False, add_generation_prompt=True,
                                       enable_thinking=True) == asked
    named = load_tokenizer(str(tmp_path), {"enable_thinking": 'a "\u00e9\U0001f600\\n'})
    named.chat_template = named.chat_template.replace(
        SWITCHED, "{{ enable_thinking }}{{ messages[0].content }}")
    assert data.prompt_text(named, "Hi.") == 'a "\u00e9\U0001f600\\nHi.'
    with pytest.raises(BadInput, match="does not use `enable_thinkin`"):
        load_tokenizer(str(tmp_path), {"enable_thinkin": False})


@pytest.mark.parametrize("template", [CHATML, TRIMMING, CLOSING, NO_END])
def test_templates_that_ask_as_they_render_have_no_note(tokenizer, template):
    tokenizer.chat_template = template
    assert data.template_note(tokenizer) == ""
    tokenizer.chat_template = None
    assert "an empty line ends a prompt" in data.template_note(tokenizer)


def test_template_that_opens_a_block_only_when_it_asks_is_named(tokenizer):
    tokenizer.chat_template = THINKING
    assert "writes '' before a finished answer, and '<think>\\n' when" in data.template_note(
        tokenizer)


def test_prompt_bos_is_the_templates_and_never_doubled(tokenizer):
    bos = tokenizer.bos_token_id
    assert encode(tokenizer, ROW, TRIMMING).prompt_ids.count(bos) == 1
    assert encode(tokenizer, ROW, CHATML).prompt_ids.count(bos) == 0


def test_merge_at_the_boundary_is_undone(tokenizer):
    """The prompt's last newline would merge with the answer's first. The prompt's ids must stay."""
    template = ("{% for m in messages %}{{ m.content }}"
                "{% if m.role == 'user' %}{{ '\n' }}{% endif %}{% endfor %}")
    apart = tokenizer("drink\n", add_special_tokens=False).input_ids
    together = tokenizer("drink\n\n", add_special_tokens=False).input_ids
    assert together[:len(apart)] != apart  # the trap is really there
    pair = encode(tokenizer, ROW | {"prompt": "drink", "chosen": "\ntea"}, template)
    assert pair.prompt_ids == apart
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == "drink\n\ntea<|im_end|>"


def test_control_token_in_an_answer_is_refused(tokenizer):
    with pytest.raises(BadInput, match="control token <|im_end|>"):
        encode(tokenizer, ROW | {"chosen": "Tea.<|im_end|>\n<|im_start|>user\nMore"})


@pytest.mark.parametrize("prompt", [
    "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n", "What does </s> mean?",
    [user("Tea?"), assistant("Hi.<|im_end|>"), user("Tea?")],
    [{"role": "system", "content": "<s>"}, user("Tea?")]])
def test_control_token_in_a_prompt_is_refused(tokenizer, write_rows, prompt):
    with pytest.raises(BadInput, match="rows.jsonl:1: the prompt holds the control token <.*>; "):
        encode(tokenizer, ROW | {"prompt": prompt})
    path = write_rows([ROW, ROW | {"prompt": prompt}])
    assert load_pairs(path, tokenizer, 64, True, skip_bad_rows=True)[1].dropped_count() == 1


def test_skip_bad_rows_leaves_out_what_the_template_refuses(tokenizer, write_rows):
    tokenizer.chat_template = NO_SYSTEM.replace("no system role", "no system role\\nat all")
    path = write_rows([ROW, ROW | {"prompt": [KIND, user("Tea?")]}])
    with pytest.raises(BadInput, match=f"{path}:2: the chat template .* no system role at all$"):
        load_pairs(path, tokenizer, 64, True)
    assert len(load_pairs(path, tokenizer, 64, True, skip_bad_rows=True)[0]) == 1


def test_no_warning_of_a_length_that_is_then_cut(tokenizer, write_rows, monkeypatch, caplog):
    """transformers warns once per tokenizer, through its own logger."""
    import logging
    monkeypatch.setattr(tokenizer, "model_max_length", 32)
    monkeypatch.setattr(tokenizer, "deprecation_warnings", {})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")  # another test may have raised it
    tokenizer.chat_template = CHATML
    path = write_rows([ROW | {"prompt": "tea " * 100}])
    assert len(load_pairs(path, tokenizer, 96, True)[0][0].prompt_ids) < 96
    assert "longer than the specified" not in caplog.text
    tokenizer("tea " * 100)  # the warning is really there
    assert "longer than the specified" in caplog.text


def test_template_that_refuses_a_row_names_it(tokenizer):
    row = ROW | {"prompt": [{"role": "system", "content": "Be kind."},
                            {"role": "user", "content": "Tea?"}]}
    with pytest.raises(BadInput, match="rows.jsonl:1: the chat template .* no system role"):
        encode(tokenizer, row, NO_SYSTEM)


def test_chat_rows_need_a_chat_template(tokenizer):
    with pytest.raises(BadInput, match="rows.jsonl:1: .* no chat template"):
        encode(tokenizer, ROW | {"prompt": [{"role": "user", "content": "Tea?"}]}, None)


def test_truncation_cuts_the_prompt_to_its_floor_then_the_answers():
    def cut(*args, bos=None):
        return truncate(types.SimpleNamespace(bos_token_id=bos), *args)

    prompt, chosen, rejected = list(range(200)), list(range(1000, 1050)), list(range(2000, 2080))
    assert cut(prompt, chosen, rejected, 300) == (prompt, chosen, rejected)
    assert cut(prompt, chosen, rejected, 180) == (prompt[100:], chosen, rejected)
    assert cut(prompt, chosen, rejected, 100) == (prompt[-64:], chosen[:36], rejected[:36])
    assert cut(prompt, chosen, rejected, 64) == (prompt[-64:], [], [])
    assert cut(prompt[:10], chosen, rejected, 64) == (prompt[:10], chosen, rejected[:54])
    # bos stays at the start, and takes one of the places.
    assert cut(prompt, chosen, rejected, 180, bos=0) == ([0, *prompt[101:]], chosen, rejected)
    assert cut(prompt, chosen, rejected, 300, bos=0) == (prompt, chosen, rejected)
    assert cut(prompt, chosen, rejected, 180, bos=3) == (prompt[100:], chosen, rejected)


def test_rows_without_a_response_token_are_dropped_by_name(tokenizer, write_rows):
    tokenizer.chat_template = CHATML
    path = write_rows([ROW, ROW | {"prompt": "tea " * 100},
                       ROW | {"chosen": "same", "rejected": "same"}])
    pairs, counts = load_pairs(path, tokenizer, 64, True)
    assert len(pairs) == 1 and counts.truncated == 1
    assert counts.dropped == {"no response token left after truncation, --max_length is 64":
                              [f"{path}:2"],
                              "chosen equals rejected": [f"{path}:3"]}
    with pytest.raises(BadInput, match="no row left .* --max_length is 3"):
        load_pairs(path, tokenizer, 3, True)


# --------------------------------------------------------------------- order, splits, micro-batches


def test_epoch_order_is_a_permutation_fixed_by_seed_and_epoch():
    assert sorted(epoch_order(50, 1, 2)) == list(range(50))
    assert epoch_order(50, 1, 2) == epoch_order(50, 1, 2)
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_no_prompt_is_on_both_sides_of_the_split():
    pairs = [Pair(p.where, p.prompt, [i // 3], p.chosen_ids, p.rejected_ids)
             for i, p in enumerate(random_pairs(60))]
    train, val = split_train_val(pairs, 0.1, seed=0)
    assert len(train) == 54 and len(val) == 6
    assert not {tuple(p.prompt_ids) for p in train} & {tuple(p.prompt_ids) for p in val}
    assert split_train_val(pairs, 0.1, seed=1)[1] != val
    assert len(split_train_val(pairs, 0.5, seed=0, at_most=4)[1]) == 3 * 4
    assert split_train_val(pairs[:3], 0.5, seed=0) == (pairs[:3], [])  # one prompt alone


def sides(pairs):
    """For several seeds, the set of validation pairs by the number of their line or name."""
    for seed in range(20):
        yield {pair.where.rpartition(":")[2] for pair in split_train_val(pairs, 0.3, seed)[1]}


def test_siblings_stay_on_one_side_though_cut_differently(tokenizer, write_rows):
    tokenizer.chat_template = CHATML
    rows = [ROW | {"prompt": "tea " * 90 + str(i), "chosen": "x" * length}
            for i in range(5) for length in (3, 40)]
    pairs, counts = load_pairs(write_rows(rows), tokenizer, 100, True)
    assert counts.truncated == 10 and pairs[0].prompt_ids != pairs[1].prompt_ids
    for val in sides(pairs):
        assert len(val) == 4
        assert all((str(n) in val) == (str(n + 1) in val) for n in range(1, 10, 2))


def says(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("sibling", [
    lambda text: says(text, "Tea.", "And more?"),  # the conversation goes on
    lambda text: [{"role": "system", "content": "Be kind."}, *says(text)],
    lambda text: f" {text.upper()}\n"])
def test_the_same_first_question_stays_on_one_side(tokenizer, write_rows, sibling):
    tokenizer.chat_template = CHATML
    prompts = [f"Why tea {i}?" for i in range(10)]
    pairs, _ = load_pairs(write_rows([ROW | {"prompt": prompt} for prompt in prompts]), tokenizer,
                          99, True)
    more, _ = load_pairs(write_rows([ROW | {"prompt": sibling(prompt)} for prompt in prompts]),
                         tokenizer, 99, True)
    for seed in range(20):
        _, val = split_train_val(pairs + more, 0.3, seed)
        assert len(val) == 6 and len({pair.where for pair in val}) == 3


@pytest.mark.parametrize("groups, families_of_lines", [
    (["a", "a", "b", "c", "b", None, None], ["12", "35", "4", "6", "7"]),
    ([1, "1", {"x": 1, "y": 2}, {"y": 2, "x": 1}, None], ["1", "2", "34", "5"]),
    ([None] * 4, ["1", "2", "3", "4"]),
])
def test_a_group_stays_on_one_side(tokenizer, write_rows, groups, families_of_lines):
    tokenizer.chat_template = CHATML
    rows = [ROW | {"prompt": f"tea {i}"} | ({"group": group} if i % 2 or group else {})
            for i, group in enumerate(groups)]
    path = write_rows(rows)
    pairs, counts = load_pairs(path, tokenizer, 64, True)
    seen = set()
    for val in sides(pairs):
        parts = [part for part in families_of_lines if part[0] in val]
        assert sorted("".join(parts)) == sorted(val)  # whole families
        assert len(parts) == -(-len(families_of_lines) * 3 // 10)
        seen |= val
    assert len(seen) == len(groups)
    distinct = len({json.dumps(g, sort_keys=True) for g in groups} - {"null"})
    assert ("values of `group`" in " ".join(counts.lines())) == bool(distinct)
    assert counts.groups == distinct


def test_the_split_of_known_rows_stays_as_it_was(toy_tokenizer):
    """Recorded figures depend on it."""
    pairs, _ = load_pairs(os.path.join(ROOT, "toy", "scored.jsonl"), toy_tokenizer, 1024, True)
    _, val = split_train_val(pairs, 0.1, seed=0)
    lines = [int(pair.where.rpartition(":")[2]) for pair in val]
    assert len(lines) == 90 and lines[:5] == [9, 29, 35, 54, 74] and sum(lines) == 41080


def test_families_against_merging_sets():
    rng = random.Random(0)
    for size in (1, 5, 40):
        items = [rng.sample(range(3 * size), rng.randint(1, 3)) for _ in range(size)]
        merged = [set(names) for names in items]
        for _ in merged:  # each round joins whatever overlaps
            merged = [set().union(*(other for other in merged if other & names))
                      for names in merged]
        labels = families(items)
        for a in range(size):
            for b in range(size):
                assert (labels[a] == labels[b]) == (merged[a] == merged[b])


@pytest.mark.parametrize("share_prefix", [False, True])
def test_micro_batches_bound_memory_and_lose_no_pair(share_prefix):
    pairs = random_pairs(40)
    for bound in (1, 64, 200, 10**6):
        batches = micro_batches(pairs, range(40), bound, share_prefix)
        assert sorted(sum(batches, [])) == list(range(40))
        for batch in batches:
            tensors = collate([pairs[i] for i in batch], share_prefix)
            assert len(batch) == 1 or tensors.input_ids.numel() <= bound
    assert len(micro_batches(pairs, range(40), 10**6, share_prefix)) == 1
    counts = [len(micro_batches(pairs, range(40), 200, share)) for share in (True, False)]
    assert counts[0] < counts[1]  # a prompt that is read once leaves room for other pairs


def test_rows_are_packed_whole_and_nearly_full():
    rng = random.Random(0)
    for count in (1, 2, 5, 16, 200):
        sizes = [rng.randint(100, 2000) for _ in range(count)]
        rows = pack(sizes)
        assert sorted(sum(rows, [])) == list(range(count))
        width = max(sum(sizes[i] for i in row) for row in rows)
        padded, apart = len(rows) * width, count * max(sizes)
        assert padded <= apart and width <= 6 * max(sizes)
        assert sum(sizes) >= 0.92 * padded or count < 10
        assert sum(sizes) < 0.7 * apart or count < 10  # control: one pair a row
    assert pack([500] * 4) in ([[0], [1], [2], [3]], [[3], [2], [1], [0]])  # no gain, no row


def test_wide_rows_cost_more_where_attention_does(monkeypatch):
    sizes = [900, 300, 300, 300, 200, 200, 100, 100]
    wide = pack(sizes)
    monkeypatch.setattr(packing, "ATTENTION_WIDTH", 10)
    narrow = pack(sizes)
    assert max(sum(sizes[i] for i in row) for row in narrow) == 900
    assert len(narrow) >= len(wide)


def test_ranks_share_the_pairs_evenly_and_take_equally_many_micro_batches():
    pairs, indices = random_pairs(25), range(1, 24)
    for world_size in (1, 2, 3, 30):
        of_ranks = [micro_batches(pairs, indices, 100, True, rank, world_size)
                    for rank in range(world_size)]
        assert sorted(i for batches in of_ranks for batch in batches for i in batch) == [*indices]
        assert len(set(map(len, of_ranks))) == 1
        counts = [sum(map(len, batches)) for batches in of_ranks]
        assert max(counts) - min(counts) <= 1
        for batches in of_ranks:  # what is empty comes last
            assert sorted(batches, key=lambda batch: not batch) == batches
    # Long pairs are shared too: rank totals differ by less than the longest pair.
    totals = [sum(batch_tokens(pairs[i], True) for batch in micro_batches(
        pairs, indices, 100, True, rank, 3) for i in batch) for rank in range(3)]
    assert max(totals) - min(totals) <= max(batch_tokens(pairs[i], True) for i in indices)


# --------------------------------------------------------------------------------------- the report


def test_report_command(write_rows, run_stage):
    path = write_rows([ROW, ROW | {"score_chosen": 1.5}, ROW | {"chosen": "No."},
                       ROW | {"score_chosen": 0, "prompt": "\u001b[31mred"}])
    code, out, err = run_stage(data, path)
    assert code == 0, err
    assert "4 rows, 3 usable pairs, 1 of them to validate" in out
    assert "chosen equals rejected" in out
    assert "1 ties, 1 inversions" in out and "token by token" in out
    assert "\033" not in out  # no colours in a file, and no control characters from a row


UNSCORED = {name: ROW[name] for name in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize("rows, said, not_said", [
    ([ROW, ROW | {"prompt": "Hi"}], ["2 usable pairs, 1 of them"], ["would stop", "--skip_bad"]),
    ([ROW, ROW], ["train.py would stop: one prompt alone"], ["such rows"]),
    ([ROW, 5, {}] + [ROW | {"chosen": ""}] * 3, [
        "train.py would stop at {path}:2: a row must be a JSON object",
        "train.py would stop at {path}:3: no `prompt`", "train.py would stop at {path}:4: `chosen`",
        "5 such rows in all: repair them, or leave them out with --skip_bad_rows"],
     ["stop at {path}:5", "bad row"]),
    ([ROW, UNSCORED, ROW | {"prompt": "Hi"}], [
        "--loss rdpo, the default, or dsc train.py would stop at rows without two scores, 1 in all:"
        " {path}:2"], ["stop at {path}", "no scores:", "null"]),
    ([ROW, {key: ROW[key] for key in ROW if key != "score_rejected"}, ROW | {"prompt": "Hi"}],
     ["without two scores, 1 in all: {path}:2"], []),
    ([ROW, ROW | {"score_chosen": None, "prompt": "Hi"}],
     ["1 pairs have a `null` score", "train.py would stop: one prompt alone"], []),
    ([UNSCORED] * 5, ["5 in all: {path}:1, {path}:2, {path}:3, ...", "no scores: --loss dpo"], []),
    ([ROW, ROW | {"score_chosen": None, "prompt": "Hi"}, ROW | {"prompt": "Hm"}],
     ["1 pairs have a `null` score: rdpo and dsc leave them out"], ["would stop"]),
    ([ROW, ROW | {"prompt": "<|end|>", "score_chosen": None}],
     ["train.py would stop at {path}:2: the prompt holds"], ["null"]),
])
def test_report_says_where_train_would_stop(write_rows, run_stage, run_train, rows, said, not_said):
    path = write_rows(rows)
    code, out, err = run_stage(data, path)
    assert code == 0 and not err
    stopped = run_train("--data", path, "--max_steps", 1)[2]
    assert ("would stop" in out) == ("error: " in stopped)
    for text in said:
        assert text.format(path=path) in out
    for text in not_said:
        assert text.format(path=path) not in out


def test_report_of_a_file_without_a_usable_row(write_rows, run_stage):
    path = write_rows([{}, {}])
    code, _, err = run_stage(data, path)
    assert code == 2 and err.count("\n") == 1 and f"{path}:1: no `prompt`" in err
    assert "max_length" not in err


def test_huge_gaps_have_a_histogram(write_rows, run_stage):
    path = write_rows([ROW | {"score_chosen": high, "score_rejected": -high}
                       for high in (1e38, -1e38)])
    code, out, err = run_stage(data, path)
    assert code == 0 and "+2e+38" in out, err


# -------------------------------------------------------------------------------- judges and scales


def judged(lowest=None, highest=None, **row):
    judge = {"model": "m", "task": f"of {highest}"}
    judge |= {} if lowest is None else {"scale": [lowest, highest]}
    return ROW | {"judge": judge, "score_rejected": 0} | row


@pytest.mark.parametrize("row, gap", [
    (ROW, 2.5), (ROW | {"judge": "somebody"}, 2.5), (judged(score_chosen=3.25), 3.25),
    (judged(0, 5, score_chosen=3.3), 3.3), (judged(0, 1, score_chosen=1), 5),
    (judged(-5, 0, score_chosen=-4, score_rejected=-4.5), 0.5),
    (judged(0, 100, score_chosen=20), 1), (judged(1.0, 10, score_chosen=0.9), 0.5)])
def test_a_known_scale_counts_as_5_points_and_another_as_it_is(tokenizer, row, gap):
    assert encode(tokenizer, row).score_gap == pytest.approx(gap, rel=1e-12)
    assert encode(tokenizer, judged(0, 5, score_chosen=0.3)).score_gap == 0.3  # to the bit


@pytest.mark.parametrize("scale", [5, [0], [0, "5"], [5, 0], [1, 1], [0, True], [0, 10**400], {}])
def test_a_scale_that_is_none_is_refused(tokenizer, scale):
    with pytest.raises(BadInput, match=r"rows.jsonl:1: `judge.scale` is .* must be \[lowest"):
        encode(tokenizer, ROW | {"judge": {"scale": scale}})


@pytest.mark.parametrize("rows, ok", [
    ([judged(0, 5), judged(0, 1)], True), ([ROW, ROW], True), ([judged(), judged()], True),
    ([judged(0, 5), ROW], False), ([judged(0, 1), judged()], False),
    ([ROW | {"judge": "a"}, ROW | {"judge": "b"}], False), ([judged(0, 5), judged(0, 5)], True),
    ([judged(0, 5), ROW | {"score_chosen": None}], True)])
def test_judges_are_mixed_only_if_all_scales_are_known(tokenizer, rows, ok):
    tokenizer.chat_template = CHATML
    pairs = [encode_pair(canonical(row), f"f:{i}", tokenizer, 99, False, RowCounts())
             for i, row in enumerate(rows)]
    if ok:
        check_judges(pairs)
    else:
        with pytest.raises(BadInput, match=r"f:[01]: scored by .* on an unknown scale"):
            check_judges(pairs)


def test_the_report_has_a_histogram_per_judge_and_says_if_they_do_not_mix(
        toy_rows, write_rows, run_stage):
    safety = [row | {"judge": {"model": "m", "scale": [0, 1]}, "score_rejected": 0,
                     "score_chosen": 1} for row in toy_rows[:20]]
    _, out, _ = run_stage(data, write_rows(toy_rows[20:60] + safety))
    assert "of 40 pairs scored by toy d0e3c675f5f4b0a4:" in out
    assert "of 20 pairs scored by m (scale of 1 widened to 5): 0 ties" in out
    assert "unknown scale" not in out
    _, out, _ = run_stage(data, write_rows(toy_rows[20:60] + [safety[0] | {"judge": "m"}]))
    assert "train.py would stop at" in out and "scored by m on an unknown scale" in out


# ------------------------------------------------------------------- what small faults had shown


def test_a_batch_is_filled_to_the_token():
    one = Pair("", "", [1] * 4, [1] * 3, [1] * 3)
    size = batch_tokens(one, True)
    assert micro_batches([one] * 4, range(4), 2 * size, True) == [[0, 1], [2, 3]]
    assert micro_batches([one] * 4, range(4), 2 * size - 1, True) == [[0], [1], [2], [3]]


def test_a_batch_moves_whole():
    batch = collate(random_pairs(2), True).to(torch.device("meta"))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5 and all(tensor.is_meta for tensor in tensors)


def test_no_second_beginning_of_text(tokenizer):
    """Tokenizers may put one before every text; the template's own is the only one here."""
    from tokenizers.processors import TemplateProcessing
    adds = copy.deepcopy(tokenizer)
    adds.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", adds.bos_token_id)])
    assert adds("tea").input_ids[0] == adds.bos_token_id
    assert data.token_ids(adds, "tea") == data.token_ids(tokenizer, "tea")
    assert adds.bos_token_id not in data.token_ids(adds, "tea")


# -------------------------------------------------------------------------- tau in place of scores


@pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 0.9, 1.0, 1])
def test_a_row_with_tau_keeps_it(tokenizer, tau):
    row = {key: value for key, value in ROW.items() if not key.startswith("score")} | {"tau": tau}
    pair = encode(tokenizer, row)
    assert pair.tau == tau and math.isnan(pair.score_gap)
    assert (pair.lean > 0, pair.lean == 0) == (tau > 0.5, tau == 0.5)
    scored = encode(tokenizer, row | {"score_chosen": 4, "score_rejected": 1})
    assert scored.score_gap == scored.lean == 3 and math.isnan(scored.tau)  # scores come first


@pytest.mark.parametrize("tau", [1.01, -0.1, math.nan, "0.5", True, [0.5]])
def test_a_tau_that_is_no_probability_is_refused(tokenizer, tau):
    row = {key: value for key, value in ROW.items() if not key.startswith("score")} | {"tau": tau}
    with pytest.raises(BadInput, match=r"`tau` is .*; it must be from 0 to 1, or null"):
        encode(tokenizer, row)


def test_rows_with_a_null_tau_are_left_out_by_rdpo_alone(tokenizer, write_rows):
    rows = [{"prompt": f"Tea {i}?", "chosen": "yes", "rejected": "no", "tau": tau}
            for i, tau in enumerate([0.7, None, 0.2])]
    tokenizer.chat_template = CHATML
    pairs, counts = load_pairs(write_rows(rows), tokenizer, 96, needs_scores=True)
    assert len(pairs) == 2 and list(counts.dropped) == ["no score"] and not counts.unscored
    assert len(load_pairs(write_rows(rows), tokenizer, 96, needs_scores=False)[0]) == 3


def test_training_takes_tau_as_its_target(run_train, toy_rows, write_rows, tmp_path):
    """Rows with tau give the run that rows with the scores give, tau for tau."""
    scored = [{key: row[key] for key in ("id", "prompt", "chosen", "rejected", "score_chosen",
                                         "score_rejected")} for row in toy_rows[:24]]
    targets = [{key: row[key] for key in ("id", "prompt", "chosen", "rejected")}
               | {"tau": 1 / (1 + math.exp(row["score_rejected"] - row["score_chosen"]))}
               for row in scored]
    losses = []
    for name, rows in (("scores", scored), ("tau", targets)):
        code, _, err = run_train("--data", write_rows(rows, name), "--max_steps", 2,
                                 "--out_dir", tmp_path / f"out-{name}", "--overwrite")
        assert code == 0, err
        losses.append([line["loss"] for line in read_metrics(tmp_path / f"out-{name}")[0]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and len(losses[0]) == 2
