"""train.py and data.py under random flags, damaged rows and other damaged files.

    python bench/fuzz.py [--flags 2000] [--rows 1500] [--files 500] [--minutes 60]

A case follows from its kind and its seed: `--flags 1 --rows 0 --files 0 --first 17` repeats one.
The student is a copy of the toy's, on 12 rows, for a step or two. A case must end with exit code 0,
1, 2 or 130, without a traceback, with one line on stderr if with 2. A flag that is below 0, nan or
infinite must be refused. After 0 there must be one student, finite, and equal to the trained
weights but for rounding; after another exit code there must be none.
"""
import argparse
import collections
import gzip
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from safetensors.torch import load  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from infra import templates  # noqa: E402
from infra.command import run  # noqa: E402
from infra.models import TOY_STUDENT  # noqa: E402
from infra.rows import read_rows  # noqa: E402

SECONDS = 60  # of one case
train.have_matplotlib = lambda: False  # curves take most of a short run

# -------------------------------------------------------------------------------------- the flags

NUMBERS = ["nan", "-nan", "inf", "-inf", "-1", "-0.5", "1e999", "-1e-300"]  # never to be accepted
ODD = ["0", "", " ", "x", "0x10", "1_0", "1e-300", "1e300", "9" * 401, "9" * 20, "--", "None", "[]",
       "1,5", "\u0662", "\udcff", "2.5", "-", "1 ", "\n"]
FLAGS = {  # flag -> good values
    "--eval_share": ["0.1", "0.5", "1"], "--max_length": ["1024", "80", "5", "1"],
    "--loss": ["rdpo", "dpo", "sft", "dsc"], "--beta": ["0.1", "5", "1e-8"],
    "--tau_temperature": ["1", "0.01", "100"], "--label_smoothing": ["0", "0.2"],
    "--sft_weight": ["0", "0.5", "100"], "--learning_rate": ["0", "1e-3", "1", "1e30"],
    "--warmup_ratio": ["0", "0.5", "1"], "--weight_decay": ["0", "0.1", "1e6"],
    "--max_grad_norm": ["1", "1e-6", "1e30"], "--epochs": ["1", "2"], "--max_steps": ["1", "2"],
    "--batch_size": ["1", "3", "64"], "--seed": ["0", "1", str(2**32), str(2**64)],
    "--lora_rank": ["0", "1", "4"], "--lora_alpha": ["1", "1e-9", "1e6"],
    "--tokens_per_batch": ["1", "100", "100000"], "--eval_every": ["1", "3"],
    "--save_every": ["1", "2"], "--max_new_tokens": ["1", "2"],
    "--dtype": ["auto", "float32", "bfloat16", "float16"], "--device": ["auto", "cpu", "mps"],
    "--save_dtype": ["auto", "float32", "bfloat16", "float16"]}
COUNTS = ("--epochs", "--max_steps", "--max_new_tokens", "--lora_rank")  # large: for ever
PATHS = ["", " ", "/proc/x", "rows.jsonl", "rows.jsonl/x", "missing/deep/er", ".", "/dev/null", "-",
         "x" * 300, "caf\u00e9", "\udcff", "a\nb", "student", "toy"]
SWITCHES = ["--skip_bad_rows", "--save_adapter", "--gradient_checkpointing", "--fsdp", "--resume",
            "--overwrite", "--skip_saved_check", "--betta", "--dat"]


def random_flags(rng):
    """A random set of flags, and whether it holds a number that must be refused."""
    given, is_nonsense = {"--data": "rows.jsonl", "--max_steps": "1"}, False
    for flag in rng.sample(sorted(FLAGS), rng.choice((0, 1, 1, 2, 3, 5))):
        values, kind = FLAGS[flag], rng.random()
        if kind > 0.85 and not values[0].isalpha():
            values, is_nonsense = NUMBERS, True
        elif kind > 0.7:
            values = ODD if flag not in COUNTS else [odd for odd in ODD if len(odd) < 4]
        given[flag] = rng.choice(values)
    for flag in ("--out_dir", "--ref_cache_dir", "--model", "--eval_data", "--data"):
        if rng.random() < 0.08:
            given[flag] = rng.choice([*PATHS, "student" if flag == "--model" else "rows.jsonl"])
    words = [f"{flag}={value}" for flag, value in given.items()]
    words += [flag for flag in SWITCHES if rng.random() < 0.03]
    rng.shuffle(words)
    return words, is_nonsense


