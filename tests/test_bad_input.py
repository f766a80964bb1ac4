"""Bad input: one line on stderr with place and remedy, exit code 2, nothing computed or lost."""
import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from conftest import ROOT, assert_one_line, tiny_model

import data
import infra.rows
import train
from infra import models
from infra.models import TOY_STUDENT, load_tokenizer
from infra.rounding import Masters

ROW = {"prompt": "Tell me about tea.", "chosen": "Tea is a drink.", "rejected": "No.",
       "score_chosen": 4, "score_rejected": 1}


def rows_with(count=1000, **changes):
    """Good rows but for row 500 (or the middle one)."""
    rows = [ROW | {"prompt": f"Tell me about tea number {i}."} for i in range(count)]
    middle = rows[count // 2 - 1] | changes
    rows[count // 2 - 1] = {name: value for name, value in middle.items() if value != "MISSING"}
    return rows


@pytest.fixture
def run_train(run_train):
    """Runs train.py, and leaves out the warning that these rows are not of the toy's world."""
    def run(*flags):
        code, out, err = run_train(*flags)
        return code, out, re.sub("warning: this trains the toy student.*\n", "", err)
    return run


USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hi"}
BAD_ROWS = {
    "torn JSON": ('{"prompt": "a", "chos', "not JSON"),
    "a list of numbers": ("[1, 2, 3]", "item 1: a row must be a JSON object"),
    "a line that is a number": ("17\n", "must be a JSON object"),
    "torn list": (json.dumps([ROW])[:-1], "not JSON"),
    "torn item of a list": (json.dumps([ROW])[:-9], "not JSON"),
    "empty file": ("", "file is empty"),
    "blank file": ("\n \n", "file is empty"),
    "missing prompt": (rows_with(prompt="MISSING"), "no `prompt`"),
    "missing chosen": (rows_with(chosen="MISSING"), "no `chosen`"),
    "missing rejected": (rows_with(rejected="MISSING"), "no `rejected`"),
    "prompt is a number": (rows_with(prompt=5), "`prompt` is a int"),
    "chosen is null": (rows_with(chosen=None), "`chosen` is a NoneType"),
    "empty text": (rows_with(rejected="  "), "`rejected` is empty"),
    "empty list": (rows_with(prompt=[]), "`prompt` is empty"),
    "messages without roles": (rows_with(prompt=["hello"]), "must hold messages"),
    "prompt ends with the assistant": (rows_with(prompt=[ASSISTANT]), "must be the user's"),
    "two answers": (rows_with(chosen=[ASSISTANT] * 2), "one assistant message"),
    "an answer of the user": (rows_with(chosen=[USER]), "one assistant message"),
    "no score": (rows_with(score_chosen="MISSING"), "no `score_chosen`"),
    "text score": (rows_with(score_chosen="4"), "must be a finite number"),
    "true score": (rows_with(score_rejected=True), "must be a finite number"),
    "NaN score": (rows_with(score_rejected=float("nan")), "must be a finite number"),
    "infinite score": (rows_with(score_rejected=float("inf")), "must be a finite number"),
    "control token": (rows_with(chosen="Tea.<|end|>"), "control token <|end|>"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(run_train, tmp_path, write_rows, toy_tokenizer, capsys, case):
    rows, message = BAD_ROWS[case]
    path = write_rows(rows)
    result = run_train("--data", path)
    assert_one_line(result, message, f"{path}:500: " if isinstance(rows, list) else path)
    assert not os.path.exists(tmp_path / "out")  # nothing begun
    if isinstance(rows, list):  # one row out of a thousand
        args = train.get_args(["--data", path, "--skip_bad_rows"])
        train_pairs, val_pairs = train.load_train_val(args, toy_tokenizer)
        out = capsys.readouterr().out
        assert "left out 1 of 1000 rows, bad row" in out and f"{path}:500" in out
        assert len(train_pairs) + len(val_pairs) == 999


def line(**changes):
    return json.dumps(ROW | changes)


SYSTEM = {"role": "system", "content": "Be kind.<|end|>"}
BAD_LINES = {  # row 20 of 40, as text or bytes
    "half of a surrogate pair": (line(prompt="tea \ud800"), "\\ud800 without its other half"),
    "the other half": (line(rejected="\udfff"), "\\udfff without"),
    "half a pair in a message": (line(prompt=[USER | {"content": "\udbff"}]), "\\udbff without"),
    "half a pair in an id": (line(id="\ud800"), "\\ud800 without"),
    "half a pair in a key": (line(**{"\ud800": 1}), "\\ud800 without"),
    "half a pair deep inside": (line(meta=[{"a": ["\ud800"]}]), "\\ud800 without"),
    "a score of 401 digits": (line(score_chosen=10**400), "must be a finite number"),
    "a negative score of 401 digits": (line(score_chosen=-10**400), "must be a finite number"),
    "a score that float32 cannot hold": (line(score_chosen=1e39), "must be a finite number"),
    "a number of 5,000 digits": (line(id=1).replace("1}", "1" * 5000 + "}"), "4300 digits"),
    "100,000 brackets": (line(id=1).replace("1}", "[" * 10**5 + "]" * 10**5 + "}"), "too deep"),
    "100,000 open brackets": ('{"a": ' + "[" * 10**5, "too deep"),
    "100,000 braces": ('{"a": ' * 10**5 + "1" + "}" * 10**5, "too deep"),
    "NaN": (line(score_chosen=float("nan")), "`score_chosen` is NaN; a score must be a finite"),
    "-Infinity": (line(score_rejected=-float("inf")), "`score_rejected` is -Infinity; a score"),
    "1e999": (line(score_chosen=1).replace("1,", "1e999,", 1), "must be a finite number"),
    "not UTF-8": (line(prompt="caf\u00e9").encode().replace(rb"\u00e9", b"\xe9"), "not UTF-8"),
    "NUL bytes": (b"\0" * 100, "not JSON"),
    "a NUL in a text": (line(prompt="a").replace('"a"', '"\0"'), "not JSON"),
    "an Alpaca input that is a list": (
        line(instruction="Sum up.", input=[1]).replace('"prompt"', '"_"'), "cannot be joined"),
    "control token in the prompt": (
        line(prompt="<|user|>Tea?<|end|>"), "the prompt holds the control token <|"),
    "control token in a system message": (
        line(prompt=[SYSTEM, USER]), "the prompt holds the control token <|end|>"),
    "transcripts of two conversations": (
        line(chosen="\n\nHuman: a\n\nAssistant: b", rejected="\n\nHuman: b\n\nAssistant: b")
        .replace('"prompt"', '"_"'), "equal up to the last Assistant turn"),
    "a transcript that ends with a question": (
        line(chosen="\n\nHuman: a\n\nAssistant: b\n\nHuman: c",
             rejected="\n\nHuman: a\n\nAssistant: b").replace('"prompt"', '"_"'), "end with it"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines(run_train, run_stage, tmp_path, toy_tokenizer, case):
    bad, message = BAD_LINES[case]
    lines = [json.dumps(row).encode() for row in rows_with(40)]
    lines[19] = bad if isinstance(bad, bytes) else bad.encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert_one_line(run_train("--data", path), f"{path}:20: ", message)
    pairs, counts = data.load_pairs(path, toy_tokenizer, 1024, True, skip_bad_rows=True)
    assert len(pairs) == 39 and counts.rows == 40
    code, out, err = run_stage(data, path)
    assert code == 0 and not err
    assert f"train.py would stop at {path}:20: " in out and message in out
    assert "1 such rows in all" in out


GOOD = "".join(json.dumps(row) + "\n" for row in rows_with(40)).encode()
BAD_FILES = {  # content, or the path of a file that is there
    "null device": ("/dev/null", "file is empty"),
    "a file that cannot be read": ("/proc/self/mem", "Input/output error; give a .jsonl file"),
    "a file without an end": ("/dev/zero", ":1: a line of more than 1,000,000 bytes"),
    "a gzip bomb": (gzip.compress(b"{" * 10**7), ":1: a line of more than 1,000,000 bytes"),
    "a byte-order mark alone": (b"\xef\xbb\xbf\n", "file is empty"),
    "empty gzip": (gzip.compress(b""), "file is empty"),
    "cut gzip": (gzip.compress(os.urandom(10**5).hex().encode())[:-9], "cut or damaged"),
    "gzip cut in its head": (gzip.compress(GOOD)[:5], "cut or damaged"),
    "damaged gzip": (gzip.compress(GOOD, mtime=0)[:99] + b"\xff" * 999, "cut or damaged"),
    "gzip with another file behind": (gzip.compress(GOOD) + b"text", ":41: the gzip file is cut"),
    "gzip twice": (gzip.compress(gzip.compress(GOOD)), "not UTF-8"),
    "Parquet": (b"PAR1\x15\x04\x15\xff" * 9, "python -c \"import pandas; pandas.read_parquet('"),
    "UTF-16": (GOOD.decode().encode("utf-16"), ":1: not UTF-8"),
    "UTF-16 of a list": (json.dumps([ROW]).encode("utf-16"), ":1: not UTF-8"),
    "NULs": (b"\0" * 5000, "not JSON"),
    "a list of a list": (b"[" * 10**5, ":1: brackets are nested too deep"),
    "a text": (b"To be, or not to be\n", ":1: not JSON"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(run_train, run_stage, tmp_path, monkeypatch, case):
    monkeypatch.setattr(infra.rows, "LONGEST_LINE", 10**6)
    path, message = BAD_FILES[case]
    if isinstance(path, bytes):
        (tmp_path / "rows.jsonl").write_bytes(path)
        path = tmp_path / "rows.jsonl"
    for result in (run_train("--data", path), run_train("--data", path, "--skip_bad_rows"),
                   run_stage(data, path)):
        assert_one_line(result, f"{path}", message)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl", "list.json"])
def test_gzip_is_read_whatever_its_name(run_train, tmp_path, name):
    content = json.dumps(rows_with(40)).encode() if name == "list.json" else GOOD
    (tmp_path / name).write_bytes(gzip.compress(content))
    code, out, err = run_train("--data", tmp_path / name, "--max_steps", 1)
    assert code == 0, err
    assert "36 pairs to train on, 4 for validation" in out


def test_skip_bad_rows_trains_on_the_others(run_train, write_rows):
    path = write_rows(rows_with(40, chosen=None))
    code, out, _ = run_train("--data", path, "--skip_bad_rows", "--max_steps", 1)
    assert code == 0 and "left out 1 of 40 rows, bad row" in out and "student saved" in out


def test_no_file(run_train):
    assert_one_line(run_train("--data", "missing.jsonl"), "missing.jsonl: No such file")


def test_a_folder_for_a_file(run_train, tmp_path):
    assert_one_line(run_train("--data", tmp_path), "Is a directory")


def test_not_utf_8(run_train, tmp_path):
    path = tmp_path / "latin.jsonl"
    latin = '{"prompt": "caf\u00e9"}'.encode("latin-1")
    path.write_bytes((json.dumps(ROW) + "\n").encode() + latin)
    assert_one_line(run_train("--data", path), f"{path}:2: not UTF-8")


def test_a_bad_item_of_a_list_is_named(run_train, write_rows):
    path = write_rows(json.dumps([ROW, ROW | {"chosen": ""}], indent=1))
    assert_one_line(run_train("--data", path), f"{path}, item 2: `chosen` is empty")


def test_scores_are_not_needed_for_dpo(run_train, write_rows):
    path = write_rows([{name: row[name] for name in ("prompt", "chosen", "rejected")}
                       for row in rows_with(20)])
    assert_one_line(run_train("--data", path), f"{path}:1: no `score_chosen`", "--loss dpo")
    assert run_train("--data", path, "--loss", "dpo", "--max_steps", 1)[0] == 0


def test_all_scores_null(run_train, write_rows):
    path = write_rows([ROW | {"score_chosen": None}] * 3)
    assert_one_line(run_train("--data", path), "no row left to use", "no score")


def test_chosen_equal_to_rejected_is_dropped_and_counted(toy_tokenizer, write_rows, capsys):
    path = write_rows(rows_with(40, chosen="No."))
    train.load_train_val(train.get_args(["--data", path]), toy_tokenizer)
    assert f"left out 1 of 40 rows, chosen equals rejected: {path}:20" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "missing"])
def test_no_model_folder(run_train, write_rows, name):
    result = run_train("--data", write_rows([ROW]), "--model", name)
    assert_one_line(result, f"--model {name}", "no such folder", "takes a model folder")


def test_hub_id_that_cannot_be_had(run_train, write_rows):
    result = run_train("--data", write_rows([ROW]), "--model", "nobody/nothing")
    assert_one_line(result, "--model nobody/nothing", "takes a model folder")


def test_folder_without_a_model(run_train, write_rows, tmp_path):
    (tmp_path / "empty").mkdir()
    result = run_train("--data", write_rows([ROW]), "--model", tmp_path / "empty")
    assert_one_line(result, "takes a model folder")


def test_folder_without_weights(run_train, write_rows, tmp_path):
    shutil.copytree(TOY_STUDENT, tmp_path / "model",
                    ignore=shutil.ignore_patterns("*.safetensors"))
    result = run_train("--data", write_rows(rows_with(20)), "--model", tmp_path / "model")
    assert_one_line(result, "cannot be loaded", "takes a model folder")


def save_model(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_chat_rows_without_a_chat_template(run_train, write_rows, tmp_path):
    shutil.copytree(TOY_STUDENT, tmp_path / "model",
                    ignore=shutil.ignore_patterns("chat_template*"))
    path = write_rows([ROW | {"prompt": [{"role": "user", "content": "Tea?"}]}])
    result = run_train("--data", path, "--model", tmp_path / "model")
    assert_one_line(result, f"{path}:1: ", "no chat template", "instruct model")


def test_rows_longer_than_the_model_takes(run_train, write_rows, tmp_path, toy_tokenizer):
    model = save_model(tmp_path / "model", tiny_model("gpt2", len(toy_tokenizer)), toy_tokenizer)
    path = write_rows([ROW | {"prompt": f"tea {i} " * 200} for i in range(20)])
    result = run_train("--data", path, "--model", model)
    assert_one_line(result, "the model takes 256", "--max_length 256")
    result = run_train("--data", path, "--model", model, "--max_length", 256, "--max_steps", 1)
    assert result[0] == 0


def test_max_length_too_small(run_train, write_rows):
    result = run_train("--data", write_rows(rows_with(20)), "--max_length", 4)
    assert_one_line(result, "no response token left", "--max_length is 4")


def test_out_dir_taken(run_train, write_rows, tmp_path):
    path, out = write_rows(rows_with(30)), tmp_path / "out"
    assert run_train("--data", path, "--max_steps", 1)[0] == 0
    before = {name: os.path.getmtime(out / name) for name in os.listdir(out)}
    assert_one_line(run_train("--data", path, "--max_steps", 1), "--resume", "--overwrite")
    assert before == {name: os.path.getmtime(out / name) for name in os.listdir(out)}
    (out / "model-00001-of-00002.safetensors").write_text("of a larger student")
    assert run_train("--data", path, "--max_steps", 1, "--overwrite")[0] == 0
    assert not (out / "model-00001-of-00002.safetensors").exists()


def test_out_dir_that_is_somebody_elses(run_train, write_rows, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    path = write_rows(rows_with(30))
    result = run_train("--data", path, "--out_dir", tmp_path / "home", "--overwrite")
    assert_one_line(result, "holds no run of train.py")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_out_dir_that_is_the_students(run_train, write_rows, tmp_path, toy_tokenizer):
    model = save_model(tmp_path / "model", tiny_model("llama", len(toy_tokenizer)), toy_tokenizer)
    result = run_train("--data", write_rows(rows_with(30)), "--model", model, "--out_dir", model,
                       "--overwrite")
    assert_one_line(result, "--model's own folder")
    assert (model / "model.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(run_train, write_rows):
    result = run_train("--data", write_rows([ROW]), "--device", "cuda")
    assert_one_line(result, "--device cuda", "--device cpu")


def test_float16_needs_cuda(run_train, write_rows):
    result = run_train("--data", write_rows([ROW]), "--device", "cpu", "--dtype", "float16")
    assert_one_line(result, "--dtype float16 needs --device cuda")


WORDS = ("", "no such word")
WHOLE = (*WORDS, 1.5, "nan", "inf", -1, 10**30)
REAL = (*WORDS, "nan", "inf", "-inf", 1e39, 1e-40)
BAD_VALUES = {
    **dict.fromkeys(("data", "eval_data", "model", "ref_cache_dir", "out_dir"), ("",)),
    **dict.fromkeys(("loss", "dtype", "device", "save_dtype", "template_kwargs"), WORDS),
    **dict.fromkeys(("max_length", "epochs", "max_steps", "batch_size", "tokens_per_batch",
                     "eval_every", "save_every", "max_new_tokens"), (*WHOLE, 0)),
    **dict.fromkeys(("seed", "lora_rank"), WHOLE),
    "base_bits": (*WHOLE, 8),
    **dict.fromkeys(("beta", "tau_temperature", "max_grad_norm", "lora_alpha"), (*REAL, 0, -1)),
    **dict.fromkeys(("sft_weight", "learning_rate", "weight_decay"), (*REAL, -1)),
    **dict.fromkeys(("eval_share", "warmup_ratio"), (*REAL, -0.1, 1.1)),
    "label_smoothing": (*REAL, -0.1, 0.5)}


def test_every_flag_refuses_values_out_of_its_range(run_train):
    flags = vars(train.get_args(["--data", "rows.jsonl"])).items()
    assert BAD_VALUES.keys() == {name for name, value in flags if not isinstance(value, bool)}
    for name, values in BAD_VALUES.items():
        for value in values:
            result = run_train("--data", "rows.jsonl", "--lora_rank", 2, f"--{name}={value}")
            assert_one_line(result, f"--{name}: ", str(value)[:40])


@pytest.mark.parametrize("flags", [
    ["--label_smoothing", 0.1], ["--lora_alpha", 8], ["--save_adapter"], ["--fsdp", "--compile"],
    ["--fsdp"], ["--base_bits", 4], ["--betta", 1], ["--tau_temperature", 2, "--loss", "dpo"],
    ["--sft_weight", 0.1, "--loss", "dsc"]], ids=str)
def test_flags_that_do_not_go_together(run_train, flags):
    assert_one_line(run_train("--data", "rows.jsonl", *flags), flags[0])


def test_huge_values_that_mean_something_are_taken(run_train, write_rows):
    huge = [word for name in ("max_length", "batch_size", "tokens_per_batch", "eval_every",
                              "save_every", "seed") for word in (f"--{name}", 2**63 - 1)]
    path = write_rows(rows_with(30))
    assert run_train("--data", path, "--max_steps", 1, *huge)[0] == 0
    assert_one_line(run_train("--data", path, "--lora_rank", 10**9, "--overwrite"), "--lora_rank: ",
                    "largest layer, 96")


def test_validation_rows_that_are_also_trained_on(run_train, write_rows, tmp_path):
    path = write_rows(rows_with(30))
    os.symlink(path, tmp_path / "link.jsonl")
    for same in (path, tmp_path / "." / "rows.jsonl", tmp_path / "link.jsonl"):
        assert_one_line(run_train("--data", path, "--eval_data", same), "--eval_data", "--data")
    grouped = write_rows([row | {"group": 1} for row in rows_with(30)])
    other = write_rows(rows_with(30)[:3] + rows_with(5, prompt="Another.")
                       + rows_with(1, prompt="A third.", group=1), "other.jsonl")
    code, _, err = run_train("--data", grouped, "--eval_data", other, "--max_steps", 1)
    assert code == 0 and "8 of 9 pairs of --eval_data have a prompt of --data, its " in err


@pytest.mark.parametrize("flag", ["--out_dir", "--ref_cache_dir"])
def test_folders_that_cannot_be_made(run_train, write_rows, tmp_path, flag):
    path = write_rows(rows_with(30))
    for folder in ("/proc/x", path, os.path.join(path, "below"), tmp_path / ("a" * 300)):
        assert_one_line(run_train("--data", path, flag, folder), f"{flag} {folder}: ", "give a")
    assert not os.path.exists(tmp_path / "out") or not os.listdir(tmp_path / "out")


def test_another_module_named_toy(tmp_path):
    (tmp_path / "toy.py").write_text("")
    done = subprocess.run([sys.executable, "-c", "from toy import world"], cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0


def cut(content):
    return content[:len(content) // 2]


def lists(content):
    return b"[1, 2]"


def other_tensors(content):
    return safetensors.torch.save({"other": torch.zeros(3)})


def with_nan(content):
    tensors = safetensors.torch.load(content)
    name = "logps" if "logps" in tensors else min(tensors)
    tensors[name].view(-1)[0] = float("nan")
    return safetensors.torch.save(tensors)


def of_other_types(content):
    return safetensors.torch.save({name: tensor.double() for name, tensor
                                   in safetensors.torch.load(content).items()})


def of_other_lengths(content):
    tensors = safetensors.torch.load(content)
    return safetensors.torch.save(tensors | {"logps": tensors["logps"][1:].clone()})


def empty(content):
    return b""


def garbage(content):
    return b"\xff" * 100 + b"\n" + content


DAMAGES = {  # file: (ways to damage it; None: take it away)
    "out/state/step-00000002/training.pt": (cut, empty, garbage, None),
    "out/state/step-00000002/model.safetensors": (cut, empty, garbage, other_tensors, with_nan,
                                                  None),
    "out/args.json": (cut, empty, garbage, lists, None),
    "out/metrics.jsonl": (garbage, lambda content: b"[1, 2]\n" + content,
                          lambda content: b'{"step": null}\n' + content),
    "cache/reference": (cut, empty, garbage, other_tensors, of_other_types, of_other_lengths,
                        with_nan)}


def test_damaged_files_of_an_earlier_run(run_train, write_rows, tmp_path):
    flags = "--data", write_rows(rows_with(30)), "--max_steps", 2, "--resume"
    run_train(*flags)
    (cache,) = (tmp_path / "cache").iterdir()
    for name, damages in DAMAGES.items():
        path = cache if name == "cache/reference" else tmp_path / name
        content = path.read_bytes()
        for damage in damages:
            if damage:
                path.write_bytes(damage(content))
            else:
                path.unlink()
            code, _, err = run_train(*flags)
            place = path.parent if "state" in name or damage is None else path
            assert_one_line((code, "", err), place, "out_dir" if "args" in name else "delete")
            assert (tmp_path / "out" / "model.safetensors").exists()
            path.write_bytes(content)
    assert run_train(*flags)[0] == 0  # control: whole again
    (tmp_path / "out" / "state" / "step-00000002" / "training.pt").write_bytes(b"")
    shutil.rmtree(tmp_path / "out" / "state" / "step-00000002")  # as the message says
    code, out, _ = run_train(*flags)
    assert code == 0 and "from step" not in out


def test_loss_not_finite(run_train, write_rows, tmp_path):
    path = write_rows(rows_with(60))
    code, _, err = run_train("--data", path, "--learning_rate", 1e9, "--epochs", 10,
                             "--save_every", 1)
    assert code == 2 and err.startswith("error: step ") and err.count("\n") == 1
    assert "lower --learning_rate" in err and f"{path}:" in err
    stopped_at = int(err.split()[2].rstrip(":"))
    assert os.listdir(tmp_path / "out" / "state") == [f"step-{stopped_at - 1:08d}"]
    assert err.endswith(  # its weights are finite: only the loss shows them
        f" delete {tmp_path}/out/state/step-{stopped_at - 1:08d}, which has these weights\n")


def test_advice_fits_a_loss_that_is_not_finite_before_any_step(run_train, write_rows, tmp_path):
    for number, flags in enumerate((["--sft_weight", 1e38], ["--beta", 1e38])):
        result = run_train("--data", write_rows(rows_with(30)), *flags, "--out_dir",
                           tmp_path / f"out-{number}", "--batch_size", 30)
        assert_one_line((*result[:1], "", *result[2:]), "no step has been taken", "lower --beta")
        assert "state is in" not in result[2]


@pytest.mark.parametrize("flags", [[], ["--lora_rank", 2], ["--dtype", "bfloat16"]], ids=str)
def test_a_poisoned_step_is_never_saved(run_train, write_rows, tmp_path, monkeypatch, flags):
    flags = ["--data", write_rows(rows_with(60)), "--max_steps", 5, "--save_every", 1,
             "--eval_every", 5, *flags]
    for poisoned, left in ((5, "step-00000004"), (3, "step-00000002"), (1, None)):
        def poison(masters, step, round=Masters.round):
            if step == poisoned:
                next(masters.parameters()).data.view(-1)[0] = float("nan")
            round(masters, step)

        with monkeypatch.context() as patch:
            patch.setattr(Masters, "round", poison)
            code, _, err = run_train(*flags, "--overwrite")
        assert code == 2 and err.count("\n") == 1 and "lower --learning_rate" in err
        assert err.startswith(f"error: step {poisoned}: ") and "not saved" in err
        assert not (tmp_path / "out" / "model.safetensors").exists()
        state = tmp_path / "out" / "state"
        assert (os.listdir(state) if state.exists() else [None]) == [left]
        assert ("last good state" in err) == bool(left)
    assert run_train(*flags, "--resume")[0] == 0  # without the poison it goes on


def test_weights_that_overflow_the_forward_pass_are_not_saved(run_train, write_rows, tmp_path):
    code, _, err = run_train("--data", write_rows(rows_with(30)), "--max_steps", 1, "--lora_rank",
                             2, "--learning_rate", 1e37)
    assert code == 2 and "step 1: the student has" in err and "(nan)" in err
    assert sorted(os.listdir(tmp_path / "out")) == ["args.json", "metrics.jsonl"]


def test_a_student_that_its_saved_dtype_cannot_hold(
        run_train, write_rows, tmp_path, toy_tokenizer):
    model = tiny_model("llama", len(toy_tokenizer))
    with torch.no_grad():
        model.lm_head.weight *= 1e6
        model.model.norm.weight *= 1e-6
    flags = ["--data", write_rows(rows_with(30)), "--max_steps", 1, "--model",
             save_model(tmp_path / "model", model, toy_tokenizer), "--learning_rate", 1e-9]
    code, _, err = run_train(*flags, "--save_dtype", "float16")
    assert code == 2 and "--save_dtype: float16 cannot hold the weights of lm_head.weight" in err
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert run_train(*flags, "--resume", "--save_dtype", "bfloat16")[0] == 0


def test_a_saved_student_that_gives_nan_is_warned_of(
        run_train, write_rows, tmp_path, monkeypatch):
    load = models.load_model

    def load_broken(name, dtype):
        model = load(name, dtype)
        if name == str(tmp_path / "out"):
            model.lm_head.weight.data[:] = float("nan")
        return model

    monkeypatch.setattr(models, "load_model", load_broken)
    code, _, err = run_train("--data", write_rows(rows_with(30)), "--max_steps", 1)
    assert code == 0 and "is not the one that was trained" in err


def test_weights_that_are_not_finite(run_train, write_rows, tmp_path, toy_tokenizer):
    model = tiny_model("llama", len(toy_tokenizer))
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    folder = save_model(tmp_path / "model", model, toy_tokenizer)
    assert_one_line(run_train("--data", write_rows(rows_with(30)), "--model", folder), "finite")


def test_a_model_that_changes_its_logits_in_an_unknown_way_is_refused(
        run_train, write_rows, tmp_path, toy_tokenizer):
    """Falcon-H1 multiplies them by `lm_head_multiplier`, unknown to rdpo.logit_scaling."""
    from transformers import FalconH1Config, FalconH1ForCausalLM
    path = write_rows(rows_with(30))
    for multiplier in (0.5, 1.0):
        config = FalconH1Config(
            vocab_size=len(toy_tokenizer), hidden_size=32, intermediate_size=48,
            num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, mamba_d_ssm=32,
            mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
            lm_head_multiplier=multiplier)
        model = save_model(tmp_path / f"model-{multiplier}", FalconH1ForCausalLM(config),
                           toy_tokenizer)
        result = run_train("--data", path, "--model", model, "--max_steps", 1)
        if multiplier == 0.5:
            assert_one_line(result, "own logits")
    assert result[0] == 0


def test_no_traceback_in_a_real_process():
    for flags in (["--data", "rows.jsonl", "--betta", "1"], ["--data", "missing.jsonl"]):
        done = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True,
                              text=True)
        assert_one_line((done.returncode, done.stdout, done.stderr))


def test_a_tokenizer_without_an_end_token(tmp_path, toy_tokenizer, run_train, write_rows):
    shutil.copytree(TOY_STUDENT, tmp_path / "model")
    tokenizer = load_tokenizer(TOY_STUDENT)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    result = run_train("--data", write_rows([ROW]), "--model", tmp_path / "model")
    assert_one_line(result, "no eos token")


@pytest.mark.parametrize("flags, parts", [
    (["--loss=--"], ["--loss=--: give a value"]), (["--save_every=--"], ["give a value"]),
    (["--out_dir", "a\udcff"], ["--out_dir", "is not UTF-8"]),
    (["--eval_data", "a\nb"], ["a b: No such file"])], ids=str)
def test_odd_words_are_one_line(run_train, write_rows, flags, parts):
    assert_one_line(run_train("--data", write_rows(rows_with(30)), *flags), *parts)


def test_no_pair_left_to_train_on(run_train, write_rows):
    result = run_train("--data", write_rows(rows_with(30)), "--eval_share", 1)
    assert_one_line(result, "--data: 0 pairs to train on and 30 for validation")


@pytest.mark.parametrize("damage", ["cut", "a weight is missing", "garbage"])
def test_a_student_whose_weights_are_damaged(run_train, write_rows, tmp_path, damage):
    model = tmp_path / "model"
    shutil.copytree(TOY_STUDENT, model)
    path = model / "model.safetensors"
    if damage == "a weight is missing":
        weights = safetensors.torch.load_file(path)
        weights["model.layers.0.odd"] = weights.pop("model.layers.0.mlp.up_proj.weight")
        safetensors.torch.save_file(weights, path, {"format": "pt"})
    else:
        path.write_bytes(path.read_bytes()[:5000] if damage == "cut" else b"garbage" * 999)
    result = run_train("--data", write_rows(rows_with(30)), "--model", model)
    assert_one_line(result, "--model", "lack 1 of the weights" if "missing" in damage
                    else "cannot be loaded")
    assert not (tmp_path / "out").exists()


def test_a_reader_that_has_enough_gives_no_traceback():
    command = f"{sys.executable} data.py toy/scored.jsonl | head -n 1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("toy/scored.jsonl: 900 rows") and not result.stderr
