"""Models and tokenizers: loading them, and what training changes about a loaded model."""
import contextlib
import functools
import gc
import json
import math
import os
import re

import torch
from huggingface_hub.utils import logging as hub_logging
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

import infra.distributed as ranks
from infra.command import BadInput, first_line, warn
from infra.nf4 import freeze_linears
from infra.rows import read_object

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOY_STUDENT = os.path.join(ROOT, "toy", "student")


def is_hub_id(model):
    """Whether --model reads like owner/name and is no folder here."""
    return not os.path.isdir(model) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model))


def check_model_name(model, flag="--model"):
    """BadInput for a missing folder. What reads like owner/name is left to the hub."""
    if not os.path.isdir(model) and not is_hub_id(model):
        raise BadInput(f"{flag} {model}: no such folder; {flag} takes a model folder or a hub id "
                       "such as owner/name")


def load_tokenizer(model, template_kwargs=None):
    """The tokenizer of a folder or hub id. BadInput if there is none, or no eos token.

    template_kwargs, such as {"enable_thinking": False}, become defaults of the chat template. The
    saved student carries them, so that training, eval.py and every server ask it alike.
    """
    check_model_name(model)
    hub_logging.set_verbosity_error()  # the hub client prints a line per attempt
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # damaged files raise errors of all kinds
        if os.path.exists(os.path.join(model, "adapter_config.json")):  # often without a tokenizer
            read_config(model)
        raise BadInput(f"--model {model}: no tokenizer found ({first_line(error)}); "
                       "--model takes a model folder or a hub id") from error
    if tokenizer.eos_token_id is None:
        raise BadInput(f"--model {model}: its tokenizer has no eos token to end an answer; set "
                       "eos_token in tokenizer_config.json")
    older = os.path.join(model, "chat_template.json")  # a file of the time when processors had it
    if not tokenizer.chat_template and os.path.exists(older):
        tokenizer.chat_template = read_object(older, "a whole one, or none").get("chat_template")
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise BadInput(f"--model {model}: its chat templates are {', '.join(sorted(named))}; call "
                       "one of them default in its tokenizer's files")
    if template_kwargs:
        template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
        for name in template_kwargs:
            if not re.search(rf"\b{name}\b", template):
                raise BadInput(f"--model {model}: its chat template does not use `{name}`; correct "
                               "or leave out --template_kwargs")
        tokenizer.chat_template = "".join(
            f"{{%- if {name} is not defined %}}"
            f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}{{% endif %}}"
            for name, value in template_kwargs.items()) + template
    return tokenizer


def read_config(model, flag="--model"):
    """The config of a folder or hub id. BadInput if there is none, as in an adapter's folder."""
    check_model_name(model, flag)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # a table of missing weights: load_model refuses
    if find_adapter_config_file(model):  # with peft transformers would load its base as well
        raise BadInput(f"{flag} {model}: an adapter; merge it into its base (peft's "
                       "merge_and_unload; train.py does so without --save_adapter)")
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # damaged files raise errors of all kinds
        raise BadInput(f"{flag} {model}: cannot be loaded ({first_line(error)}); "
                       f"{flag} takes a model folder or a hub id") from error


def changes_the_model(key, model):
    """Whether a model that leaves out this weight of its files is another model. It is not without
    old buffers, layers that predict later tokens, and modules beside the decoder: a vision tower.
    """
    config, prefix = model.config.get_text_config(), model.base_model_prefix
    layer, more = re.search(r"layers\.(\d+)", key), vars(config).get("num_nextn_predict_layers")
    if (vars(model.config).get("quantization_config")  # scales, say; train.py refuses it anyway
            or re.search(r"(attn\.bias|causal_mask|inv_freq|masked_bias|position_ids)$", key)
            or layer and more and 0 <= int(layer[1]) - config.num_hidden_layers < more):
        return False
    modules, owners = dict(model.named_modules()), [key, f"{prefix}.{key}"]  # as base models save
    while not modules.keys() >= {*owners}:
        owners = [name if name in modules else name.rpartition(".")[0] for name in owners]
    return "lora_" in key or not {*owners} <= {"", prefix}


def load_model(model, dtype=torch.float32, kind=AutoModelForCausalLM, flag="--model"):
    """The model of a folder or hub id in eval mode, with SDPA attention. BadInput if it fails."""
    config = read_config(model, flag)
    kinds = " ".join(config.architectures or [])
    if kind is AutoModelForCausalLM and (
            config.is_encoder_decoder or re.search("Classification|Reward|Masked", kinds)):
        what = "an encoder-decoder" if config.is_encoder_decoder else "a classifier or encoder"
        raise BadInput(f"{flag} {model}: {what} ({kinds}); give a decoder: ...ForCausalLM")
    gc.collect()  # a model that was let go may be a cycle, as checkpoint_layers makes one
    # On Hopper GPUs SDPA prefers cuDNN, whose backward gives nan for some masked rows
    # (github.com/pytorch/pytorch/issues/196678) and which plans again for every shape.
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        loaded, found = kind.from_pretrained(model, dtype=dtype, output_loading_info=True,
                                             trust_remote_code=False)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise BadInput(f"{flag} {model}: cannot be loaded ({first_line(error)}); "
                       f"{flag} takes a model folder or a hub id") from error
    if loaded.config.model_type != config.model_type:
        warn(f"{flag} {model}: only the text model of this {config.model_type} is loaded and saved")
    missing = sorted(found["missing_keys"])  # transformers would make them up at random
    if missing:
        raise BadInput(f"{flag} {model}: its files lack {len(missing)} of the weights, such as "
                       f"{missing[0]}; fetch it again")
    if loaded.base_model is loaded:  # Llama4ForCausalLM: its prefix is that of the larger model
        loaded.base_model_prefix = "model"
    for key in sorted(found["unexpected_keys"]):
        if changes_the_model(key, loaded):
            raise BadInput(f"{flag} {model}: its files hold {key}, which the model of its "
                           "config.json lacks; merge adapters, or correct config.json")
    if vars(loaded.config).get("tie_word_embeddings") and not loaded.all_tied_weights_keys:
        loaded.config.tie_word_embeddings = False  # the files hold another head, which is used
    loaded.config.return_dict, own = True, vars(loaded).get("generation_config")
    try:
        if own:  # a classifier has none
            own.validate(strict=True)
    except ValueError as error:  # save_pretrained would raise it after training
        warn(f"{flag} {model}: of its generation_config.json only the ids of tokens are kept "
             f"({first_line(error)})")
        loaded.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id)
    return loaded.eval()