# ---------------------------------------------------------------------------------- the damages

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}
VALUES = [None, True, 5, -1.5, [], {}, "", "  ", [""], [{}], [[[[[]]]]], "\ud800", "x\udfff",
          10**401, -10**30, 1e308, float("nan"), float("inf"), "NaN", "4", "Tea.<|end|>", "\x00",
          "\n\nHuman: hi\n\nAssistant: ho", "\n\nHuman: hi", "\n\nAssistant:", "{{ messages }}",
          "{% for %}", "\u202e\u0007", "x" * 50_000, "tea " * 3000, "\U0001f375",
          [USER], [ASSISTANT], [USER, ASSISTANT], [ASSISTANT, USER], [USER] * 300,
          [{"role": "user"}], [{"role": "tool", "content": "x"}], [{"role": [], "content": {}}],
          [USER | {"content": "\ud800"}], [{"role": "user", "content": "<|end|>"}]]
KEYS = ["prompt", "chosen", "rejected", "score_chosen", "score_rejected", "id", "input", "group",
        "question", "metadata", "teacher", "instruction", "output", "response", "messages"]


def damage_row(rng, row):
    """A row with one thing wrong, as a dict, or as text if JSON has no such value."""
    key, row = rng.choice(KEYS[:5] * 3 + KEYS), dict(row)
    kind = rng.randrange(9)
    if kind == 0:
        row.pop(key, None)
    elif kind == 1:
        row = {(name.upper() if name == key else name): value for name, value in row.items()}
    elif kind == 2:
        return rng.choice(["null", "17", '"text"', "[]", "[1]", "{}", "{", "}", "nul", "", '{"a"}',
                           json.dumps(row)[:rng.randrange(1, 60)], json.dumps(row) * 2])
    elif kind == 3:  # deeper than the parser's stack
        return json.dumps(row | {key: "HERE"}).replace('"HERE"', "[" * 100_000 + "]" * 100_000)
    elif kind == 4:
        row["teacher"] = {"finish": rng.choice([*VALUES[:12], ["length"], "stop"])}
    elif kind == 5:
        row["chosen"] = rng.choice([row.get("rejected"), row.get("prompt"), " "])
    else:
        row[key] = rng.choice(VALUES)
    return row


def damaged_file(rng, rows):
    """The bytes of a file of rows with a few things wrong."""
    rows = rng.choices(rows, k=3) + rows if rng.random() < 0.2 else list(rows)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 12))):
        place = rng.randrange(len(rows))
        if isinstance(rows[place], dict):
            rows[place] = damage_row(rng, rows[place])
    texts = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=rng.random() < 0.5)
             for row in rows]
    text = "\n".join(texts) + "\n" if rng.random() < 0.8 else "[" + ",\n".join(texts) + "]"
    content = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.4:
        content = damaged_bytes(rng, content)
    elif rng.random() < 0.2:
        content = rng.choice([
            text.encode("utf-16", "replace"), text.encode("latin-1", "replace"),
            text.encode("utf-7", "replace"), b"\xef\xbb\xbf" * 2 + content, b"PAR1" + content,
            content.replace(b"\n", b"\r\n"), content.replace(b"\n", b"\r")])
    return content


