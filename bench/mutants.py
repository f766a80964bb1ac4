"""How many small faults in the code do the tests see? Breaks five files, one place at a time.

    python bench/mutants.py [--only rdpo.py] [--per_file 100] [--seed 0] [--jobs 1]

A fault changes one expression or statement: `<` to `<=`, `+` to `-`, a constant by one, `and` to
`or`, a bound of a slice, the order of two arguments, a part of a regular expression; or it leaves
a call out. It is made in a temporary copy, where the tests that reach its statement run until one
fails, first the fast ones and those that saw other faults. A fault that no test sees is printed: a
test is missing, or the change makes no difference. Left out: messages, type hints, main(), what
only several processes notice.
"""
import argparse
import ast
import builtins
import collections
import contextlib
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
import pytest  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGETS = {  # file -> names of its functions and constants, None: all
    "rdpo.py": None, "data.py": None, "infra/rounding.py": None, "infra/checkpoint.py": None,
    "infra/verdicts.py": None}
TESTS = [f"tests/test_{name}.py" for name in (
    "rdpo", "layouts", "data", "rounding", "lora", "verdicts", "reward", "toy", "bad_input",
    "train", "distributed", "checkpoint")]
# Tests that take long, start processes, or measure time.
LEFT_OUT = ("real_process or signal_saves or compile or to_nearest_it_is_not or "
            "time_is_linear")
BUDGET = 20  # seconds of processor time of the tests for one fault
# Statements, keywords and calls whose change no test of one process on a CPU could notice.
STATEMENTS = re.compile(r"dist\.barrier|HEAD_BYTES = |CHUNK = |def main|if __name__|if args\.fsdp|"
                        r"if dist\.rank\(\) > 0|if device\.type == 'cuda'")
KEYWORDS = {"device", "non_blocking", "encoding", "use_cache", "map_location", "exist_ok",
            "indent", "buffering"}
ORDERLESS = {"min", "max", "refuse"}  # the order of arguments does not matter

# ------------------------------------------------------------------------------------- the faults

PAIRS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot),
         (ast.In, ast.NotIn), (ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr),
         (ast.LShift, ast.RShift), (ast.And, ast.Or)]
OPERATORS = dict(PAIRS) | {other: one for one, other in PAIRS} | {
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitXor: ast.BitAnd}
NAMES = [("min", "max"), ("any", "all"), ("floor", "ceil"), ("startswith", "endswith"),
         ("rstrip", "lstrip"), ("search", "match"), ("zeros_like", "ones_like"), ("sum", "mean"),
         ("abs", "neg"), ("find", "rfind"), ("sorted", "list"), ("logsumexp", "amax")]
NAMES = dict(NAMES) | {other: one for one, other in NAMES}
REGEX = re.compile(r"\\.|\{[^{}]*\}|\[(?:\\.|[^]\\])+\]|\(\?<?[:!=]|\|[^|()\[\]]*|.", re.S)


def edits(node):
    """Yield (part of the node, what stands there instead)."""
    def changed(**fields):
        return node, f"({ast.unparse(type(node)(**dict(ast.iter_fields(node)) | fields))})"

    match node:
        case ast.Compare(ops=[operator]):
            yield changed(ops=[OPERATORS[type(operator)]()])
        case ast.BoolOp(values=values):
            yield changed(op=OPERATORS[type(node.op)]())
            yield from (changed(values=values[:i] + values[i + 1:]) for i in range(len(values)))
        case ast.BinOp(op=operator) if type(operator) in OPERATORS:
            yield changed(op=OPERATORS[type(operator)]())
        case ast.UnaryOp(operand=operand):
            yield node, ast.unparse(operand)
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield node, str(value + 1)
            yield node, f"({value - 1})"
        case ast.If(test=ast.Name() | ast.Attribute() | ast.Call() as test):
            yield test, f"not {ast.unparse(test)}"
        case ast.IfExp(body=body, orelse=orelse):
            yield changed(body=orelse, orelse=body)
        case ast.Slice(lower=lower, upper=upper):
            for bound in filter(None, (lower, upper)):
                yield bound, ""
                if not isinstance(bound, ast.Constant):
                    yield bound, f"{ast.unparse(bound)} + 1"
        case ast.Call(func=func, args=args, keywords=keywords):
            if ast.unparse(func) not in ORDERLESS:
                yield from (changed(args=args[:i] + args[i:i + 2][::-1] + args[i + 2:])
                            for i in range(len(args) - 1))
            yield from (changed(keywords=[other for other in keywords if other is not keyword])
                        for keyword in keywords if keyword.arg not in KEYWORDS)
        case ast.Name(id=name) if name in NAMES:
            yield node, NAMES[name]
        case ast.Attribute(attr=name) if name in NAMES:
            yield changed(attr=NAMES[name])
        case ast.Return(value=ast.expr()):
            yield node, "return None"
        case ast.Expr(value=ast.Call()) | ast.Continue() | ast.Break() | ast.Raise():
            yield node, "pass"
        case ast.AugAssign(op=operator):
            yield node, "pass"
            if type(operator) in OPERATORS:
                yield changed(op=OPERATORS[type(operator)]())


