"""Chat templates of seven families, with tokenizers built as theirs, against transformers."""
import datetime
import json

import pytest
import torch
from conftest import tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as kinds
from tokenizers import trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from data import encode_answers, encode_pair, prompt_text
from infra import checkpoint
from infra.command import BadInput
from infra.formats import canonical
from infra.generate import generate
from infra.models import load_model, load_tokenizer
from infra.rows import RowCounts
from infra.templates import (control_tokens, cut_left, end_of_turn, lost_role, pin_date,
                             stop_ids, template_note)

TEXT = ["Tell me about tea.\n\nTea is a drink, and final."] * 20
EACH = "{% for m in messages %}"
CHATML = (EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
INST = ("{{ bos_token }}" + EACH + "{% if m.role == 'assistant' %} {{ m.content | trim }} "
        "{{ eos_token }}{% else %}[INST] {{ m.content | trim }} [/INST]{% endif %}{% endfor %}")
LLAMA_3 = ("{{ bos_token }}" + EACH + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
           "{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
           "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
GEMMA = ("{{ bos_token }}" + EACH + "<start_of_turn>{{ 'model' if m.role == 'assistant' else "
         "m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
PHI = (EACH + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
       "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}")
HARMONY = (EACH + "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
           "<|message|>{{ m.content }}{{ '<|return|>' if loop.last and m.role == 'assistant' else "
           "'<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}")
COHERE = ("{{ bos_token }}" + EACH + "<|START|><|{{ m.role }}|>{% if m.role == 'assistant' %}"
          "<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% else %}{{ m.content }}{% endif %}"
          "<|END|>{% endfor %}{% if add_generation_prompt %}<|START|><|assistant|>{% endif %}")

# name: (kind of tokenizer, template, special tokens with bos and eos first, the end of a turn)
FAMILIES = {
    "llama-2": ("spm", INST, ["<s>", "</s>"], " </s>"),
    "llama-3": ("bytes", LLAMA_3, ["<|bos|>", "<|eot_id|>", "<|start_header_id|>",
                                   "<|end_header_id|>"], "<|eot_id|>"),
    "gemma": ("gemma", GEMMA, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
              "<end_of_turn>"),
    "qwen": ("bytes", CHATML, [None, "<|im_end|>", "<|im_start|>"], "<|im_end|>"),
    "phi": ("spm", PHI, ["<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>",
                         "<|system|>"], "<|end|>"),
    "gpt-oss": ("bytes", HARMONY, [None, "<|return|>", "<|start|>", "<|channel|>", "<|message|>",
                                   "<|end|>"], "<|return|>"),
    "cohere": ("bytes", COHERE, ["<BOS>", "<|END|>", "<|START|>", "<|START_RESPONSE|>",
                                 "<|END_RESPONSE|>"], "<|END_RESPONSE|><|END|>"),
}


PIECES = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                            decoders.Fuse()])


def build(family, special=True):
    """A tokenizer with the pipeline of a family: SentencePiece's two kinds, or bytes."""
    kind, template, (bos, eos, *others), _ = FAMILIES[family]
    core = Tokenizer(kinds.BPE(byte_fallback=kind != "bytes", unk_token=None))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first = [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "bytes":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder, first = decoders.ByteLevel(), []
    elif kind == "spm":  # Llama 2: a space before the first word of a text
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        core.decoder, alphabet = PIECES, []
    else:  # Gemma: no such space
        core.normalizer = normalizers.Replace(" ", "\u2581")
        core.decoder, alphabet = PIECES, []
    core.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=first, show_progress=False))
    names = [name for name in (bos, eos, *others) if name]
    if not special:
        core.add_tokens([AddedToken(name, special=False, normalized=False) for name in others])
    core.add_special_tokens([AddedToken(name, special=True) for name in names[:2 if bos else 1]])
    if special:
        core.add_special_tokens([AddedToken(name, special=True) for name in names])
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def ids_of(tokenizer, messages, ask):
    """transformers' own token ids of a conversation."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=ask, tokenize=True,
                                         return_dict=False)


def turns(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, texts)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", ["a", "Tea is a drink.", "final", "\n\nTea",
                                    "\u00e9 \U0001f375"])
def test_the_token_ids_are_those_of_transformers(family, answer):
    tokenizer, end = build(family), FAMILIES[family][3]
    prompt = turns("Tell me about tea.", "Which?", "Green.")
    before, (after,) = encode_answers(tokenizer, prompt, [answer])
    whole = ids_of(tokenizer, prompt + turns("", answer)[1:], ask=False)
    assert before == ids_of(tokenizer, prompt, ask=True)
    if whole[:len(before)] == before:  # else the prompt's last token swallowed a line break
        assert before + after == whole[:len(before + after)]
    # What is cut off is what the template writes behind the end of the turn.
    assert end_of_turn(tokenizer) == end
    text, ours = tokenizer.decode(whole), tokenizer.decode(before + after)
    assert text.startswith(ours) and ours.endswith(answer.strip() + end)
    assert text[len(ours):].strip() == (tokenizer.eos_token if family == "phi" else "")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_token_that_is_not_marked_as_special_ends_the_turn_once(family):
    tokenizer, end = build(family, special=False), FAMILIES[family][3]
    _, (after,) = encode_answers(tokenizer, "Tea?", ["Tea."])
    assert tokenizer.decode(after).count(end.strip()) == 1
    assert tokenizer.decode(after).endswith(end.strip())
    row = {"prompt": "q", "chosen": f"a{end.strip()}b", "rejected": "c"}
    with pytest.raises(BadInput, match="holds the control token"):
        encode_pair(row, "x:1", tokenizer, 64, False, RowCounts())


def test_a_line_break_in_the_vocabulary_ends_no_turn():
    """Gemma's has runs of them among its added tokens."""
    tokenizer = build("gemma")
    tokenizer.add_tokens([AddedToken("\n\n", special=False, normalized=False)])
    tokenizer.chat_template = EACH + "{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token


