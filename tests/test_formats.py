"""Row formats of others: what each becomes, written out by hand, and what is refused."""
import copy
import json
import math

import pytest

import data
from infra.command import BadInput
from infra.formats import canonical
from infra.rows import check_pair, check_prompt


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


KIND = {"role": "system", "content": "Be kind."}
ANSWERS = {"chosen": "good", "rejected": "bad"}
HH = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"


def after(before):
    """Both answers as whole conversations."""
    return {"chosen": [*before, assistant("good")], "rejected": [*before, assistant("bad")]}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("row, prompt", [
    # The prompt and the messages before both answers are one conversation.
    ({"prompt": [user("q1")]} | after([assistant("a1"), user("q2")]),
     [user("q1"), assistant("a1"), user("q2")]),
    ({"prompt": "q1"} | after([assistant("a1"), user("q2")]),
     [user("q1"), assistant("a1"), user("q2")]),
    ({"prompt": [KIND]} | after([user("q")]), [KIND, user("q")]),
    ({"prompt": [user("q1"), assistant("a1")]} | after([user("q2")]),
     [user("q1"), assistant("a1"), user("q2")]),
    ({"prompt": "q1\n"} | after([user("q1")]), "q1\n"),
    ({"prompt": "q1"} | after([user("q1"), assistant("a1"), user("q2")]),
     [user("q1"), assistant("a1"), user("q2")]),
    # `system` and `history` come before it.
    ({"system": "Be kind.", "prompt": "q"} | ANSWERS, [KIND, user("q")]),
    ({"system": "Be kind.", "prompt": [KIND, user("q")]} | ANSWERS, [KIND, user("q")]),
    ({"system_prompt": "Be kind.", "instruction": "q", "input": "x"} | ANSWERS,
     [KIND, user("q\n\nx")]),
    ({"system": "", "history": [], "tools": "[]", "images": None, "prompt": "q"} | ANSWERS, "q"),
    ({"instruction": "q2", "history": [["q1", "a1"]], "system": "Be kind."} | ANSWERS,
     [KIND, user("q1"), assistant("a1"), user("q2")]),
    *(({name: "Be kind.", "prompt": "q"} | ANSWERS, [KIND, user("q")])
      for name in ("System", "system prompt", "systemPrompt", "system_msg", "SYSTEM-MESSAGE")),
    # What else a model should read may stand in the prompt.
    ({"prompt": "Tea: a, b?", "context": "Tea", "options": ["a", "b"], "persona": ""} | ANSWERS,
     "Tea: a, b?"),
    ({"prompt": [user("q"), assistant("a"), user("q2")], "previous_messages": [
        user("q"), assistant("a"), user("q2")]} | ANSWERS, [user("q"), assistant("a"), user("q2")]),
    ({"prompt": "q", "truncated_cells": []} | ANSWERS, "q"),
    # Transcripts, also beside a prompt.
    ({"prompt": "\n\nHuman: hello\n\nAssistant:"} | ANSWERS, [user("hello")]),
    ({"prompt": HH} | ANSWERS, [user("q1"), assistant("a1"), user("q2")]),
    ({"prompt": HH, "chosen": HH + " good", "rejected": HH + " bad"},
     [user("q1"), assistant("a1"), user("q2")]),
    ({"prompt": "q1", "chosen": HH + " good", "rejected": HH + " bad"},
     [user("q1"), assistant("a1"), user("q2")]),
    # Messages as JSON text, alone, in parts, under other names.
    ({"prompt": json.dumps([KIND, user("q")])} | ANSWERS, [KIND, user("q")]),
    ({key: json.dumps(value) for key, value in after([user("q")]).items()}, [user("q")]),
    ({"prompt": "q", "chosen": assistant("good"), "rejected": assistant("bad")}, "q"),
    ({"prompt": [{"role": "user", "content": parts("q", "1")}],
      "chosen": [{"role": "assistant", "content": parts("good")}],
      "rejected": [{"role": "assistant", "content": parts("bad")}]}, [user("q1")]),
    ({"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "q"}],
      "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
     [KIND, user("q")]),
    ({"messages": [user("q")]} | ANSWERS, [user("q")]),
    # Capybara's turns, with and beside a prompt
    ({"conversation": [{"input": "q1", "output": "a1"}, {"input": "q2", "output": "good"}],
      "prompt": [user("q1"), assistant("a1"), user("q2")]} | ANSWERS,
     [user("q1"), assistant("a1"), user("q2")]),
    ({"prompt": "q", "turns": 2, "tools": 0} | ANSWERS, "q"),
    ({"system": "Be kind.", "history": [["q1", "a1"]],
      "prompt": [user("q1"), assistant("a1"), user("q2")]} | ANSWERS,
     [KIND, user("q1"), assistant("a1"), user("q2")]),
    # Text before a transcript is no turn: the whole stays text.
    ({"prompt": "You are kind." + HH} | ANSWERS, "You are kind." + HH),
    ({"messages": [KIND, user("q"), assistant("good")], "prompt": [KIND, user("q")]} | ANSWERS,
     [KIND, user("q")]),
    ({"prompt": "q", "messages": [user("q"), assistant("good")]} | ANSWERS, "q"),
    ({"prompt": "Sum up: Tea", "instruction": "Sum up", "input": "Tea"} | ANSWERS, "Sum up: Tea"),
    ({"system": " ", "system_prompt": "Be kind.", "sys_prompt": "Be kind.", "prompt": "q"}
     | ANSWERS, [KIND, user("q")]),
    (after([{"role": "system", "content": ""}, user("q")]), [user("q")]),
    ({"prompt": "q", "response_chosen": "good", "response_rejected": "bad"}, "q"),
    ({"context": [user("q")], "system": "Be kind.", "response1": "good", "response2": "bad",
      "overall_preference": -2}, [KIND, user("q")]),
    # orca_dpo_pairs, HelpSteer3, PKU-SafeRLHF, Nectar
    ({"system": "Be kind.", "question": "q"} | ANSWERS, [KIND, user("q")]),
    ({"system": "", "input": "q"} | ANSWERS, "q"),
    ({"context": [user("q")], "response1": "good", "response2": "bad", "overall_preference": -2},
     [user("q")]),
    ({"context": [user("q")], "response1": "bad", "response2": "good", "overall_preference": 1},
     [user("q")]),
    ({"prompt": "q", "response_0": "bad", "response_1": "good", "better_response_id": 1,
      "safer_response_id": 0}, "q"),
    ({"prompt": "q", "response_0": "good", "response_1": "bad", "better_response_id": 0}, "q"),
    ({"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [
        {"answer": "so-so", "rank": 2.0}, {"answer": "bad", "rank": 7.0},
        {"answer": "good", "rank": 1.0}]}, [user("q")]),
], ids=lambda value: str(value)[:60])
def test_what_others_write_becomes_ours(row, prompt):
    before = copy.deepcopy(row)
    ours = canonical(row, names := [])
    check_prompt(ours, "x:1")
    assert check_pair(ours, "x:1", False)[:3] == (prompt, "good", "bad")
    assert row == before
    again = canonical(ours, more := [])
    assert again == ours and not more  # as the next stage reads it
    assert bool(names) == (ours != row) or names == []  # what was read is said