def regex_edits(text):
    """Yield (start, end, other) of a string literal that is a regular expression."""
    for part in REGEX.finditer(text):
        start, end = part.span()
        if part[0] in ("*", "+"):
            yield start, end, {"*": "+", "+": "*"}[part[0]]
        elif part[0] in ("?", "^", "$", r"\b") or part[0].startswith("|"):
            yield start, end, ""
        elif part[0].startswith("["):  # leave out the last character
            yield start, end, re.sub(r"(\\.|[^\\])\]$", "]", part[0])


def faults(path, wanted):
    """[(line, before, after, line of the statement or 0 for the module's, new source)]."""
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        source = file.read()
    lines, found, unchanged = source.splitlines(keepends=True), {}, ast.dump(ast.parse(source))
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]

    def span(node):  # of characters; the tree counts UTF-8 bytes
        return [starts[line - 1] + len(lines[line - 1].encode()[:column].decode())
                for line, column in ((node.lineno, node.col_offset),
                                     (node.end_lineno, node.end_col_offset))]

    def add(statement, start, end, after):
        new, line = source[:start] + after + source[end:], source.count("\n", 0, start) + 1
        around = ["", ""] if end - start > 20 else [source[:start].split("\n")[-1][-15:],
                                                    source[end:].split("\n")[0][:15]]
        with contextlib.suppress(SyntaxError):
            if ast.dump(ast.parse(new)) != unchanged:
                found.setdefault(new, (line, source[start:end].join(around), after.join(around),
                                       statement))

    def visit(node, statement, is_inside):
        if isinstance(node, ast.stmt):
            statement = node.lineno if is_inside else 0
            if STATEMENTS.match(ast.unparse(node)):
                return
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                return  # a docstring
        if isinstance(node, (ast.Constant, ast.JoinedStr)):
            start, end = span(node)
            if re.match("rf?[\"']", source[start:end]):
                for a, b, after in regex_edits(source[start:end]):
                    add(statement, start + a, start + b, after)
        if isinstance(node, ast.JoinedStr) or getattr(node, "arg", None) in KEYWORDS:
            return  # a message, or what has no effect
        for part, after in edits(node):
            add(statement, *span(part), after)
        is_inside |= isinstance(node, (ast.FunctionDef, ast.Lambda))
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        visit(child, statement, is_inside)

    for node in ast.parse(source).body:
        names = [getattr(node, "name", "")] + [ast.unparse(target)
                                               for target in getattr(node, "targets", [])]
        if not wanted or set(names) & set(wanted):
            visit(node, 0, False)
    return [(*fault, new) for new, fault in found.items()]


# -------------------------------------------------------------------------------------- the tests


class NotesLines(ast.NodeTransformer):
    """Puts a note of its line before each statement of a function."""

    def __init__(self, path):
        self.path = path

    def generic_visit(self, node):
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list) and not isinstance(node, (ast.Module, ast.ClassDef)):
                setattr(node, name, [part for statement in statements for part in (ast.parse(
                    f"LINES.add(('{self.path}', {statement.lineno}))").body[0], statement)])
        return node


class Record:
    """A pytest plugin: how much processor time each test takes, and which lines it reaches."""

    def __init__(self, path):
        self.path, self.tests = path, {}

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        builtins.LINES, began = set(), time.process_time()
        yield
        self.tests[item.nodeid] = time.process_time() - began, builtins.LINES

    def pytest_sessionfinish(self):
        with open(self.path, "wb") as file:
            pickle.dump(self.tests, file)


class Choose:
    """A pytest plugin: runs these tests in this order, and adds the one that fails to a file."""

    def __init__(self, names):
        self.names = names

    def pytest_runtest_logreport(self, report):
        if report.failed:
            with open(os.path.join(WORK, "saw_a_fault"), "a", encoding="utf-8") as file:
                file.write(report.nodeid + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.nodeid in self.names),
                          key=lambda item: self.names.index(item.nodeid))


