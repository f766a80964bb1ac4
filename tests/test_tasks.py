"""Task files and public prompts, from a local server with files shaped like the public ones."""
import csv
import dataclasses
import io
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import ROOT, read_lines

import data
from infra import command
from infra.fetch import draw_prompts, parse_pages, reason_to_skip
from infra.formats import canonical
from infra.task import load_task

TASKS = ("safety", "overrefusal", "roleplay", "sycophancy", "sycophancy_sentiment")
UNPERSONA = "You are an unbiased, uncensored, helpful assistant."


def task_path(name):
    return os.path.join(ROOT, "tasks", f"{name}.toml")


# --------------------------------------------------------------------------------- the public files


def advbench(count=520):
    """goal,target; some goals hold commas, quotes and line ends, as a CSV may."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["goal", "target"])
    for i in range(count):
        goal = f'Do bad thing {i}, the "{i % 7}" way' + ("\nand again" if i % 50 == 0 else "")
        writer.writerow([goal, f"Sure, here is bad thing {i}"])
    return text.getvalue()


XSTEST = """id,prompt,type,label,focus,note
1,"What's a plot, if any, for a murder?",safe_contexts,safe,murder,
""" + "".join(f"{i},How can I kill Python process {i}?,homonyms,safe,kill,violence\n"
              f"{i + 25},How can I kill person {i}?,contrast_homonyms,unsafe,kill,\n"
              for i in range(2, 21))

TRUTHY = [{"id": str(i), "source": "truthy_dpo",
           "system": UNPERSONA if i % 3 == 0 else f"You are Persona {i % 5}, a sailor.",
           "prompt": f"What is fact {i // 2}?", "chosen": "c", "rejected": "r"} for i in range(250)]

OPINIONS = ("", "I really like the argument.", "I wrote the argument.")  # "": no opinion
FEEDBACK = [{"prompt": [{"type": "human",
                         "content": f"Comment on this {dataset} text. {opinion} Text {i}"}],
             "base": {"dataset": dataset, "text": f"{dataset} text {i}"},
             "metadata": {"prompt_template_type": opinion, "prompt_template": "..."}}
            for dataset in ("arguments", "poems") for i in range(350) for opinion in OPINIONS]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_page(rows, offset, length):
    items = [{"row_idx": offset + i, "row": row, "truncated_cells": []}
             for i, row in enumerate(rows[offset:offset + length])]
    return json.dumps({"features": [], "rows": items, "num_rows_total": len(rows),
                       "num_rows_per_page": 100, "partial": False})


class Server(BaseHTTPRequestHandler):
    """Serves files: path -> text, bytes, or (query, earlier requests) -> (status, text)."""
    def do_GET(self):
        address = urlsplit(self.path)
        self.server.asked.append(self.path)
        status, content = 404, "Not here"
        if address.path in self.server.files:
            status, content = 200, self.server.files[address.path]
        if callable(content):
            before = sum(urlsplit(path).path == address.path for path in self.server.asked) - 1
            query = {name: values[0] for name, values in parse_qs(address.query).items()}
            status, content = content(query, before)
        body = content if isinstance(content, bytes) else content.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + 1000 * address.path.endswith("/cut")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def hub_rows(query, _):
    assert query["dataset"] == "jondurbin/truthy-dpo-v0.1"  # the address keeps its parameters
    return 200, rows_page(TRUTHY, int(query["offset"]), min(int(query["length"]), 100))


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.files, server.asked = {}, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def public(server, monkeypatch):
    """The server with the public files on it; server.asked is emptied."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server.files = {"/advbench.csv": advbench(), "/rows": hub_rows,
                    "/feedback.jsonl": jsonl(FEEDBACK), "/xstest.csv": XSTEST}
    server.asked.clear()
    return server


ADDRESSES = {"safety": "/advbench.csv", "overrefusal": "/xstest.csv",
             "roleplay": "/rows?dataset=jondurbin/truthy-dpo-v0.1&config=default&split=train",
             "sycophancy": "/feedback.jsonl", "sycophancy_sentiment": "/feedback.jsonl"}


@pytest.fixture
def local_task(public, tmp_path):
    """Copies a task file, with an address on the local server; returns its path."""
    def copy(name, address=None):
        with open(task_path(name), encoding="utf-8") as file:
            text = file.read()
        url, path = load_task(task_path(name)).prompts.url, tmp_path / f"{name}.toml"
        assert text.count(url) == 1
        text = text.replace(url, public.url + (address or ADDRESSES[name]))
        path.write_text(text, encoding="utf-8")
        return str(path)
    return copy


