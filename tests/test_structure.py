"""The house stays in order: imports point down, functions and the top floor stay small."""

import ast
from pathlib import Path

import mrjax

ROOT = Path(mrjax.__file__).parent
# From the ground up; a module imports from its own floor and those below.
FLOORS = (
    {"errors"},
    {"ops", "parallel"},
    {"mri", "io"},
    {"models", "data", "measures", "baselines", "interop", "report", "demo"},
    {"config", "optimizers", "train_step", "checkpoint"},
    {"experiment", "export", "configs"},
    {"inference", "train"},
    {"preflight", "sweep"},
    {"cli", "main", "evaluate", "reconstruct", "check", "convert", "import_fastmri", "export_fastmri"},
)
COMMANDS = FLOORS[-1] - {"cli"}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    files = sorted(ROOT.rglob("*.py"))
    names = [".".join(("mrjax", *file.relative_to(ROOT).with_suffix("").parts)) for file in files]
    return {
        name.removesuffix(".__init__"): ast.parse(file.read_text()) for name, file in zip(names, files, strict=True)
    }


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & known or {node.module}
    return found & known


def room(name: str) -> str:
    return name.split(".")[1]


def test_imports_point_down_and_nothing_imports_a_command() -> None:
    trees = {name: tree for name, tree in modules().items() if name != "mrjax"}
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    for name, tree in trees.items():
        for imported in imports(tree, set(trees)):
            entry = name.endswith("__main__")
            assert entry or floor[room(imported)] <= floor[room(name)], f"{name} imports {imported}, which is above it"
            assert room(imported) not in COMMANDS, f"{name} imports the command {imported}"


def test_imports_have_no_circle() -> None:
    trees = modules()
    graph = {name: imports(tree, set(trees)) - {name, "mrjax"} for name, tree in trees.items()}
    while leaves := {name for name, needed in graph.items() if not needed}:
        graph = {name: needed - leaves for name, needed in graph.items() if name not in leaves}
    assert graph == {}


def test_the_top_floor_has_at_most_17_files_and_no_function_more_than_60_lines() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 16
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}.{node.name} has more than 60 lines"
