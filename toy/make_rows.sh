#!/usr/bin/env bash
# Make toy/prompts.jsonl and toy/held_out.jsonl, then toy/scored.jsonl by stages 1 and 2 against
# toy/server.py. Takes seconds and no network. --concurrency 1 keeps the rows in order: they are
# written as they finish, and their order in the file is part of a training run.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
python toy/world.py --out toy
python toy/server.py --port 8090 &
trap 'kill $!; rm -r "$work"' EXIT
common=(--task toy/task.toml --base_url http://127.0.0.1:8090/v1 --model toy --concurrency 1)
python teacher.py "${common[@]}" --prompts toy/prompts.jsonl --out "$work/synthetic.jsonl"
python reward.py "${common[@]}" --data "$work/synthetic.jsonl" --out "$work/scored.jsonl"
mv "$work/scored.jsonl" toy/scored.jsonl
