"""Stage 1, the teacher: an LLM answers each prompt, criticises its answer and rewrites it.

    prompts.jsonl    {"id", "prompt", ...}
    synthetic.jsonl  + "rejected": the answer, "critique", "chosen": the rewrite,
                       "teacher": {model, task, flags, finish, tokens}

    python teacher.py --task tasks/sycophancy.toml --prompts prompts.jsonl --out synthetic.jsonl \\
        --base_url http://127.0.0.1:8000/v1 --model NAME
    ... --limit 3 --show        three prompts, whole conversations printed: read them first

No human labels anything. Any OpenAI-compatible server will do. Run the same command again after a
crash or Ctrl-C: it continues, and retries the rows in <out>.failed.jsonl. A reply that --max_tokens
cuts is counted, and marked "length" in teacher.finish; train.py skips rows with a cut answer. What
a reasoning model thinks goes to teacher.thinking, never into an answer.
"""
import sys

from infra.client import Client, add_stage_flags, chat
from infra.command import Parser, at_least, printable, run
from infra.formats import as_messages, remove_judgement
from infra.judgements import asked_with
from infra.resumable import RowFailed, Stage, run_rows
from infra.rows import check_prompt
from infra.task import load_task


def self_critique(client, task, args, row):
    """Answer the row's prompt, criticise the answer, rewrite it: one growing conversation.

    Returns the row with the three texts added. Raises the errors of Client.post.
    """
    messages, replies = opening(task, row["prompt"]), []
    for request in (None, task.critique, task.revision):  # the prompt asks for the first answer
        if request:
            messages.append({"role": "user", "content": request})
        reply = chat(client, messages, args.model, args.max_tokens, args.temperature)
        if reply.problem:
            raise RowFailed(reply.problem, reply.refused)
        messages.append({"role": "assistant", "content": reply.text})
        replies.append(reply)
    answer, critique, rewrite = replies
    # infra.rows.is_cut reads finish: the original answer's first, the final rewrite's last.
    teacher = {"finish": [reply.finish for reply in replies],
               "tokens": sum(reply.tokens for reply in replies)}
    for name in ("thinking", "served", "left_out"):  # thoughts are never sent back or trained on
        if any(values := [vars(reply)[name] for reply in replies]):
            teacher[name] = values
    return row | {"rejected": answer.text, "critique": critique.text, "chosen": rewrite.text,
                  "teacher": teacher}


def opening(task, prompt):
    """The messages before the first answer: the prompt, after the task's system message if any."""
    messages = as_messages(prompt)
    if task.system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": task.system})
    return messages


def show_conversation(task, row):
    """Print a finished row as a conversation."""
    turns = [(message["role"], message["content"]) for message in opening(task, row["prompt"])]
    turns += [("assistant, rejected", row["rejected"]),
              ("user", task.critique), ("assistant, critique", row["critique"]),
              ("user", task.revision), ("assistant, chosen", row["chosen"])]
    print(f"======== {printable(str(row['id']))}, finish {row['teacher']['finish']}")
    for role, text in turns:
        print(f"-------- {role}\n{printable(text.strip())}")


def main(argv=None):
    parser = Parser("Stage 1: a teacher answers, criticises its answer and rewrites it.")
    parser.add_argument("--task", required=True, help="task file, such as tasks/sycophancy.toml")
    parser.add_argument("--prompts", required=True, help="rows with a prompt")
    add_stage_flags(parser, max_tokens=512)
    parser.add_argument("--temperature", type=at_least(0, float), default=0.7, help="of sampling")
    args = parser.parse_args(argv)
    task, client = load_task(args.task), Client(args)
    texts = {"system": task.system, "critique": task.critique, "revision": task.revision}
    made = asked_with(args, texts, "temperature", "max_tokens", "extra_body")
    stage = Stage(adds=("rejected", "critique", "chosen", "teacher"), provenance_key="teacher",
                  provenance=made, show=lambda row: show_conversation(task, row),
                  check=lambda row, where: check_prompt(remove_judgement(row), where),
                  work=lambda row: self_critique(client, task, args, row))
    sys.exit(1 if run_rows(stage, args.prompts, args, client.counts) else 0)


if __name__ == "__main__":
    run(main)