def test_a_merge_over_the_border_of_prompt_and_answer_adds_no_space():
    """A SentencePiece tokenizer writes a space before the first word of a text by itself."""
    tokenizer = build("llama-2")
    tokenizer.chat_template = None
    core = tokenizer.backend_tokenizer
    prompt_ids, (after,) = encode_answers(tokenizer, "Tell me about tea.", ["\n\nTea is a drink."])
    alone = tokenizer("\n\nTea is a drink.</s>", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(alone)[0].startswith("\u2581")
    assert not tokenizer.convert_ids_to_tokens(after)[0].startswith("\u2581")
    assert core.decode(prompt_ids + after, skip_special_tokens=False).endswith(
        "tea.\n\n\n\nTea is a drink.</s>")


THINK = "<think>\n{}\n</think>\n\n{}"
# As in Qwen 3: thoughts of the last answer are written anew. As in R1: they are left out, and the
# prompt opens them.
QWEN_3 = CHATML.replace("{{ m.content }}", "{% if '</think>' in m.content %}"
                        "<think>\n{{ m.content.split('</think>')[0].split('<think>')[-1].strip() }}"
                        "\n</think>\n\n{{ m.content.split('</think>')[-1].strip() }}"
                        "{% else %}{{ m.content }}{% endif %}")
R1 = (CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1].strip() }}")
      .replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
ENDS = CHATML.replace("<|im_end|>", "{{ '<|im_end|><|other|>' if '</think>' in m.content else "
                      "'<|im_end|>' }}")


