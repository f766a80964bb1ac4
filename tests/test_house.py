"""House rules that a program can check: who imports whom, and line width. Each has a control."""
import ast
import graphlib
from pathlib import Path

import pytest
from conftest import ROOT

WIDTH = 100


def imports(root):
    """{module: the modules of the tree that it imports, at the top or inside a function}."""
    files = [*root.glob("*.py"), *root.glob("infra/*.py"), *root.glob("toy/*.py")]
    paths = {".".join(path.relative_to(root).with_suffix("").parts): path for path in files}
    graph = {}
    for module, path in paths.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[module] = names & paths.keys()
    return graph


def upward(graph):
    """The imports with which infra/ reaches outside infra/."""
    return {(module, other) for module, others in graph.items() for other in others
            if module.startswith("infra.") and not other.startswith("infra.")}


def long_lines(root):
    return [f"{path}:{number}" for folder in (".", "infra", "tests", "bench", "toy")
            for path in sorted((root / folder).glob("*.py"))
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > WIDTH]


def test_imports_have_no_circle_and_infra_stands_alone():
    graph = imports(Path(ROOT))
    assert {"infra.checkpoint", "infra.reference", "data", "rdpo"} <= graph["train"]  # it is read
    graphlib.TopologicalSorter(graph).prepare()
    assert upward(graph) == set()


def test_no_line_is_too_long():
    assert long_lines(Path(ROOT)) == []


def test_controls_a_circle_an_upward_import_and_a_long_line_are_seen(tmp_path):
    (tmp_path / "infra").mkdir()
    (tmp_path / "train.py").write_text("from infra import rows\n" + "#" * (WIDTH + 1))
    (tmp_path / "infra" / "rows.py").write_text("def later():\n    import infra.task as task\n")
    (tmp_path / "infra" / "task.py").write_text("#" * WIDTH)
    assert upward(imports(tmp_path)) == set()
    graphlib.TopologicalSorter(imports(tmp_path)).prepare()
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "speed.py").write_text("#" * (WIDTH + 1))
    assert long_lines(tmp_path) == [f"{tmp_path}/train.py:2", f"{tmp_path}/bench/speed.py:1"]
    (tmp_path / "infra" / "task.py").write_text("from train import main")
    assert upward(imports(tmp_path)) == {("infra.task", "train")}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(imports(tmp_path)).prepare()
