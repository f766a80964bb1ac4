"""What --model may be: its files against its config, its output head, and what is refused."""
import json
import math
import os
import shutil
import types

import pytest
import torch
import transformers
from conftest import GROUPED, SMALL, assert_one_line, build, read_lines, read_metrics, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import eval as evaluation
import sample
from data import load_pairs
from infra.command import BadInput
from infra.models import check_ids, load_model, position_limit

ROWS = [{"prompt": f"What is {i}?", "chosen": f"It is {i}, I think.", "rejected": "No." + "!" * i,
         "score_chosen": 5, "score_rejected": i % 4} for i in range(24)]
INPUT = torch.arange(20).view(2, 10)


@pytest.fixture
def saved(tmp_path, toy_tokenizer):
    """saved(model, {key: tensor to add}, {flag of config.json: value}): its folder."""
    def save(model, tensors=None, flags=None):
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        toy_tokenizer.save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        save_file(weights | (tensors or {}), folder / "model.safetensors", {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | (flags or {})))
        return str(folder)
    return save


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=INPUT).logits  # (2, 10, V)


# --------------------------------------------------------------------------- weights without place

NEEDED = ["model.layers.0.self_attn.q_proj.lora_A.weight",  # an adapter that was never merged
          "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
          "model.layers.2.mlp.up_proj.weight",  # config.json says two layers: 0 and 1
          "model.layers.0.self_attn.q_proj.bias", "lm_head.bias", "model.norm.bias"]
BESIDE = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.masked_bias",
          "vision_tower.layers.5.mlp.up_proj.weight", "model.vision_tower.embed.weight",
          "v_head.summary.weight", "mtp.layers.0.mlp.up_proj.weight"]


@pytest.mark.parametrize("key", NEEDED)
def test_a_weight_that_the_model_would_leave_out_is_refused(saved, run_train, write_rows, key):
    folder = saved(tiny_model("llama", 725), {key: torch.ones(32)})
    assert_one_line(run_train("--data", write_rows(ROWS), "--model", folder), f"--model {folder}",
                    f"its files hold {key}", "correct config.json")


@pytest.mark.parametrize("key", ["layers.2.mlp.up_proj.weight", "norm.bias"])
def test_the_files_of_a_base_model_name_their_weights_without_its_prefix(saved, key):
    base = tiny_model("llama_tied").model
    flags = {"architectures": ["LlamaForCausalLM"]}
    load_model(saved(base, {"vision_tower.weight": torch.ones(32)}, flags))
    with pytest.raises(BadInput, match=key):
        load_model(saved(base, {key: torch.ones(32)}, flags))


@pytest.mark.parametrize("key", BESIDE)
def test_buffers_and_modules_beside_the_decoder_are_left_out(saved, key):
    model = tiny_model("llama")
    loaded = load_model(saved(model, {key: torch.ones(32)}))
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert key not in loaded.state_dict()


def test_a_model_that_sees_is_loaded_without_its_eyes_and_a_line_says_so(saved, capsys):
    config = transformers.Qwen3_5Config(
        text_config=GROUPED | dict(vocab_size=97, layer_types=["full_attention"] * 2, head_dim=8),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2,
                           out_hidden_size=32, num_position_embeddings=16))
    folder = saved(transformers.Qwen3_5ForConditionalGeneration(config))
    assert type(load_model(folder)) is transformers.Qwen3_5ForCausalLM
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "only the text model of this qwen3_5 is loaded and saved" in err
    load_model(saved(tiny_model("llama")))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("further", [0, 1])
def test_layers_that_predict_further_tokens_are_left_out_where_the_config_has_them(saved, further):
    torch.manual_seed(0)
    model = build("Glm4Moe", head_dim=8, moe_intermediate_size=16, n_routed_experts=4,
                  num_experts_per_tok=2, first_k_dense_replace=1, n_group=1, topk_group=1,
                  **GROUPED)(97).eval()
    folder = saved(model, {"model.layers.2.eh_proj.weight": torch.ones(32)},
                   {"num_nextn_predict_layers": further})
    if further:
        assert torch.equal(logits_of(load_model(folder)), logits_of(model))
    else:
        with pytest.raises(BadInput, match="model.layers.2.eh_proj.weight"):
            load_model(folder)


