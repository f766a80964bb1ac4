"""The reference's log-probabilities, computed once and kept in a file that runs share.

Before the first step the policy is the reference, so it fills the cache and no second model is
loaded. The file's name is a hash of what fixes the values: weights, config, compute dtype and
attention implementation. The key of an entry is a hash of its token ids and of where the response
starts.
"""
import contextlib
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import infra.distributed as ranks
from infra.command import BadInput, first_line
from infra.files import make_folder, writing

VERSION = 2  # Raise it when a mended program computes other values than before, for any model.


class ReferenceCache:
    """The reference's summed log-probability of each answer, in a safetensors file."""

    def __init__(self, args, model):
        """Create --ref_cache_dir if needed, and read what other runs have computed."""
        folder = os.path.expanduser(args.ref_cache_dir)
        make_folder("--ref_cache_dir", folder)
        how = [args.dtype] + ["sharded"] * args.fsdp + ["compiled"] * args.compile
        self.name = fingerprint(model, " ".join(how))
        self.path = os.path.join(folder, f"reference-{self.name}.safetensors")
        self.logps = self.read()  # {key: float}
        self.computed, self.seconds = 0, 0.0

    def read(self):
        try:
            with safe_open(self.path, "pt") as file:  # keys (E, 32) uint8, logps (E,) float32
                keys, logps = file.get_tensor("keys"), file.get_tensor("logps")
        except FileNotFoundError:
            return {}
        except (OSError, SafetensorError) as error:
            raise BadInput(f"{self.path}: damaged ({first_line(error)}); delete it") from error
        if not (keys.dtype == torch.uint8 and keys.shape[1:] == (32,)
                and logps.dtype == torch.float32 and logps.shape == keys.shape[:1]
                and logps.isfinite().all()):
            raise BadInput(f"{self.path}: damaged; delete it")
        return {key.tobytes(): logp for key, logp in zip(keys.numpy(), logps.tolist())}

    def save(self):
        """Write the file whole or not at all, with entries that other runs have added to it."""
        self.logps = self.read() | self.logps
        keys = torch.frombuffer(bytearray(b"".join(self.logps)), dtype=torch.uint8).view(-1, 32)
        temporary = f"{self.path}.{os.getpid()}.tmp"
        with writing(self.path):
            save_file({"keys": keys, "logps": torch.tensor(list(self.logps.values()))}, temporary)
        os.replace(temporary, self.path)

    def missing(self, pairs):
        """Indices of the pairs with an answer that the cache lacks."""
        self.logps = ranks.broadcast(self.logps)  # all ranks must agree on what is missing
        return [i for i, pair in enumerate(pairs) if not set(keys_of(pair)) <= self.logps.keys()]

    @contextlib.contextmanager
    def filling(self):
        """Save what was added within, also if it was interrupted."""
        before, began = len(self.logps), time.monotonic()
        self.last_save = began
        try:
            yield
        finally:
            if ranks.rank() == 0 and len(self.logps) > before:
                self.save()
            self.seconds += time.monotonic() - began

    def add(self, pairs, logps):
        """Add all ranks' pairs, with log-probabilities (B, 2). BadInput if one is not finite."""
        for where, keys, both in ranks.all_gather([
                (pair.where, keys_of(pair), both) for pair, both in zip(pairs, logps.tolist())]):
            if not torch.tensor(both).isfinite().all():
                raise BadInput(f"{where}: the reference's log-probability is not finite; are the "
                               "weights of --model sound?")
            self.logps |= zip(keys, both)
            self.computed += 1
        if ranks.rank() == 0 and time.monotonic() - self.last_save > 60:
            self.save()
            self.last_save = time.monotonic()

    def lookup(self, pairs):
        """(2, P): the log-probabilities of the chosen answers, then of the rejected ones."""
        return torch.tensor([[self.logps[key] for key in keys_of(pair)] for pair in pairs]).T


def keys_of(pair):
    """A key of 32 bytes for each answer: token ids, and where the response starts."""
    return [hashlib.sha256(json.dumps([pair.prompt_ids, ids]).encode()).digest()
            for ids in pair.answers]


def fingerprint(model, computed_as):
    """Hex hash of a reference: weights, buffers, config, compute dtype and attention kernel.

    computed_as is such as "bfloat16" or "float32 sharded".
    """
    def digest(item):
        name, tensor = item
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        header = f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode()
        return hashlib.sha256(header + hashlib.sha256(content).digest()).digest()

    tensors = sorted([*model.named_parameters(), *model.named_buffers()])
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock: all cores work
        weights = hashlib.sha256(b"".join(pool.map(digest, tensors))).hexdigest()
    config = {key: value for key, value in model.config.to_dict().items()
              if key not in ("_name_or_path", "transformers_version")}
    parts = [VERSION, weights, config, computed_as, model.config._attn_implementation]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