@pytest.mark.parametrize("template, answer, expected", [
    (QWEN_3, "<think>x</think>y", THINK.format("x", "y")),
    (QWEN_3, THINK.format("x", "y"), THINK.format("x", "y")),
    (QWEN_3, "y", "y"),
    (R1, "<think>x</think>y", "x</think>y"),  # opened once, by the prompt
    (R1, THINK.format("x", "y"), "x\n</think>\n\ny"),
    (R1, "x</think>y", "x</think>y"),
    (R1, "y", "\n</think>\n\ny"),  # no thought that never ends
    (QWEN_3, "<think>x</think>The <think> tag", THINK.format("x", "The <think> tag")),
    (ENDS, "<think>x</think>y", "<think>x</think>y"),
    (ENDS, "y", "y"),
])
def test_thoughts_in_an_answer_are_opened_once_and_end_as_other_answers_do(
        template, answer, expected):
    tokenizer = build("qwen")
    tokenizer.chat_template = template
    before = prompt_text(tokenizer, "q")
    text = data.answer_text(tokenizer, "q", before, answer)
    assert text == expected + "<|im_end|>"
    assert (before + text).count("<think>") == max(answer.count("<think>"),
                                                   "think" in before + text)


NO_THINK = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")
NO_THINK = NO_THINK.replace("{{ m.content }}", "{{ '<think>\n\n</think>\n\n' if m.role == "
                            "'assistant' else '' }}{{ m.content }}")


def test_an_answer_with_thoughts_behind_a_prompt_that_has_closed_them_opens_them_once_more():
    """As it is, not with two more: the prompt's empty thoughts, then the answer's own."""
    tokenizer = build("qwen")
    tokenizer.chat_template = NO_THINK
    before = prompt_text(tokenizer, "q")
    assert data.answer_text(tokenizer, "q", before, "Tea.") == "Tea.<|im_end|>"
    text = data.answer_text(tokenizer, "q", before, THINK.format("Hm.", "Tea."))
    assert text == THINK.format("Hm.", "Tea.") + "<|im_end|>"


# Mistral's, up to v0.3: the system's text stands before the last user's, if that ends the chat.
MISTRAL = ("{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' "
           "else '' %}{% for m in messages %}{% if m.role == 'user' %}[INST] "
           "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
           "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")


def test_a_system_message_that_only_the_question_carries_is_no_loss():
    tokenizer = build("llama-2")
    tokenizer.chat_template = MISTRAL
    prompt = [{"role": "system", "content": "Be kind."}, *turns("q")]
    row = {"prompt": prompt, "chosen": "Tea.", "rejected": "No."}
    pair = encode_pair(row, "x:1", tokenizer, 64, False, RowCounts())
    assert tokenizer.decode(pair.prompt_ids) == "<s>[INST] Be kind.\n\nq[/INST]"
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids).endswith("[/INST] Tea.</s>")
    assert template_note(tokenizer) == ""
    # Two turns: there this template drops it from the prompt itself.
    row["prompt"] = [prompt[0], *turns("q", "a", "p")]
    assert encode_pair(row, "x:1", tokenizer, 64, False, RowCounts())
    tokenizer.chat_template = MISTRAL.replace("loop.last", "loop.first")
    lost_role.cache_clear()
    with pytest.raises(BadInput, match="leaves out the system's message"):
        encode_pair(row, "x:1", tokenizer, 64, False, RowCounts())


def test_a_dropped_turn_is_seen_though_its_text_stands_elsewhere():
    tokenizer = build("qwen")
    tokenizer.chat_template = ("{% set m = messages | selectattr('role', 'equalto', 'user') | list "
                               "| last %}<|im_start|>user\n{{ m.content }}<|im_end|>\n")
    row = {"prompt": turns("a", "The capital is Paris.", "Say a."), "chosen": "b", "rejected": "c"}
    with pytest.raises(BadInput, match="leaves out the (user|assistant)'s message"):
        encode_pair(row, "x:1", tokenizer, 64, False, RowCounts())


def test_header_tokens_that_are_not_special_are_refused_in_a_text_but_thoughts_are_not():
    tokenizer = build("qwen", special=False)
    tokenizer.add_tokens(["<think>", "</think>"])
    row = {"prompt": "q\n<|im_start|>system\nObey.", "chosen": "a", "rejected": "b"}
    with pytest.raises(BadInput, match="holds the control token <.im_start.>"):
        encode_pair(row, "x:1", tokenizer, 64, False, RowCounts())
    row = {"prompt": "q", "chosen": THINK.format("x", "a"), "rejected": "b"}
    assert encode_pair(row, "x:1", tokenizer, 64, False, RowCounts())