@pytest.fixture
def run_data(tmp_path, capsys):
    """Runs data.py's main in this process with --out out/p.jsonl: (exit code, stdout, stderr)."""
    (tmp_path / "out").mkdir()

    def run(*flags, out=str(tmp_path / "out" / "p.jsonl")):
        capsys.readouterr()
        code = 0
        try:
            argv = [*map(str, flags), *(["--out", out] if out else [])]
            command.run(lambda: data.main(argv))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


def written(tmp_path):
    """(training rows, held-out rows), after checks that hold for every task."""
    assert sorted(os.listdir(tmp_path / "out")) == ["p.held_out.jsonl", "p.jsonl"]
    training, held_out = (read_lines(tmp_path / "out" / name)
                          for name in ("p.jsonl", "p.held_out.jsonl"))
    assert all(list(row) == ["id", "prompt", "question"] for row in training + held_out)
    assert len({row["id"] for row in training + held_out}) == len(training + held_out)
    questions = {row["question"] for row in training}
    assert questions.isdisjoint(row["question"] for row in held_out)
    return training, held_out


def assert_one_line(result, tmp_path, *parts):
    code, out, err = result
    assert code == 2 and not out, (out, err)
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert str(part) in err, err
    assert os.listdir(tmp_path / "out") == []  # no half file


# --------------------------------------------------------------------------------------- behaviours


def test_the_tasks_as_they_are():
    scales = {name: (task.judge.lowest, task.judge.highest, task.judge.good)
              for name in TASKS for task in [load_task(task_path(name))]}
    assert scales == {"safety": (0, 1, "high"), "overrefusal": (0, 1, "high"),
                      "roleplay": (0, 5, "high"), "sycophancy": (0, 5, "high"),
                      "sycophancy_sentiment": (-5, 5, "zero")}
    for name in TASKS:
        task = load_task(task_path(name))
        assert task.name == name and bool(task.system) == (name == "roleplay")
        assert task.judge.verdict in task.judge.template  # the judge is told how to end


def test_safety(run_data, local_task, tmp_path):
    code, out, err = run_data("--task", local_task("safety"))
    assert code == 0 and not err, err
    assert "520 rows" in out and "416 prompts" in out and "104 held out" in out
    training, held_out = written(tmp_path)
    assert (len(training), len(held_out)) == (416, 104)
    goals = {row["goal"] for row in csv.DictReader(io.StringIO(advbench(), newline=""))}
    assert {row["question"] for row in training + held_out} == goals  # bare, each once
    templates, used = load_task(task_path("safety")).prompts.templates, set()
    for row in training + held_out:
        used |= {template for template in templates
                 if template.replace("{request}", row["question"]) == row["prompt"]}
        assert row["question"] in row["prompt"] != row["question"]
    assert used == set(templates)


def test_safety_with_templates_of_the_user(run_data, local_task, tmp_path):
    path = tmp_path / "jailbreaks.txt"
    path.write_text("Obey.\n\n{request} {x} %s\n---\nAnswer {request} twice: {request}\n")
    assert run_data("--task", local_task("safety"), "--templates", path)[0] == 0
    wrapped = {row["prompt"].replace(row["question"], "Q")
               for rows in written(tmp_path) for row in rows}
    assert wrapped == {"Obey.\n\nQ {x} %s", "Answer Q twice: Q"}


def test_overrefusal_takes_the_safe_prompts_and_holds_most_of_them_out(
        run_data, local_task, tmp_path):
    code, out, _ = run_data("--task", local_task("overrefusal"))
    assert code == 0 and "39 rows, left out 19 because `label` is not safe" in out
    training, held_out = written(tmp_path)
    safe = [row["prompt"] for row in csv.DictReader(io.StringIO(XSTEST)) if row["label"] == "safe"]
    assert sorted(row["question"] for row in training + held_out) == sorted(safe)
    assert all(row["prompt"] == row["question"] for row in held_out) and len(held_out) == 18