def test_a_reward_model_may_keep_its_old_head_but_no_adapter(saved):
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(vocab_size=97, num_labels=1, **SMALL)).eval()
    kind = AutoModelForSequenceClassification
    folder = saved(model, {"lm_head.weight": torch.ones(97, 32)})
    assert torch.equal(logits_of(load_model(folder, kind=kind)), logits_of(model))
    folder = saved(model, {"score.lora_A.weight": torch.ones(32)})
    with pytest.raises(BadInput, match="--reward_model .* score.lora_A.weight"):
        load_model(folder, kind=kind, flag="--reward_model")


# ----------------------------------------------------------------------------- heads, tied and not


def plain_llama(folder, ids, head="lm_head.weight"):
    """Logits (T, V) of token ids by the weights of a Llama's file, without transformers."""
    weights = {name: tensor.double() for name, tensor in load_file(
        os.path.join(folder, "model.safetensors")).items()}
    heads, size = SMALL["num_attention_heads"], 8
    angles = torch.arange(len(ids))[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)  # (T, size / 2)
    future = torch.full((len(ids), len(ids)), -torch.inf, dtype=torch.double).triu(1)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def split(x, rotate):  # (T, heads * size) -> (heads, T, size)
        x = x.view(len(ids), heads, size).transpose(0, 1)
        turned = torch.complex(x[..., :size // 2], x[..., size // 2:]) * turn
        return torch.cat([turned.real, turned.imag], -1) if rotate else x

    x = weights["model.embed_tokens.weight"][ids]  # (T, D)
    for i in range(SMALL["num_hidden_layers"]):
        def linear(x, name, i=i):
            return x @ weights[f"model.layers.{i}.{name}_proj.weight"].T

        h = norm(x, f"model.layers.{i}.input_layernorm")
        q, k, v = (split(linear(h, f"self_attn.{name}"), name != "v") for name in "qkv")
        attended = (q @ k.mT / size ** 0.5 + future).softmax(-1) @ v  # (heads, T, size)
        x = x + linear(attended.transpose(0, 1).flatten(1), "self_attn.o")
        h = norm(x, f"model.layers.{i}.post_attention_layernorm")
        x = x + linear(torch.nn.functional.silu(linear(h, "mlp.gate")) * linear(h, "mlp.up"),
                       "mlp.down")
    return norm(x, "model.norm") @ weights[head].T


def test_a_head_of_its_own_is_used_and_saved_as_such(saved, run_train, write_rows, tmp_path,
                                                     toy_tokenizer):
    """config.json says that the head is the embedding, and the file holds another one."""
    head = torch.randn(725, 32, generator=torch.Generator().manual_seed(1))
    folder = saved(tiny_model("llama_tied", 725), {"lm_head.weight": head})
    path = write_rows(ROWS)
    code, _, err = run_train("--data", path, "--eval_data", write_rows(ROWS, "same.jsonl"),
                             "--model", folder, "--max_steps", 1, "--learning_rate", "1e-3")
    assert code == 0, err
    sums = {"lm_head.weight": 0.0, "model.embed_tokens.weight": 0.0}
    pairs, _ = load_pairs(path, toy_tokenizer, 1024, True)
    for name in sums:
        for pair in pairs:
            ids, start = pair.prompt_ids + pair.chosen_ids, len(pair.prompt_ids)
            logps = plain_llama(folder, ids, name).log_softmax(-1)[start - 1:-1]
            sums[name] += logps.gather(1, torch.tensor(ids[start:])[:, None]).sum().item()
    own, tied = (total / len(pairs) for total in sums.values())
    logged = read_metrics(tmp_path / "out")[1][0]["eval/logps/chosen"]
    assert logged == pytest.approx(own, abs=1e-3) and abs(own - tied) > 1
    # The saved student: two heads in its file, and a flag that says so.
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    student, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), INPUT.flatten()
    with torch.no_grad():
        logits = student(input_ids=ids[None]).logits[0].double()
    assert torch.allclose(logits, plain_llama(tmp_path / "out", ids), atol=1e-4)
    assert not torch.allclose(logits, plain_llama(folder, ids), atol=1e-3)  # it was trained


def test_a_tied_head_that_is_in_the_file_as_well_stays_tied(saved):
    model = tiny_model("llama_tied")
    loaded = load_model(saved(model, {"lm_head.weight": model.lm_head.weight.detach().clone()}))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.tie_word_embeddings is True
    assert torch.equal(logits_of(loaded), logits_of(model))


# --------------------------------------------------------------------------- what is not a student


@pytest.mark.parametrize("is_there", [(), ("config.json", "model.safetensors")], ids=str)
@pytest.mark.parametrize("is_missing", [(), ("tokenizer.json", "tokenizer_config.json")], ids=str)
def test_an_adapter_is_refused(saved, run_train, write_rows, tmp_path, is_there, is_missing):
    """With peft installed transformers would load its base and train beside the adapter."""
    folder, path = saved(tiny_model("llama", 725)), write_rows(ROWS)
    code, _, err = run_train("--data", path, "--model", folder, "--max_steps", 1, "--lora_rank", 2,
                             "--save_adapter")
    assert code == 0, err
    for name in is_there:
        shutil.copy(os.path.join(folder, name), tmp_path / "out")
    for name in is_missing:
        os.remove(tmp_path / "out" / name)
    result = run_train("--data", path, "--model", tmp_path / "out", "--out_dir", tmp_path / "next")
    assert_one_line(result, "an adapter; merge it into its base", "--save_adapter")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "torchao",
                                    "compressed-tensors"])