def warm_up():
    """Import what the tests do, which is slow, but forget the project's own modules: forks begin
    with torch and transformers loaded."""
    sys.path[0] = os.path.join(ROOT, "tests")
    import conftest
    for make in conftest.ARCHITECTURES.values():
        make(8)
    own = {name.removesuffix(".py") for name in os.listdir(ROOT) + os.listdir(sys.path[0])}
    for name in [name for name in sys.modules if name.split(".")[0] in own]:
        del sys.modules[name]


def run_tests(folder, files, plugin):
    """In a fork: pytest in a copy of the checkout. The exit code says whether all tests passed."""
    os.setsid()
    os.chdir(folder)
    sys.path[0], sys.dont_write_bytecode = folder, True
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    os._exit(pytest.main(["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider",
                          "-m", "not slow and not real", "-k", f"not ({LEFT_OUT})",
                          "--basetemp", f"{folder}.tmp", *files], plugins=[plugin]))


def passes(sources, files, plugin, limit):
    """Whether the tests pass with other sources {path: text}, in this process's own copy."""
    folder = os.path.join(WORK, str(os.getpid()))
    if not os.path.exists(folder):
        for name in subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT,
                                   check=True, capture_output=True, text=True).stdout.splitlines():
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            shutil.copy(os.path.join(ROOT, name), os.path.join(folder, name))
    for path, source in sources.items():
        with open(os.path.join(folder, path), "w", encoding="utf-8") as file:
            file.write(source)
    process = multiprocessing.Process(target=run_tests, args=(folder, files, plugin))
    process.start()
    process.join(limit)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    for path in sources:
        shutil.copy(os.path.join(ROOT, path), os.path.join(folder, path))
    return process.exitcode == 0


def measure():
    """{test: (processor seconds, {(path, line)} that it reaches)}."""
    sources = {}
    for path in TARGETS:
        with open(os.path.join(ROOT, path), encoding="utf-8") as file:
            tree = NotesLines(path).visit(ast.parse(file.read()))
        sources[path] = ("import builtins\nvars(builtins).setdefault('LINES', set())\n"
                         + ast.unparse(ast.fix_missing_locations(tree)))
    record = os.path.join(WORK, "record")
    if not passes(sources, TESTS, Record(record), 1200):
        raise SystemExit("the tests do not pass without a fault")
    with open(record, "rb") as file:
        return pickle.load(file)


def survives(path, fault, tests):
    """Whether no test sees a fault."""
    *_, statement, source = fault
    with open(os.path.join(WORK, "saw_a_fault"), "a+", encoding="utf-8") as file:
        file.seek(0)
        saw = collections.Counter(file.read().splitlines())
    chosen, total = [], 0
    for name, (seconds, lines) in sorted(
            tests.items(), key=lambda test: test[1][0] / (1 + saw[test[0]])):
        reaches = (path, statement) in lines if statement else path in dict(lines)
        if reaches and total < BUDGET:
            chosen.append(name)
            total += seconds
    files = sorted({name.split("::")[0] for name in chosen})
    return not chosen or passes({path: source}, files, Choose(chosen), 60 + 10 * total)


def main():
    parser = argparse.ArgumentParser(description="Small faults, and the share that tests see.")
    parser.add_argument("--only", choices=TARGETS)
    parser.add_argument("--per_file", type=int, default=100, help="faults, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time")
    args = parser.parse_args()
    warm_up()
    made = missed = 0
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        tests = pool.submit(measure).result()
        print("file                 faults  caught")
        for path in [args.only] if args.only else TARGETS:
            drawn = faults(path, TARGETS[path])
            random.Random(args.seed).shuffle(drawn)
            drawn = sorted(drawn[:args.per_file])
            results = pool.map(survives, [path] * len(drawn), drawn, [tests] * len(drawn))
            survivors = [fault for fault, survived in zip(drawn, results) if survived]
            made, missed = made + len(drawn), missed + len(survivors)
            print(f"{path:20s} {len(drawn):6d} {1 - len(survivors) / len(drawn):7.1%}")
            for line, before, after, *_ in survivors:
                print(f"  {path}:{line}  {' '.join(before.split())}  ->  {after}", flush=True)
    print(f"{'in all':20s} {made:6d} {1 - missed / made:7.1%}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as WORK:
        main()