def damaged_bytes(rng, content):
    """Bytes with something wrong that does not depend on what they mean."""
    where = rng.randrange(len(content) + 1)
    kind = rng.randrange(12)
    if kind < 4:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 10)) * bool(content)):
            changed[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(changed)
    return [content[:where], content[:where], content[where:], b"", b"\n\n",
            content[:where] + rng.randbytes(20) + content[where:],
            content + content[where:], gzip.compress(content)][kind - 4]


# ----------------------------------------------------------------------------------- one command


def run_command(main, argv):
    """(exit code, or what it raised; stderr) of a command's main(argv) in this process."""
    def too_long(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    streams, kept = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    with tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as out:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # strict, as at a terminal
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        try:
            run(lambda: main(argv))
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:  # Python would print a traceback
            places = [frame for frame in traceback.extract_tb(error.__traceback__)
                      if frame.filename.startswith(ROOT) and "bench" not in frame.filename]
            code = (f"{type(error).__name__} from {os.path.relpath(places[-1].filename, ROOT)}, "
                    f"{places[-1].name}: {places[-1].line}")
        finally:
            signal.alarm(0)
            for stream in (sys.stdout, sys.stderr):
                stream.close()
            sys.stdout, sys.stderr = streams
            for number, old in zip((1, 2), kept):
                os.dup2(old, number)
                os.close(old)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        err.seek(0)
        return code, err.read().decode(errors="replace")


def faults_of(code, err, must_refuse):
    """What is wrong with the way in which a command ended."""
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    if code not in (0, 1, 2, 130):
        yield f"traceback: {code}" if isinstance(code, str) else f"exit code {code}"
    elif "Traceback" in err:
        yield "traceback on stderr"
    elif code == 2 and (len(lines) != 1 or not lines[0].startswith("error: ")):
        yield f"exit code 2 with {len(lines)} lines on stderr, such as {''.join(lines)[:99]!r}"
    elif code == 0 and lines:
        yield f"exit code 0 with {lines[0][:99]!r} on stderr"
    elif must_refuse and code != 2:
        yield f"not refused: exit code {code}"


def students(folder):
    """{path: its tensors} of the students and adapters below a folder, but for the input."""
    found = {}
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("student", "state", "saving.tmp")]
        for name in {"model.safetensors", "adapter_model.safetensors"} & set(names):
            found[os.path.join(path, name)] = load(read(os.path.join(path, name)))
    return found


def faults_of_students(code, folder):
    """What is wrong with the students that a training run left below a folder."""
    found = students(folder)
    if code == 0 and len(found) != 1:
        yield f"exit code 0 with {len(found)} students"
    for path, weights in found.items():
        if code != 0:
            yield "a student, but not exit code 0"
        if not all(weight.isfinite().all() for weight in weights.values()):
            yield f"{os.path.basename(path)} is not finite"
        state = os.path.join(os.path.dirname(path), "state")
        newest = max(os.listdir(state), default=None) if os.path.isdir(state) else None
        if code == 0 and newest:
            trained = load(read(os.path.join(state, newest, "model.safetensors")))
            for name, master in trained.items():
                saved = weights.get(name.replace("/", "."))
                if saved is not None and not (
                        (saved.float() - master).abs() <= master.abs() / 128 + 1e-6).all():
                    yield f"{name} as saved is not what was trained"
                    break


# --------------------------------------------------------------------------------------- the cases

COMMON = ["--ref_cache_dir=cache", "--max_new_tokens=1", "--save_every=1", "--model=student"]


def make_template(folder):
    """In a folder: rows, a student, a run that was stopped after the first of two steps."""
    rows = [row for _, row in read_rows(os.path.join(ROOT, "toy", "scored.jsonl"))][:12]
    with open(os.path.join(folder, "rows.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    shutil.copytree(TOY_STUDENT, os.path.join(folder, "student"))
    learning_rate = train.learning_rate

    def stop(step, *others):
        if step == 1:
            raise KeyboardInterrupt
        return learning_rate(step, *others)

    train.learning_rate = stop
    code, err = in_folder(folder, train.main, RESUMABLE)
    train.learning_rate = learning_rate
    assert code == 130, err


RESUMABLE = ["--data=rows.jsonl", "--max_steps=2", *COMMON]


def flags_case(rng, folder):
    """train.py, or seldom data.py, with random flags."""
    words, must_refuse = random_flags(rng)
    if rng.random() < 0.9:
        shutil.rmtree(os.path.join(folder, "out"))
    if rng.random() < 0.1:
        words = [word for word in words if word.startswith(("--model", "--max_len", "--seed"))]
        return [try_command(folder, data.main, [rng.choice(PATHS), *words], False)]
    common = COMMON if rng.random() < 0.9 else COMMON[:-1]
    return [try_command(folder, train.main, [*common, *words], must_refuse)]


def rows_case(rng, folder):
    """data.py and train.py with a damaged file of rows."""
    rows = [row for _, row in read_rows(os.path.join(folder, "rows.jsonl"))]
    name = rng.choice(["rows.jsonl"] * 7 + ["rows.jsonl.gz", "rows.json", "rows.parquet"])
    write(os.path.join(folder, name), damaged_file(rng, rows))
    shutil.rmtree(os.path.join(folder, "out"))
    flags = [f"--data={name}", "--max_steps=1", *COMMON, "--loss",
             rng.choice(("rdpo", "dpo", "sft", "dsc"))]
    flags += ["--skip_bad_rows"] if rng.random() < 0.3 else []
    results = [try_command(folder, data.main, [name], False)]
    if rng.random() < 0.4:  # it takes longer
        results.append(try_command(folder, train.main, flags, False))
    return results


def files_case(rng, folder):
    """train.py with a damaged file of the student, of the cache or of the run to continue."""
    paths = sorted(os.path.join(path, name) for path, _, names in os.walk(folder) for name in names)
    path = rng.choice([path for path in paths if not path.endswith("rows.jsonl")])
    write(path, damaged_bytes(rng, read(path)))
    flags = RESUMABLE + ["--resume"]
    if rng.random() < 0.3 and "out" not in path[len(folder):]:
        shutil.rmtree(os.path.join(folder, "out"))
        flags = RESUMABLE
    result = try_command(folder, train.main, flags, False)
    return [(f"{path[len(folder) + 1:]} damaged: {result[0]}", *result[1:])]


CASES = {"flags": flags_case, "rows": rows_case, "files": files_case}


def read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path, content):
    with open(path, "wb") as file:
        file.write(content)


def in_folder(folder, main, words):
    before = os.getcwd()
    os.chdir(folder)
    try:
        return run_command(main, words)
    finally:
        os.chdir(before)


def try_command(folder, main, words, must_refuse):
    """(the command, its exit code, what is wrong)."""
    code, err = in_folder(folder, main, words)
    faults = list(faults_of(code, err, must_refuse))
    if main is train.main:
        faults += faults_of_students(code, folder)
    return f"{main.__module__}.py {' '.join(words)}", code, faults


def run_case(kind, seed, template):
    """[(command, exit code, faults)] of one case, in a copy of the template."""
    with tempfile.TemporaryDirectory() as work:
        folder = os.path.join(work, "case")
        shutil.copytree(template, folder)
        return CASES[kind](random.Random(f"{kind} {seed}"), folder)


def run_cases(kind, seeds, until=float("inf")):
    """(Counter of exit codes, {fault: ["seed: command"]}) of the cases of one kind."""
    codes, faults = collections.Counter(), collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as template:
        make_template(template)
        for seed in seeds:
            if time.monotonic() > until:
                break
            for cached in (templates.control_tokens, templates.end_of_turn, templates.added_tokens):
                cached.cache_clear()  # they keep each case's tokenizer
            for command, code, found in run_case(kind, seed, template):
                codes["traceback" if isinstance(code, str) else code] += 1
                for fault in found:
                    faults[fault].append(f"{seed}: {command}")
    return codes, faults


def main():
    parser = argparse.ArgumentParser(description="train.py and data.py under random bad input.")
    parser.add_argument("--flags", type=int, default=2000, help="cases with random flags")
    parser.add_argument("--rows", type=int, default=1500, help="cases with damaged rows")
    parser.add_argument("--files", type=int, default=500, help="cases with another damaged file")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case of each kind")
    parser.add_argument("--minutes", type=float, default=60, help="at most, of each kind")
    args = parser.parse_args()
    for kind in CASES:
        began = time.monotonic()
        seeds = range(args.first, args.first + getattr(args, kind))
        codes, faults = run_cases(kind, seeds, began + 60 * args.minutes)
        ends = ", ".join(f"{count} x {code}" for code, count in codes.most_common())
        print(f"{kind}: {sum(codes.values())} commands in {time.monotonic() - began:.0f} s ended "
              f"with {ends}; {sum(map(len, faults.values()))} faults")
        for fault, cases in faults.items():
            print(f"  {len(cases)} x {fault}; first with seed {cases[0]!r:.300}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