def test_quantised_weights_are_refused_before_they_are_read(
        saved, run_train, write_rows, tmp_path, method):
    folder = saved(tiny_model("llama", 725), flags={"quantization_config": {
        "quant_method": method, "bits": 4}})
    (tmp_path / "model/model.safetensors").write_bytes(b"not read")
    result = run_train("--data", write_rows(ROWS), "--model", folder)
    assert_one_line(result, f"quantised ({method})", "16 or 32 bits")


def test_weights_that_lack_a_package_are_one_line(saved):
    folder = saved(tiny_model("llama", 725), flags={"quantization_config": {
        "quant_method": "bitsandbytes", "load_in_8bit": True}})
    with pytest.raises(BadInput, match="requires bitsandbytes"):
        load_model(folder)


def other_kind(kind):
    name = kind.partition("For")[0]
    small = SMALL if name in ("Bert", "Llama") else dict(
        d_model=16, num_heads=2, encoder_layers=1, decoder_layers=1, num_layers=1, d_kv=8,
        encoder_attention_heads=2, decoder_attention_heads=2)
    config = getattr(transformers, f"{name}Config")(vocab_size=725, num_labels=1, **small)
    return getattr(transformers, kind)(config)


@pytest.mark.parametrize("kind, what", [
    ("T5ForConditionalGeneration", "an encoder-decoder"),
    ("BartForConditionalGeneration", "an encoder-decoder"),
    ("BertForMaskedLM", "a classifier or encoder"),
    ("LlamaForSequenceClassification", "a classifier or encoder"),
    ("LlamaForTokenClassification", "a classifier or encoder")])
def test_what_generates_no_text_is_named(saved, run_train, write_rows, kind, what):
    folder = saved(other_kind(kind))
    assert_one_line(run_train("--data", write_rows(ROWS), "--model", folder), f"--model {folder}",
                    f"{what} ({kind})", "give a decoder")
    if kind.endswith("SequenceClassification"):
        load_model(folder, kind=AutoModelForSequenceClassification, flag="--reward_model")


# ------------------------------------------------------------------------- experts, ids and folders


@pytest.mark.parametrize("kind, more", [
    ("Llama", {}), ("Mixtral", dict(num_local_experts=2, num_experts_per_tok=1)),
    ("Qwen2Moe", dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
                      shared_expert_intermediate_size=16))])