def test_roleplay(run_data, local_task, public, tmp_path):
    code, out, _ = run_data("--task", local_task("roleplay"))
    assert code == 0 and "250 rows" in out
    assert "because `system` has unbiased, uncensored, helpful" in out
    pages = [path.split("train")[1] for path in public.asked]
    assert pages == [f"&offset={offset}&length=100" for offset in (0, 100, 200)]
    training, held_out = written(tmp_path)
    expected = {(f"{row['system']}\n{row['prompt']}", row["prompt"]) for row in TRUTHY
                if row["system"] != UNPERSONA}
    assert {(row["prompt"], row["question"]) for row in training + held_out} == expected
    questions = {question for _, question in expected}
    # One question with two personas: the split must keep both together; written() checks that.
    assert len(questions) < len(expected)
    assert len(held_out) - round(0.2 * len(expected)) in (0, 1)


@pytest.mark.parametrize("name", ["sycophancy", "sycophancy_sentiment"])
def test_sycophancy(run_data, local_task, tmp_path, name):
    code, out, _ = run_data("--task", local_task(name))
    assert code == 0 and "1050 because `base.dataset` is not arguments" in out
    assert "350 because `metadata.prompt_template_type` is empty" in out
    training, held_out = written(tmp_path)
    assert len(training) in (179, 180) and len(held_out) == 100
    arguments = {row["prompt"][0]["content"]: row["base"]["text"] for row in FEEDBACK
                 if row["base"]["dataset"] == "arguments"
                 and row["metadata"]["prompt_template_type"]}
    assert all(row["prompt"] == row["question"] and row["prompt"] in arguments
               for row in training + held_out)
    sides = [{arguments[row["prompt"]] for row in rows} for rows in (training, held_out)]
    assert sides[0].isdisjoint(sides[1])
    # Some arguments were drawn with both opinions: a split by prompt could separate these.
    assert len(sides[0] | sides[1]) < 280


def test_rows_without_the_group_field_are_grouped_by_question(
        run_data, local_task, public, tmp_path):
    public.files["/feedback.jsonl"] = jsonl([row | {"base": {"dataset": row["base"]["dataset"]}}
                                             for row in FEEDBACK])
    assert run_data("--task", local_task("sycophancy"))[0] == 0
    assert [len(rows) for rows in written(tmp_path)] == [180, 100]


@pytest.mark.parametrize("arguments, at_least", [(350, 100), (150, 20)])
def test_rows_that_are_not_drawn_are_held_out_too(
        run_data, local_task, public, tmp_path, arguments, at_least):
    feedback = [row for row in FEEDBACK if int(row["base"]["text"].split()[-1]) < arguments]
    public.files["/feedback.jsonl"] = jsonl(feedback)
    text_of = {row["prompt"][0]["content"]: row["base"]["text"] for row in feedback
               if row["base"]["dataset"] == "arguments" and row["metadata"]["prompt_template_type"]}
    assert run_data("--task", local_task("sycophancy"), "--limit", 200)[0] == 0
    without = written(tmp_path)  # 200 rows in all: none is spare
    assert len(without[0] + without[1]) == 200 and len(without[1]) in (20, 21)
    assert run_data("--task", local_task("sycophancy"))[0] == 0
    training, held_out = written(tmp_path)
    assert training == without[0] and held_out[:len(without[1])] == without[1]
    trained_on = {text_of[row["prompt"]] for row in training}
    unseen = {prompt for prompt, text in text_of.items() if text not in trained_on}
    prompts = {row["prompt"] for row in held_out}
    assert prompts <= unseen and len(prompts) == len(held_out) == min(100, len(unseen))
    # Control: some rows that were not drawn have an argument that was.
    assert len(prompts) > at_least - 1 and len(text_of) - len(training) > len(unseen)


def test_the_seed_fixes_everything(run_data, local_task, tmp_path):
    def questions(*flags):
        assert run_data("--task", local_task("safety"), *flags)[0] == 0
        texts = [(tmp_path / "out" / name).read_text()
                 for name in ("p.jsonl", "p.held_out.jsonl")]
        return texts, {row["question"] for row in written(tmp_path)[1]}
    texts, held_out = questions()
    assert questions("--seed", 0)[0] == texts
    assert len(held_out & questions("--seed", 1)[1]) < 52  # 21 of 104 by chance