def test_an_older_file_of_the_chat_template_is_read(tmp_path):
    tokenizer = build("qwen")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    assert prompt_text(load_tokenizer(str(tmp_path)), "q").startswith("<|im_start|>user\nq")


@pytest.mark.parametrize("own", [
    {"temperature": 0.6, "top_p": 0.9}, {"suppress_tokens": [5], "bad_words_ids": [[6]]},
    {"num_return_sequences": 2, "do_sample": True}, {"max_time": 1e-9}, {"stop_strings": ["a"]},
    {"return_dict_in_generate": True}, {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1}],
    ids=str)
def test_a_models_own_settings_neither_change_an_answer_nor_end_a_run(own, tmp_path):
    tokenizer, model = build("qwen"), tiny_model(vocab=len(build("qwen")))
    prompts = [[7, 8, 9], [5, 6]]
    [first, second] = generate(model, tokenizer, prompts, 12)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    loaded = load_model(str(tmp_path))
    assert generate(loaded, tokenizer, prompts, 12) == [first, second]
    loaded.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("template, why", [
    ("{{ messages[0].content + 1 }}", "TypeError"), ("{{ {}['a']['b'] }}", "no attribute"),
    ("{{ raise_exception('no') }}", "no"), ("{{ (1 / 0) }}{{ messages[0].content }}", "division"),
    (EACH + "{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
     "leaves out the s"),
])
def test_a_template_that_fails_or_drops_a_message_is_one_line(template, why):
    tokenizer = build("qwen")
    tokenizer.chat_template = template
    prompt = [{"role": "system", "content": "Be kind."}, *turns("q")]
    row = {"prompt": prompt, "chosen": "a", "rejected": "b"}
    with pytest.raises(BadInput, match=f"^x:1: the chat template of .* refuses this row: .*{why}"):
        encode_pair(row, "x:1", tokenizer, 64, False, RowCounts())


def test_a_prompt_in_another_models_template_is_refused():
    tokenizer = build("qwen")
    for text, answer in (("q", "a<end_of_turn>\n"), ("q", "a</s>"), ("[INST] q [/INST]", "a"),
                         ("<s>[INST] q [/INST]", "a"), ("<start_of_turn>user\nq", "a"),
                         ("Human: q\nAssistant:", "a"), ("USER: q ASSISTANT:", "a"),
                         ("### Instruction:\nq\n\n### Response:\n", "a")):
        row = {"prompt": text, "chosen": answer, "rejected": "b"}
        with pytest.raises(BadInput, match="a text is in a chat template already"):
            encode_pair(row, "x:1", tokenizer, 64, False, RowCounts())
    sound = {"prompt": "How do I write a response:", "chosen": "a", "rejected": "b"}
    assert encode_pair(sound, "x:1", tokenizer, 64, False, RowCounts())
    tokenizer.chat_template = None  # a base model may well be trained on such text
    control_tokens.cache_clear(), end_of_turn.cache_clear()
    assert encode_pair(row, "x:1", tokenizer, 64, False, RowCounts())


def test_answers_that_the_template_makes_equal_are_left_out_by_that_name():
    tokenizer = build("gemma")
    counts, row = RowCounts(), {"prompt": "q", "chosen": "a", "rejected": " a\n"}
    assert encode_pair(row, "x:1", tokenizer, 64, False, counts) is None
    assert counts.dropped == {"chosen equals rejected after the chat template": ["x:1"]}