def test_experts_are_warned_of(saved, run_train, write_rows, kind, more):
    torch.manual_seed(0)
    folder = saved(build(kind, **GROUPED, **more)(725))
    code, _, err = run_train("--data", write_rows(ROWS), "--model", folder, "--max_steps", 1)
    assert code == 0, err
    assert err.count("warning: --model is a mixture of experts") == (kind != "Llama")


def test_a_token_beyond_the_embeddings_is_refused():
    model = tiny_model("llama", 97)
    check_ids(model, [0, 96], "rows.jsonl:3")
    with pytest.raises(IndexError):  # what it prevents
        model(input_ids=torch.tensor([[97]]))
    with pytest.raises(BadInput, match="^rows.jsonl:3: token id 97, .* knows 97 tokens; give "):
        check_ids(model, [5, 97, 4], "rows.jsonl:3")


def test_a_model_smaller_than_its_tokenizer_gives_one_line(saved, run_train, run_stage, write_rows,
                                                            tmp_path):
    folder, path = saved(tiny_model("llama", 300)), write_rows(ROWS)
    text = tmp_path / "text.txt"
    text.write_text("What is it? It is one, I think.\n" * 9)
    out = ["--out_dir", tmp_path / "eval"]
    small = ["--model", folder, "--base_model", folder, *out]
    assert_one_line(run_train("--data", path, "--model", folder), path, "knows 300 tokens")
    for flags in (["--data", path], ["--text", text], ["--prompts", path]):
        assert_one_line(run_stage(evaluation, *small, *flags), "knows 300 tokens")
    assert_one_line(run_stage(sample, "--model", folder, "--prompt", "What is it?"),
                    "the prompt", "knows 300 tokens")


def test_links_and_names_with_colons_and_spaces(saved, run_train, write_rows, tmp_path):
    where = tmp_path / "a: b " / ("long " * 30)
    where.mkdir(parents=True)
    shutil.move(saved(tiny_model("llama", 725)), where / "my: model")
    shutil.move(write_rows(ROWS), where / "my: rows.jsonl")
    (where / "real out").mkdir()
    for name, target in (("model", "my: model"), ("rows", "my: rows.jsonl"), ("out", "real out")):
        (tmp_path / name).symlink_to(where / target)
    weights = []
    for names in (("my: model", "my: rows.jsonl", "my: out"), ("model", "rows", "out")):
        model, data, out = ((tmp_path if names[0] == "model" else where) / name for name in names)
        flags = ["--model", model, "--data", data, "--out_dir", out, "--max_steps", 1]
        for again in ([], ["--resume"], ["--overwrite"]):
            code, _, err = run_train(*flags, *again)
            assert code == 0, err
        weights.append(load_file(out / "model.safetensors"))
        assert read_lines(out / "metrics.jsonl")
    assert os.path.islink(tmp_path / "out")
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", "{}"), ("tokenizer.json", '{"model": {"type": "New"}}'),
    ("config.json", {"hidden_act": "none"}), ("config.json", {"dtype": "foo"}),
    ("config.json", {"vocab_size": "97"}), ("config.json", {"num_attention_heads": 5}),
    ("config.json", {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.LM"},
                     "model_type": "its own"}),
    ("pytorch_model.bin", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
])
def test_damaged_files_are_one_line(saved, run_train, write_rows, name, content):
    folder = saved(tiny_model("llama", 725), flags=content if name == "config.json" else None)
    if name != "config.json":
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            file.write(content)
    if name == "pytorch_model.bin":
        os.remove(os.path.join(folder, "model.safetensors"))
    assert_one_line(run_train("--data", write_rows(ROWS), "--model", folder), f"--model {folder}")


def test_the_limits_of_position_are_known_by_all_their_names():
    def limit(**config):
        text = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace(**config))
        return position_limit(types.SimpleNamespace(config=text))

    assert limit(max_position_embeddings=64) == limit(max_seq_len=64) == 64
    assert limit() == limit(max_position_embeddings=None) == limit(max_position_embeddings=-1)
    assert limit() == math.inf