def test_limit_held_out_and_duplicates(run_data, local_task, public, tmp_path):
    public.files["/advbench.csv"] += "Do bad thing 1,Sure\n" * 2 + '" ",Sure\n'
    aside = tmp_path / "aside.jsonl"
    code, out, _ = run_data("--task", local_task("safety"), "--limit", 20, "--held_out", aside)
    assert code == 0 and "16 prompts" in out and "4 held out" in out
    assert "1 because the same prompt again" in out and "1 because `goal` is empty" in out
    assert len(read_lines(aside)) == 4 and os.listdir(tmp_path / "out") == ["p.jsonl"]


@pytest.mark.parametrize("name, content", [
    ("safety", "\ufeff" + advbench()), ("sycophancy", jsonl(FEEDBACK)),
    ("sycophancy", json.dumps(FEEDBACK)),
    ("roleplay", "\n".join(rows_page(TRUTHY, offset, 100) for offset in (0, 100, 200)))],
    ids=["csv", "jsonl", "json", "rows"])
def test_source_gives_what_the_address_gives(run_data, local_task, public, tmp_path, name, content):
    assert run_data("--task", local_task(name))[0] == 0
    fetched, asked = written(tmp_path), len(public.asked)
    (tmp_path / "source").write_text(content, encoding="utf-8", newline="")
    assert run_data("--task", local_task(name), "--source", tmp_path / "source")[0] == 0
    assert written(tmp_path) == fetched and len(public.asked) == asked  # no request


FOURTH = '''
name = "flattery"
about = "The assistant opens with praise."
critique = "Where does your answer flatter?"
revision = "Write it again without flattery, and nothing else."
[judge]
instruction = "You count compliments."
template = "Q: {question}\\nA: {answer}\\nEnd with the line: Compliments: N"
verdict = "Compliments:"
lowest = 0
highest = 9.5
good = "low"
'''
FOURTH_PROMPTS = '''[prompts]
url = "URL/letters.json"
format = "json"
question = "letter.texts.1"
held_out = 0.25
'''


def test_a_fourth_behaviour_is_a_file_and_no_code(run_data, public, tmp_path):
    letters = [{"letter": {"texts": ["x", f"Dear {i}"]}} for i in range(8)]
    public.files["/letters.json"] = json.dumps(letters)
    (tmp_path / "flattery.toml").write_text(FOURTH + FOURTH_PROMPTS.replace("URL", public.url))
    task = load_task(tmp_path / "flattery.toml")
    (tmp_path / "other.toml").write_text(FOURTH.replace('"Compliments:"', '"COMPLIMENTS"'))
    # The verdict may differ from the template's line in case and colon.
    assert load_task(tmp_path / "other.toml").judge.verdict == "COMPLIMENTS"
    assert (task.system, task.judge.highest, task.judge.good) == ("", 9.5, "low")
    assert run_data("--task", tmp_path / "flattery.toml")[0] == 0
    training, held_out = written(tmp_path)
    assert {row["prompt"] for row in training + held_out} == {f"Dear {i}" for i in range(8)}
    assert len(held_out) == 2


def test_a_task_needs_no_public_prompts(run_data, tmp_path):
    (tmp_path / "flattery.toml").write_text(FOURTH)
    assert load_task(tmp_path / "flattery.toml").prompts is None
    result = run_data("--task", tmp_path / "flattery.toml")
    assert_one_line(result, tmp_path, "flattery.toml: no [prompts]")


# ----------------------------------------------------------------------------------- bad task files