@pytest.mark.parametrize("row, why", [
    ({"prompt": "q1"} | after([user("q2")]), "which continue `prompt`"),
    ({"prompt": [user("q"), assistant("a")]} | after([user("q")]), "must be the user's"),
    ({"prompt": "other", "chosen": HH + " good", "rejected": HH + " bad"}, "continue `prompt`"),
    ({"system": "Be kind.", "prompt": [{"role": "system", "content": "Be terse."}, user("q")]}
     | ANSWERS, "`system` or `history` cannot be put"),
    ({"system": ["Be kind."], "prompt": "q"} | ANSWERS, "`system` or `history` cannot be put"),
    ({"history": "q1", "prompt": "q2"} | ANSWERS, "`system` or `history` cannot be put"),
    ({"history": [["q1"]], "prompt": "q2"} | ANSWERS, "`system` or `history` cannot be put"),
    ({"prompt": "q", "tools": [{"type": "function"}]} | ANSWERS, "`tools` changes"),
    ({"prompt": "q", "images": ["a.png"]} | ANSWERS, "`images` changes"),
    ({"prompt": "q", "context": "Tea is hot."} | ANSWERS, "`context` changes"),
    *(({"prompt": "q", name: "Tea is hot."} | ANSWERS, f"`{name}` changes") for name in (
        "persona", "preamble", "instructions", "background", "options", "previous_messages",
        "schema", "dialogue", "turns", "trajectory", "contexts", "ctxs", "paragraph", "premise",
        "suffix", "prompt_prefix", "retrieved_passages", "search_results", "tool", "function",
        "apis", "tool_definitions", "image_base64", "picture")),
    *(({"prompt": "q2", name: chat} | ANSWERS, f"`{name}` changes") for name, chat in (
        ("conversation", [{"input": "q1", "output": "a1"}, {"input": "q2", "output": "a2"}]),
        ("conversations", [{"from": "observation", "value": "q1"}]),
        ("messages", [user("q1"), {"role": "tool", "content": "r"}, user("q2")]),
        ("messages", ["q1", "q2"]))),
    ({"prompt": "q", "answers": [{"answer": "a", "rank": math.nan}, {"answer": "b", "rank": 1}]},
     "no `chosen`"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 5, "metadata":
      {"score_chosen": 1, "score_rejected": 4}}, "no `score_rejected`"),
    ({"prompt": "q or a", "choices": ["a", "b"]} | ANSWERS, "`choices` changes"),
    ({"prompt": "q", "truncated_cells": ["prompt"]} | ANSWERS, "cut its texts"),
    ({"prompt": "q", "chat_template_kwargs": {"enable_thinking": False}} | ANSWERS,
     "`chat_template_kwargs` changes"),
    ({"prompt": [user("q")], "chosen": [assistant("a") | {"tool_calls": [{"id": 1}]}],
      "rejected": [assistant("b")]}, "without images, tool calls or reasoning"),
    ({"prompt": [user("q")], "chosen": [assistant("a") | {"reasoning_content": "Hm."}],
      "rejected": [assistant("b")]}, "without images, tool calls or reasoning"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}, *parts("q")]}]} | ANSWERS,
     "without images, tool calls or reasoning"),
    ({"prompt": HH + " Sure,"} | ANSWERS, "must be the user's"),
    ({"chosen": "P" + HH + " good", "rejected": "R" + HH + " bad"}, "no `prompt`"),
    ({"prompt": "Translate to French", "input": "Hello"} | ANSWERS, "`input` changes"),
    ({"instruction": "As a pirate", "question": "What is tea?"} | ANSWERS, "`question` changes"),
    ({"query": "q", "input": "x"} | ANSWERS, "`input` changes"),
    ({"question": "q", "input": "x"} | ANSWERS, "`input` changes"),
    ({"prompt": "q2", "messages": [KIND, user("q1"), assistant("a1"), user("q2")]} | ANSWERS,
     "`messages` changes"),
    ({"prompt": "q2", "chat_history": [user("q1"), assistant("a1")]} | ANSWERS,
     "`chat_history` changes"),
    ({"prompt": "q2", "conversation_history": "q1 a1"} | ANSWERS, "`conversation_history` changes"),
    ({"prompt": "q", "initial_reason_steps": "Step 1"} | ANSWERS, "`initial_reason_steps` changes"),
    ({"prompt": "q", "image_path": "a.png"} | ANSWERS, "`image_path` changes"),
    ({"prompt": "q", "passage": "Tea."} | ANSWERS, "`passage` changes"),
    ({"prompt": [KIND | {"functions": "[{f}]"}, user("q")]} | ANSWERS, "without images, tool"),
    ({"prompt": [user("q") | {"documents": ["Tea."]}]} | ANSWERS, "without images, tool"),
    ({"context": [user("q")], "response1": "a", "response2": "b", "overall_preference": 0},
     "equally good"),
    ({"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 2},
     "equally good"),
    ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]},
     "equally good"),
    ({"prompt": "q", "answers": ["a", "b"]}, "no `chosen`"),
    ({"prompt": "q", "completion": "a", "label": True}, "are no pair"),
    ({"conversations": [user("q"), assistant("a")]} | ANSWERS, "no `prompt`"),
    ({"prompt": [user("q")], "chosen": [assistant("")], "rejected": [assistant("b")]},
     "`chosen` must hold messages"),
    ({"chosen": [user("q"), assistant("")], "rejected": [user("q"), assistant("b")]},
     "`chosen` must hold messages"),
], ids=lambda value: str(value)[:60])
def test_what_cannot_be_read_whole_is_refused(row, why):
    with pytest.raises(BadInput, match=f"^x:1: .*{why}"):
        check_pair(canonical(row), "x:1", needs_scores="score_chosen" in row)


