"""Write one output row per input row, and continue after a crash. Used by teacher, reward and eval.

A row is finished once its whole line is in the output file. The same command skips finished rows,
cuts a torn last line, and refuses a file that another model, task or judge made. Failed rows go
to <out>.failed.jsonl with the reason; the next run tries them again.
"""
import hashlib
import itertools
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from tqdm import tqdm

from infra.command import BadInput
from infra.files import only_writer
from infra.formats import canonical
from infra.rows import stream_rows

# Counts of the client that the summary names only if there were any.
RARE = {"unfinished": "replies ended for another reason", "thinking": "replies with thinking",
        "replaced": "characters that cannot be stored replaced"}
STOP_AFTER = 10  # failures that no row itself caused, with no success between them


class RowFailed(Exception):
    """One row cannot be finished. The text is the reason; the other rows continue.

    is_own says that the row itself is the cause, such as its length: others may pass.
    """
    def __init__(self, reason, is_own=False):
        super().__init__(reason)
        self.is_own = is_own


@dataclass(kw_only=True)
class Stage:
    """A step of the pipeline that adds keys to each row."""
    adds: tuple  # the keys that it adds
    provenance_key: str  # the added key that records the provenance; its value is a dict
    provenance: dict  # what makes the rows: the model, and a digest of the task
    check: Callable  # check(row, where) raises BadInput for an unusable row
    work: Callable  # work(row) returns the row with the added keys, or raises RowFailed
    show: Callable | None = None  # show(row) prints a finished row, for --show
    batch_size: int = 0  # above 0: work takes that many rows, and gives a row or RowFailed for each