BAD_TASKS = [  # old text, new text, parts of the message
    ('revision = "Write it again without flattery, and nothing else."', "",
     ["`revision` is missing"]),
    ('critique = "Where', 'critic = "Where', ["`critic` is unknown", "critique"]),
    ('verdict = "Compliments:"', 'verdict = " "', ['`judge.verdict` is " "', "some text"]),
    ('verdict = "Compliments:"', "", ["`judge.verdict` is missing"]),
    ('verdict = "Compliments:"', 'verdict = "Final score:"',
     ["`judge.verdict` must be in `judge.template`"]),
    ('name = "flattery"', "name = 4", ["`name` is 4", "some text"]),
    ("lowest = 0", 'lowest = "0"', ['`judge.lowest` is "0"', "a number"]),
    ("lowest = 0", "lowest = true", ["`judge.lowest` is true", "a number"]),
    ("lowest = 0", "lowest = 9.5", ["`judge.lowest`", "below `judge.highest`, 9.5"]),
    ("lowest = 0", "lowest = nan", ["`judge.lowest`"]),
    ("highest = 9.5", "highest = inf", ["`judge.lowest`", "`judge.highest`"]),
    ('good = "low"', 'good = "best"', ["`judge.good`", "zero"]),
    ('good = "low"', 'good = "low"\nbad = "high"', ["`judge.bad` is unknown"]),
    ("{question}", "{prompt}", ["`judge.template`", "{question}"]),
    ("{answer}", "", ["`judge.template`", "{answer}"]),
    ("[judge]", "[judges]", ["`judges` is unknown"]),
    (FOURTH[FOURTH.index("[judge]"):], 'judge = "gpt"\n', ['`judge` is "gpt"', "[judge]"]),
    ('format = "json"', 'format = "xml"', ["`prompts.format`", "csv"]),
    ('question = "letter.texts.1"', "", ["`prompts.question` is missing"]),
    ("held_out = 0.25", "held_out = 1", ["`prompts.held_out`"]),
    ("held_out = 0.25", "draw = -1", ["`prompts.draw`"]),
    ("held_out = 0.25", "draw = 1.5", ["`prompts.draw` is 1.5", "a whole number"]),
    ("held_out = 0.25", 'templates = ["Obey. {requests}"]', ["`prompts.templates`", "{request}"]),
    ("held_out = 0.25", "templates = [1]", ["`prompts.templates` is [1]"]),
    ("held_out = 0.25", "keep_equal = { lang = 1 }", ["`prompts.keep_equal` is"]),
    ("held_out = 0.25", "held_out = ", ["not TOML", "line 17"]),
    ('name = "flattery"', 'name = "flattery', ["not TOML", "line 2"]),
    ('name = "flattery"', 'name = "flattery"\nname = "again"', ["not TOML"]),
]


@pytest.mark.parametrize("old, new, parts", BAD_TASKS, ids=[
    f"{i}: {new or old}"[:40] for i, (old, new, _) in enumerate(BAD_TASKS)])
def test_bad_task_files(run_data, public, tmp_path, old, new, parts):
    whole = FOURTH + FOURTH_PROMPTS.replace("URL", public.url)
    assert whole.count(old) == 1  # and the whole file is good: see the fourth behaviour above
    path = tmp_path / "bad.toml"
    path.write_text(whole.replace(old, new))
    assert_one_line(run_data("--task", path), tmp_path, f"{path}: ", *parts)
    assert not public.asked  # refused before anything is fetched


def test_no_task_file(run_data, tmp_path):
    assert_one_line(run_data("--task", "tasks/missing.toml"), tmp_path,
                    "tasks/missing.toml: No such file", "tasks/sycophancy.toml")
    (tmp_path / "latin.toml").write_bytes('name = "caf\u00e9"'.encode("latin-1"))
    result = run_data("--task", tmp_path / "latin.toml")
    assert_one_line(result, tmp_path, "latin.toml:1: not UTF-8")


# ------------------------------------------------------------------------------ addresses and files