def check_ids(model, ids, where):
    """BadInput, which names the row, if the model has no embedding for a token id."""
    size = model.get_input_embeddings().num_embeddings
    if max(ids) >= size:
        raise BadInput(f"{where}: token id {max(ids)}, but the model knows {size} tokens; give "
                       "--model the tokenizer that it was trained with")


def position_limit(model):
    """The longest row in tokens that a model reads; math.inf if its config sets no limit."""
    config = model.config.get_text_config()  # getattr, as GPT-2 has it under another name
    limit = getattr(config, "max_position_embeddings", None) or vars(config).get("max_seq_len")
    return limit if limit and limit > 0 else math.inf


def cast_weights(model, dtype):
    """Cast the weights in place, not the buffers: rotary frequencies must stay float32."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)


def fits(model, device):
    """Whether a model on the CPU leaves a quarter of the device's free memory for activations."""
    if device != "cuda":
        return True
    torch.cuda.empty_cache()
    return sum(weight.nbytes for weight in model.parameters()) < 0.75 * torch.cuda.mem_get_info()[0]


def load_saved(args):
    """The student in out_dir, on the run's device; its weights on the host if they do not fit."""
    student = load_model(args.out_dir, dtype="auto")
    # Wide enough to round nothing, and no wider: in 16 bits it fits where it was trained.
    cast_weights(student, torch.promote_types(student.dtype, getattr(torch, args.dtype)))
    if not fits(student, args.device):
        freeze_linears(student)  # so that its weights stay here, and are sent one at a time
    return student.to(args.device)


def tokens_that_fit(model, checkpointing):
    """--tokens_per_batch by the memory that a GPU has left beside a model: 1,024 to 8,192.

    A trained weight takes 16 bytes more (master, gradient, moments). A token takes, in each layer,
    about 36 bytes per hidden and 8 per intermediate unit (1.0 to 1.3 times what bench/memory.py
    counts for Llamas); with checkpointing 4 per hidden unit, and the whole in the layer at work.
    Chunks of logits take 1 GB at most.
    """
    config = model.config.get_text_config()
    hidden, wide = config.hidden_size, vars(config).get("intermediate_size")
    layer = 36 * hidden + 8 * (wide if isinstance(wide, int) else 4 * hidden)
    trained = sum(ranks.local_shard(weight)[0].numel() for weight in model.parameters()
                  if weight.requires_grad)
    layers = config.num_hidden_layers
    token = 4 * layers * hidden + layer if checkpointing else layers * layer
    free = 0.9 * torch.cuda.mem_get_info()[0] - 16 * trained - 1e9
    tokens = min(max(1024, int(free / token) // 1024 * 1024), 8192)
    return -ranks.maximum(-tokens)  # of the rank with the least


def sample_weights(weights):
    """{name: at most 1,000 evenly spaced values}, copied, of {name: tensor}."""
    return {name: weight.detach().flatten()[::math.ceil(weight.numel() / 1000)].cpu().clone()
            for name, weight in weights.items()}


def share_changed(before, after):
    """Share of the weights in two sample_weights that differ, in the dtype of `before`."""
    changed = torch.cat([after[name].to(before[name].dtype) != before[name]
                         for name in before.keys() & after.keys()])
    return changed.float().mean().item()


def decoder_layers(model, flag):
    """The decoder's stacked blocks. BadInput names the flag if transformers does not mark them."""
    layers = [module for module in model.modules()
              if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise BadInput(f"{flag}: this architecture does not mark its layers; leave the flag out")
    return layers


def compile_layers(model):
    """torch.compile the decoder's blocks. They share graphs, so it takes seconds, not minutes.

    Each of these doubles the graphs: adapters on or off; gradients or none; one row or several; an
    input that needs a gradient or not; a window or none.
    """
    torch._dynamo.config.recompile_limit = 32
    for layer in decoder_layers(model, "--compile"):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def uncompiled(args):
    """Without compiling, where it would make graphs that training never uses."""
    return torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()


def checkpoint_layers(model):
    """Keep only each layer's input and compute the rest again in backward: less memory, more time.

    transformers' own switch needs training mode, which would turn dropout on.
    """
    for layer in decoder_layers(model, "--gradient_checkpointing"):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False,
                                          preserve_rng_state=False)  # nothing draws numbers
