"""A reward model in this process: a transformers folder with one label, scored in batches."""
import torch
from jinja2 import TemplateError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from infra.command import BadInput, first_line, one_line
from infra.distributed import best_device
from infra.formats import as_messages
from infra.models import load_model, position_limit
from infra.resumable import RowFailed
from infra.rows import question_of

TOKENS_PER_BATCH = 8192  # in one forward pass, padding included: memory and speed only


class RewardModel:
    """scores() of a reward model's folder or hub id. BadInput if it is no reward model."""

    def __init__(self, name):
        self.name, device = f"--reward_model {name}", best_device()
        self.model = load_model(name, torch.float32 if device == "cpu" else "auto",
                                AutoModelForSequenceClassification, "--reward_model").to(device)
        labels = self.model.config.num_labels
        if labels != 1:
            raise BadInput(f"{self.name}: a classifier of {labels} labels; a reward model has one")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.name}: no tokenizer found ({first_line(error)})") from error
        self.configs = self.model.config, self.model.config.get_text_config()
        self.own_pad = self.configs[1].to_dict().get("pad_token_id")  # not all configs have one
        self.check_batches()

    @torch.no_grad()
    def check_batches(self):
        """BadInput if a batch of two gives other scores than transformers gives each text alone."""
        rows = [self.encode("How are you?", answer) for answer in ("Fine.", "Fine, " * 9 + "fine.")]
        alone = [self.model(**{name: torch.tensor([ids], device=self.model.device)
                               for name, ids in row.items()}).logits.item() for row in rows]
        limit = 1e-3 if self.model.dtype == torch.float32 else 0.1
        for score, other in zip(self.forward(rows).tolist(), alone):
            if not abs(score - other) <= limit * max(1, abs(other)):
                raise BadInput(f"{self.name}: a text gets {score:.4g} in a batch, but {other:.4g} "
                               "alone; serve the model, and give --endpoint")

    def encode(self, question, answer):
        """Token ids of a question, text or messages, and its answer, by the chat template.

        A model without one reads a pair of texts.
        """
        if not self.tokenizer.chat_template:
            return dict(self.tokenizer(question_of({"prompt": question}), answer, verbose=False))
        messages = as_messages(question) + [{"role": "assistant", "content": answer}]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise BadInput(f"{self.name}: its chat template refuses a row: "
                           f"{one_line(str(error))}") from error
        return dict(self.tokenizer(text, add_special_tokens=False, verbose=False))

    @torch.no_grad()
    def scores(self, texts):
        """A score, or the RowFailed that says why there is none, per (question, answer).

        Texts are scored in batches of similar length. Padding stands on the right, and a decoder's
        score is that of the last token that is no padding.
        """
        encoded = [self.encode(*text) for text in texts]
        lengths = [len(each["input_ids"]) for each in encoded]
        limit, batches = position_limit(self.model), []
        results = [RowFailed(f"a text has {length} tokens, but the reward model takes {limit}",
                             is_own=True) if length > limit else None for length in lengths]
        for i in sorted(range(len(texts)), key=lengths.__getitem__):  # the newest is the longest
            if results[i] is not None:
                continue
            if batches and lengths[i] * (len(batches[-1]) + 1) <= TOKENS_PER_BATCH:
                batches[-1].append(i)
            else:
                batches.append([i])
        for batch in batches:
            rewards = self.forward([encoded[i] for i in batch])  # (B,)
            for i, reward in zip(batch, rewards.tolist()):
                results[i] = reward if abs(reward) < 1e300 else RowFailed(  # nan is not
                    f"the reward model gave {reward}")
        return results

    def forward(self, rows):
        """The scores (B,) float32 of encoded rows."""
        # The score stands at the last token that is not the model's own padding. What is behind it
        # goes, then the rest is padded with a token that none has, in either place of the config.
        ends = [max((i for i, token in enumerate(row["input_ids"]) if token != self.own_pad),
                    default=0) + 1 for row in rows]
        rows = [{name: ids[:end] for name, ids in row.items()} for row, end in zip(rows, ends)]
        width, used = max(ends), {token for row in rows for token in row["input_ids"]}
        pad = next(token for token in range(len(used) + 1) if token not in used)
        for config in self.configs:
            config.pad_token_id = pad
        fill = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0}
        inputs = {name: torch.tensor([row[name] + [fill[name]] * (width - len(row[name]))
                                      for row in rows], device=self.model.device)  # (B, T)
                  for name in rows[0]}
        return self.model(**inputs).logits[:, 0].float()