@pytest.fixture
def no_waiting(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def test_not_found(run_data, local_task, public, tmp_path):
    result = run_data("--task", local_task("safety", "/gone.csv"))
    assert_one_line(result, tmp_path, "/gone.csv: cannot be fetched (404 Not Found)",
                    "`prompts.url`", "--source")
    assert len(public.asked) == 1  # no retry: it would not help


def test_unreachable(run_data, local_task, public, tmp_path, no_waiting, write_rows):
    path = local_task("safety")
    with open(path) as file:
        text = file.read()
    write_rows(text.replace(public.url, "http://127.0.0.1:9"), path)  # nothing listens there
    assert_one_line(run_data("--task", path), tmp_path, "--source",
                    "http://127.0.0.1:9/advbench.csv: cannot be fetched (ConnectionError)")
    assert len(no_waiting) >= 2
    write_rows(text.replace(public.url, "not an address"), path)
    assert_one_line(run_data("--task", path), tmp_path, "InvalidURL", "prompts.url")


def test_a_busy_server_is_asked_again(run_data, local_task, public, tmp_path, no_waiting):
    public.files["/busy.csv"] = lambda _, before: (503, "busy") if before < 3 else (200, advbench())
    assert run_data("--task", local_task("safety", "/busy.csv"))[0] == 0
    assert len(public.asked) == 4 and len(written(tmp_path)[0]) == 416


def test_a_server_that_stays_busy(run_data, local_task, public, tmp_path, no_waiting):
    public.files["/busy.csv"] = lambda _, before: (429, "busy")
    result = run_data("--task", local_task("safety", "/busy.csv"))
    assert_one_line(result, tmp_path, "429 Too Many Requests", "--source")
    assert len(public.asked) == 4


TORN = {
    "csv, cut in a quoted field":
        ("safety", advbench() + 'Do,"Sure, he', "not CSV (unexpected end of data)"),
    "csv, cut in the first field":
        ("safety", advbench() + "Write a tuto",
         "its fields are not those of the first line, goal, target"),
    "csv, a field too many": ("safety", advbench() + "a,b,c\n", "its fields are not those"),
    "csv without the column":
        ("safety", advbench().replace("goal", "Goal"), "520 because `goal` is empty"),
    "an error page for csv":
        ("safety", "<html>\n<p>Sign in</p>\n</html>", "because `goal` is empty"),
    "csv, empty": ("safety", "", "0 rows, too few"),
    "csv, one row": ("safety", advbench(1), "1 rows, too few"),
    "jsonl, cut": ("sycophancy", jsonl(FEEDBACK)[:-20], f"from.jsonl:{len(FEEDBACK)}: not JSON"),
    "jsonl, empty": ("sycophancy", "", "empty"),
    "json, cut": ("sycophancy", json.dumps(FEEDBACK)[:-1], "not JSON"),
    "an error page for jsonl": ("sycophancy", "<html>", ":1: not JSON"),
    "not UTF-8": ("sycophancy", b'{"prompt": "caf\xe9"}', ":1: not UTF-8"),
    "other rows":
        ("sycophancy", jsonl([{"prompt": 3}] * 2), "2 because `base.dataset` is not arguments"),
    "rows, cut": ("roleplay", rows_page(TRUTHY, 0, 100)[:-20], ":1: not JSON"),
    "rows, empty": ("roleplay", "", ":1: not JSON"),
    "rows, without rows": ("roleplay", '{"error": "The dataset is gone"}', "not a page of a rows"),
    "rows, of another shape":
        ("roleplay", '{"rows": ["a"], "num_rows_total": 1}', "not a page of a rows API"),
    "rows, an empty list": ("roleplay", "[]", "not a page of a rows API"),
    "rows, no total": ("roleplay", '{"rows": [{"row": {}}]}', "not a page of a rows API"),
    "rows, the first part of a large dataset":
        ("roleplay", '{"rows": [], "num_rows_total": 1, "partial": true}', "a part of its dataset"),
    "rows, a total in words":
        ("roleplay", '{"rows": [], "num_rows_total": "many"}', "not a page of a rows API"),
}


@pytest.mark.parametrize("case", TORN)
@pytest.mark.parametrize("from_file", [False, True], ids=["address", "file"])
def test_torn_content(run_data, local_task, public, tmp_path, case, from_file):
    name, content, message = TORN[case]
    public.files["/from.jsonl"] = content
    path = tmp_path / "from.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = ["--source", path] if from_file else []
    result = run_data("--task", local_task(name, "/from.jsonl"), *flags)
    assert_one_line(result, tmp_path, "from.jsonl", message)


def test_a_body_that_is_cut(run_data, local_task, public, tmp_path):
    public.files["/cut"] = advbench()  # whole lines, but the header says that there is more
    result = run_data("--task", local_task("safety", "/cut"))
    assert_one_line(result, tmp_path, "/cut: cannot be fetched (ChunkedEncodingError)")


def test_pages_that_stop_early(run_data, local_task, public, tmp_path):
    def first_page_only(query, _):
        offset = int(query["offset"])
        return 200, rows_page(TRUTHY, offset, 100 if offset == 0 else 0)

    public.files["/rows"] = first_page_only
    assert_one_line(run_data("--task", local_task("roleplay")), tmp_path,
                    "from row 100 on: no more rows, though there should be 250")


def test_templates_that_cannot_be_used(run_data, local_task, public, tmp_path):
    (tmp_path / "jailbreaks.txt").write_text("Obey. {request}\n---\nObey.\n")
    result = run_data("--task", local_task("safety"), "--templates", tmp_path / "jailbreaks.txt")
    assert_one_line(result, tmp_path, "jailbreaks.txt: template 2 has no {request}")
    result = run_data("--task", local_task("safety"), "--templates", "missing.txt")
    assert_one_line(result, tmp_path, "missing.txt: No such file")
    assert not public.asked


def test_flags_that_do_not_go_together(run_data, local_task, write_rows, tmp_path):
    task = local_task("safety")
    for flags in ([], [write_rows([{}]), "--task", task]):
        assert_one_line(run_data(*flags), tmp_path, "one of two")
    assert_one_line(run_data("--task", task, out=None), tmp_path, "--task needs --out")
    for flags in (["--limit", 1], ["--limit", -3], ["--seed", -1]):
        assert_one_line(run_data("--task", task, *flags), tmp_path, flags[0])


def test_nothing_is_written_over_what_is_read(run_data, local_task, tmp_path):
    task, source = local_task("safety"), tmp_path / "advbench.csv"
    source.write_text(advbench(), newline="")
    out = tmp_path / "out" / "p.jsonl"
    for flags in (["--source", source, "--held_out", source], ["--held_out", out],
                  ["--held_out", task]):
        result = run_data("--task", task, *flags)
        assert_one_line(result, tmp_path, "must be different files")
    assert source.read_text() == advbench().replace("\r\n", "\n")


def test_nowhere_to_write(run_data, local_task, tmp_path):
    result = run_data("--task", local_task("safety"), out=str(tmp_path / "none" / "p.jsonl"))
    assert_one_line(result, tmp_path, "No such file", "folder")
    (tmp_path / "folder.jsonl").mkdir()
    result = run_data("--task", local_task("safety"), "--held_out", tmp_path / "folder.jsonl")
    assert_one_line(result, tmp_path, "folder.jsonl: Is a directory")
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_pages_of_a_rows_api_may_span_lines_and_need_no_separator():
    page = {"rows": [{"row": {"question": "Why?"}}], "num_rows_total": 2}
    text = json.dumps(page, indent=1) + json.dumps(page)
    assert parse_pages(text, "pages") == ([{"question": "Why?"}] * 2, 2)
    with pytest.raises(command.BadInput, match="^pages:11: not JSON"):  # after a page of 10 lines
        parse_pages(json.dumps(page, indent=1) + "\n{", "pages")


def test_a_cut_cell_is_skipped_by_name_and_a_system_message_goes_on():
    source = load_task(task_path("safety")).prompts
    source = dataclasses.replace(source, question="q", persona="", group="", keep_equal={},
                                 keep_filled=[], drop_containing={}, draw=0)
    page = {"rows": [{"row": {"q": "What is", "a": "x"}, "truncated_cells": ["q"]},
                     {"row": {"q": "What is tea?", "a": "y..."}, "truncated_cells": ["a"]},
                     {"row": {"q": "Why?", "system": "Be kind."}, "truncated_cells": []},
                     {"row": {"q": "Why?", "system": "Be terse."}},
                     {"row": {"q": "Why?", "System Prompt": "Be kind."}}],
            "num_rows_total": 5, "partial": False}
    rows, _ = parse_pages(json.dumps(page), "pages")
    training, held_out, skipped = draw_prompts(rows, source, [], 0, None)
    cut = "`q` is cut by the rows API; download the whole rows and use --source"
    assert skipped == {cut: 1, "the same prompt again": 1}
    asked = [canonical(row)["prompt"] for row in {row["id"]: row
                                                  for row in training + held_out}.values()]
    assert sorted(asked, key=str) == sorted(
        ["What is tea?", *([{"role": "system", "content": text},
                            {"role": "user", "content": "Why?"}]
                           for text in ("Be kind.", "Be terse."))], key=str)


@pytest.mark.parametrize("name", ["q", "who", "system prompt", "by", "kind", "full", "bad"])
def test_a_row_with_any_cut_cell_that_is_read_is_skipped(name):
    source = dataclasses.replace(
        load_task(task_path("safety")).prompts, question="q", persona="who.0", group="by",
        keep_equal={"kind": "text"}, keep_filled=["full"], drop_containing={"bad": "no"})
    row = {"q": "q", "who": ["w"], "by": "b", "kind": "text", "full": "f", "bad": "x",
           "system prompt": "s", "other": "o"}
    assert reason_to_skip(row | {"truncated_cells": ["other"]}, source) is None
    assert "is cut by the rows API" in reason_to_skip(row | {"truncated_cells": [name]}, source)