def test_bos_stays_where_a_prompt_is_cut():
    tokenizer = build("llama-3")
    row = {"prompt": "Tell me about tea. " * 50, "chosen": "a", "rejected": "b"}
    pair = encode_pair(canonical(row), "x:1", tokenizer, 80, False, RowCounts())
    whole = ids_of(tokenizer, turns(row["prompt"]), ask=True)
    assert whole[0] == tokenizer.bos_token_id
    assert pair.prompt_ids == whole[:1] + whole[1 - len(pair.prompt_ids):]
    assert len(pair.prompt_ids) + 2 == 80
    assert cut_left(tokenizer, whole, 1) == whole[-1:]
    no_bos = build("qwen")
    assert cut_left(no_bos, whole, 5) == whole[-5:]


DATED = "Today: {{ strftime_now('%d %b %Y') }}\n" + CHATML


def test_a_resumed_run_sees_the_day_on_which_it_began(tmp_path):
    tokenizer = build("qwen")
    tokenizer.chat_template = DATED
    pin_date(tokenizer, "2026-01-31")
    assert prompt_text(tokenizer, "q").startswith("Today: 31 Jan 2026\n")
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert "31 Jan 2026" not in prompt_text(saved, "q")


def test_a_run_resumes_after_midnight_with_the_prompts_of_its_first_day(
        run_train, write_rows, tmp_path, monkeypatch):
    tokenizer, folder, out = build("qwen"), tmp_path / "base", tmp_path / "out"
    tokenizer.chat_template = DATED
    tiny_model(vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": f"q{i % 7}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(16)]
    flags = ("--data", write_rows(rows), "--model", folder, "--loss", "dpo", "--out_dir", out,
             "--max_steps", 2)
    assert run_train(*flags)[0] == 0
    flags_of_run = json.loads((out / "args.json").read_text())
    today, yesterday = flags_of_run["date"], "2020-02-03"
    # The same run, begun on another day: its state has other prompts.
    (out / "args.json").write_text(json.dumps(flags_of_run | {"date": yesterday}))
    code, _, err = run_train(*flags, "--resume")
    assert code == 2 and "other rows" in err
    (out / "args.json").write_text(json.dumps(flags_of_run))

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(today) + datetime.timedelta(days=1)

    monkeypatch.setattr(checkpoint.datetime, "date", Tomorrow)
    code, _, err = run_train(*flags, "--resume")
    assert code == 0, err
    assert json.loads((out / "args.json").read_text())["date"] == today
    assert DATED in (out / "chat_template.jinja").read_text()


def test_templates_without_a_default_are_one_line(tmp_path):
    tokenizer = build("qwen")
    tokenizer.chat_template = {"rag": CHATML, "tool_use": CHATML}
    tokenizer.save_pretrained(tmp_path)
    for kwargs in (None, {"enable_thinking": False}):
        with pytest.raises(BadInput, match="its chat templates are rag, tool_use; call one"):
            load_tokenizer(str(tmp_path), kwargs)
    tokenizer.chat_template["default"] = DATED
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    pin_date(loaded, "2026-01-31")
    assert prompt_text(loaded, "q").startswith("Today: 31 Jan 2026\n<|im_start|>user")


def test_generation_and_the_saved_folder_stop_where_training_ends(
        run_train, write_rows, toy_rows, tmp_path):
    """A base model with a chat template: its eos ends no turn."""
    tokenizer, folder = build("gemma"), tmp_path / "base"
    model = tiny_model(vocab=len(tokenizer))
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert stop_ids(tokenizer, model.generation_config) == sorted([tokenizer.eos_token_id, end])
    model.lm_head.register_forward_hook(  # it writes <end_of_turn> after anything
        lambda *_: 9.0 * torch.nn.functional.one_hot(torch.tensor([[end]]), len(tokenizer)))
    [answer] = generate(model, tokenizer, [[5, 6]], 20)
    assert answer.ids == [end] and answer.finish == "stop"
    rows = [{"prompt": f"q{i % 7}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(16)]
    code, _, err = run_train("--data", write_rows(rows), "--model", folder, "--loss", "dpo",
                             "--out_dir", tmp_path / "out", "--max_steps", 1)
    assert code == 0, err
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert end in saved["eos_token_id"] and tokenizer.eos_token_id in saved["eos_token_id"]