@pytest.mark.parametrize("row", [
    {"response": "x", "chosen_response": "good", "rejected_response": "bad"},
    {"response": "x", "response_chosen": "good", "response_rejected": "bad"},
    {"summary_pre": "x", "chosen_response": "good", "rejected_response": "bad"}])
def test_names_that_say_which_answer_they_are_come_first(row):
    scores = {"score_response": 9, "chosen_score": 5, "rejected_score": 1}
    found = check_pair(canonical({"prompt": "q"} | row | scores), "x:1", True)
    assert found[1:4] == ("good", "bad", [5.0, 1.0])  # it was "x" and 9


@pytest.mark.parametrize("value", [None, 5, [], {}, "text", [5], [[]], [{}], {"a": 1}, "[{", "{}",
                                   [["a", "b"]], [None, None], True, '[{"role": "user"}]'])
@pytest.mark.parametrize("key", ["prompt", "chosen", "rejected", "system", "history", "answers",
                                 "conversations", "messages", "context", "metadata", "from",
                                 "better_response_id", "overall_preference", "input"])
def test_a_value_of_any_kind_is_read_or_refused(key, value):
    rest = {"response1": "a", "response2": "b", "response_0": "a", "response_1": "b"}
    for row in ({"prompt": "q"} | ANSWERS, {"context": [user("q")]} | rest, {"prompt": "q"} | rest,
                {"prompt": [user("q")]} | after([user("q")])):
        row = canonical(row | {key: value})
        assert canonical(row) == row
        try:
            check_pair(row, "x:1", False)
        except BadInput:
            pass


@pytest.mark.parametrize("weight", [0, -1, "2", True, [1], 1e39])
def test_a_weight_that_is_no_positive_number_is_refused(weight, write_rows, run_stage):
    path = write_rows([{"prompt": "q", "weight": 2} | ANSWERS, {"prompt": "p", "weight": weight}
                       | ANSWERS])
    code, out, err = run_stage(data, path)
    assert f"{path}:2: `weight` is {json.dumps(weight)}" in out


def test_the_report_says_what_was_read_as_what(write_rows, run_stage):
    path = write_rows([{"system": "Be kind.", "question": f"q{i}"} | ANSWERS for i in range(3)])
    code, out, _ = run_stage(data, path)
    assert code == 0
    assert "read `question` as `prompt`: 3 of 3 rows\n" in out
    assert "read `system` or `history` before `prompt`: 3 of 3 rows\n" in out
