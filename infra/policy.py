"""The student made ready to train: rounding, adapters, compiling, its device or its shards."""
import torch

import infra.distributed as ranks
from infra import models, nf4
from infra.command import BadInput, warn
from infra.lora import add_lora


def load_policy(args, dtype):
    """(model in dtype, dtype to save it in, sample of its stored weights).

    It stays in eval mode: dropout would add noise to the log-ratios. What rounding to dtype
    changes is changed in policy and reference alike, so that they are equal at step 0.
    """
    name = args.model or models.TOY_STUDENT
    quantised = vars(models.read_config(name)).get("quantization_config")
    if quantised:  # eval.py and sample.py take it
        raise BadInput(f"--model {name}: quantised ({quantised.get('quant_method')}), so it cannot "
                       "be trained; give the model in 16 or 32 bits")
    policy = models.load_model(name, dtype="auto")
    if any("experts" in module or "moe" in module for module, _ in policy.named_modules()):
        warn("--model is a mixture of experts, and the loss has no term that balances their load")
    saved_dtype = policy.dtype if args.save_dtype == "auto" else getattr(torch, args.save_dtype)
    weights_before = models.sample_weights(dict(policy.named_parameters()))
    if args.base_bits:
        nf4.freeze_linears(policy, args.device)
    if dtype != torch.float32 and policy.dtype != dtype:
        print(f"student: stored in {str(policy.dtype)[6:]}, rounded to {args.dtype} first")
    if dtype != torch.float32 or args.lora_rank or not args.fsdp:
        models.cast_weights(policy, dtype)  # else FSDP makes them float32, layer by layer
    return policy, saved_dtype, weights_before


def place(policy, args, device, dtype, forward):
    """Add what the flags ask for, then send the model to its device or shard it over ranks.

    forward(model, batch) is the forward pass around which FSDP gathers weights.
    """
    if args.lora_rank:
        add_lora(policy, args.lora_rank, args.lora_alpha)
    if args.compile:
        models.compile_layers(policy)
    if args.gradient_checkpointing:
        models.checkpoint_layers(policy)
    if args.fsdp:
        layers = models.decoder_layers(policy, "--fsdp")
        ranks.shard(policy, layers, device, dtype, forward)
    else:
        policy.to(device)
    if args.tokens_per_batch is None:
        args.tokens_per_batch = models.tokens_that_fit(policy, args.gradient_checkpointing)
        print(f"tokens per batch: {args.tokens_per_batch}, by the GPU's free memory")