def digest(row, ignored_keys=()):
    """A hash of a row's content without its id and the ignored keys, to compare rows by."""
    content = {key: value for key, value in row.items() if key not in ignored_keys and key != "id"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def checked_rows(path, limit, check, adds):
    """Yield (where, row) for the first `limit` rows (None: all): canonical, checked, with an id.

    The id of a row without one is its digest. BadInput for a bad row, and for an id used twice.
    """
    used = {}  # id -> where
    for where, row in itertools.islice(stream_rows(path), limit):
        row = canonical(row)
        check(row, where)
        row = {"id": row.get("id", digest(row, adds))} | row  # the id first: see read_finished
        row_id, shown = row["id"], json.dumps(row["id"])[:40]
        is_id = isinstance(row_id, (str, int)) and not isinstance(row_id, bool) and row_id != ""
        name = str(row_id)  # so 1 and "1" collide: eval.py builds longer ids from them
        if not is_id:
            raise BadInput(f"{where}: `id` is {shown}; it must be text or a whole number, or be "
                           "left out")
        if name in used:
            raise BadInput(f"{where}: the id {shown} is already used at {used[name]}; give each "
                           "row its own id, or its own prompt")
        used[name] = where
        yield where, row


def read_finished(path, adds, provenance_key=None, provenance=None):
    """{id: digest} of the finished rows in a file. A torn last line is cut off.

    BadInput for a line of another origin, or one whose provenance differs.
    """
    finished, size = {}, 0
    if not os.path.exists(path):
        return finished
    with open(path, "rb+") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and b'{"id": '.startswith(line[:7]):
                break  # a kill tore this line
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not {"id", *adds} <= row.keys():
                raise BadInput(f"{path}:{number}: not a row that this command wrote; write to "
                               "another file, or remove this one")
            found = row.get(provenance_key)
            found = found if isinstance(found, dict) else {}
            differ = [key for key, value in (provenance or {}).items() if found.get(key) != value]
            if differ:
                raise BadInput(f"{path}:{number}: made with another {' and '.join(differ)}; give "
                               "the same flags as before, or write to another file")
            finished[row["id"]] = digest(canonical(row), adds)
            size += len(line)
        file.truncate(size)
    return finished


def check_files(source, out):
    """BadInput if `out` cannot be written, or is `source`."""
    for path in (out, f"{out}.failed.jsonl"):
        is_odd = os.path.lexists(path) and not os.path.isfile(path)  # a folder, device, dead link
        if is_odd or not os.access(os.path.dirname(path) or ".", os.W_OK):
            raise BadInput(f"{path}: must be a file in a folder that exists and can be written to")
    if os.path.realpath(out) == os.path.realpath(source):
        raise BadInput(f"{out}: is also the file to read; write to another file")


def find_finished(stage, source, args):
    """(number of input rows, ids of those in args.out). BadInput for any unusable row."""
    finished = read_finished(args.out, stage.adds, stage.provenance_key, stage.provenance)
    total, skipped = 0, set()
    for where, row in checked_rows(source, args.limit, stage.check, stage.adds):
        total += 1
        if row["id"] in finished:
            if finished[row["id"]] != digest(row, stage.adds):
                raise BadInput(f"{where}: {args.out} holds the id {json.dumps(row['id'])[:40]} "
                               "with other content; write to another file")
            skipped.add(row["id"])
    return total, skipped


def outcomes(stage, rows, threads):
    """Yield (row, its finished row or the error of its work), in the order of completion.

    Without threads the work runs here. If a batch fails as a whole, each of its rows is tried
    alone: one bad row does not hold the others back.
    """
    def attempt(batch):
        try:
            results = stage.work(batch) if stage.batch_size else [stage.work(batch[0])]
            return list(zip(batch, results, strict=True))
        except Exception as error:
            if isinstance(error, RowFailed) and len(batch) > 1:
                return [outcome for row in batch for outcome in attempt([row])]
            return [(row, error) for row in batch]

    batches = iter(lambda: list(itertools.islice(rows, stage.batch_size or 1)), [])
    done = in_threads(attempt, batches, threads) if threads else map(attempt, batches)
    return itertools.chain.from_iterable(done)


def in_threads(work, items, threads):
    """Yield work(item) for each item, in the order of completion. work must not raise."""
    tasks, results = queue.Queue(), queue.Queue()

    def worker():
        while True:
            results.put(work(tasks.get()))

    for _ in range(threads):
        threading.Thread(target=worker, daemon=True).start()  # Ctrl-C does not wait for daemons
    in_flight = 0
    for item in items:
        tasks.put(item)
        in_flight += 1
        if in_flight == 2 * threads:  # one in work and one waiting per thread; memory stays flat
            yield results.get()
            in_flight -= 1
    for _ in range(in_flight):
        yield results.get()


def run_rows(stage, source, args, counts):
    """Finish the rows of `source` that args.out lacks. Returns the number of failed rows.

    args has out, limit, concurrency and show. counts is the client's Counter, for the summary;
    None: no server, the work runs in this thread. All rows are checked before the first request.
    Ends early after STOP_AFTER failures in a row whose cause is not the row itself.
    """
    check_files(source, args.out)
    with only_writer(args.out):
        return finish_rows(stage, source, args, counts)


def finish_rows(stage, source, args, counts):
    """run_rows, as the only writer of args.out."""
    total, skipped = find_finished(stage, source, args)
    rows = (row for _, row in checked_rows(source, args.limit, stage.check, stage.adds)
            if row["id"] not in skipped)
    failed_path = f"{args.out}.failed.jsonl"
    if os.path.exists(failed_path):
        os.remove(failed_path)
    done = failed = failed_in_a_row = 0
    bar = tqdm(total=total, initial=len(skipped), unit="row", disable=None, leave=False)
    try:
        with bar, open(args.out, "a", encoding="utf-8") as out:
            threads = 0 if counts is None else args.concurrency
            for row, result in outcomes(stage, rows, threads):
                if isinstance(result, RowFailed):
                    with open(failed_path, "a", encoding="utf-8") as file:
                        write_line(file, row | {"failed": str(result)})
                    failed += 1
                    failed_in_a_row += not result.is_own
                    reason = result
                    if failed_in_a_row == STOP_AFTER:
                        break
                elif isinstance(result, Exception):
                    raise result
                else:
                    made = stage.provenance | result[stage.provenance_key]
                    write_line(out, result | {stage.provenance_key: made})
                    done += 1
                    failed_in_a_row = 0
                    if args.show:
                        with bar.external_write_mode():
                            stage.show(result)
                if counts is not None:
                    tokens = counts["tokens_in"] + counts["tokens_out"]
                    bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
                bar.update()
    finally:  # printed after Ctrl-C as well
        print(f"{args.out}: {len(skipped) + done} of {total} rows "
              f"({len(skipped)} from before), {failed} failed"
              + ("" if counts is None else summary(counts)), flush=True)
    if failed:
        what = f"{failed} rows failed"
        if failed_in_a_row == STOP_AFTER:
            what = f"stopped after {STOP_AFTER} rows failed one after another"
        if not skipped and not done:  # some servers answer 400 or 500 to a wrong model or key
            reason = f"{reason}; no row succeeded: check --model, --key_env, the server's log"
        print(f"error: {what}, the last because {reason}; {failed_path} has them, "
              "and the same command tries them again", file=sys.stderr)
    return failed


def summary(counts):
    return (f"; {counts['requests']:,} requests, {counts['retries']:,} retries, "
            f"{counts['tokens_in']:,} tokens read, {counts['tokens_out']:,} written, "
            f"{counts['cut']:,} replies cut by --max_tokens"
            + "".join(f", {counts[name]:,} {what}" for name, what in RARE.items() if counts[name]))


def run_batches(path, rows, adds, work, batch_size, name):
    """Append work(batch) for the rows that `path` lacks; return {id: row} of the whole file.

    Unlike run_rows: batches instead of threads, for a model in this process. BadInput if `path`
    holds the id of a row with other content. `name` labels the progress bar.
    """
    with only_writer(path):
        finished = read_finished(path, adds)
        for row in rows:
            if finished.get(row["id"], digest(row, adds)) != digest(row, adds):
                raise BadInput(f"{path}: holds {json.dumps(row['id'])[:60]} by other weights, "
                               "settings or prompt; give another --out_dir")
        missing = [row for row in rows if row["id"] not in finished]
        bar = tqdm(total=len(missing), desc=name, disable=None, leave=False)
        with open(path, "a", encoding="utf-8") as file, bar:
            for start in range(0, len(missing), batch_size):
                for row in work(missing[start:start + batch_size]):
                    write_line(file, row)
                    bar.update()
    return {row["id"]: row for _, row in stream_rows(path)}


def write_line(file, row):
    file.write(json.dumps(row) + "\n")
    file.flush()
