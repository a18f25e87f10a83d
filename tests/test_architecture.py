"""The shape of the code: imports run downward, process groups stay in one package, files and functions are small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megavtp"
# A part may import from parts of a lower level, and from itself.
LEVELS = {
    "arithmetic": 0, "errors": 0, "pixels": 0, "cli": 1, "config": 1, "json_file": 1, "options": 1, "parallel": 2,
    "data": 2, "launch": 3, "nn": 3, "latents": 3, "models": 4, "objectives": 5, "planning": 6, "checkpoint": 6,
    "training": 7, "tokenizer": 7, "extraction": 8, "dit": 9, "conversion": 10, "evaluation": 10, "pretraining": 11,
    "report": 11, "decoder": 12, "study": 13,
}
# Every distributed call is behind two packages, so that a model or a loss reads like single-device code.
PROCESS_GROUPS = ("torch.distributed", "deepspeed")
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60


def part_of(module: str) -> str:
    """The part of the package a dotted name lies in: "megavtp.data.batch" -> "data"; "" for the package itself."""
    return (module.split(".") + [""])[1]


def imports(file: Path) -> list[tuple[int, str]]:
    """(line, dotted module) of every import in a file, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def own_part(file: Path) -> str:
    return part_of(".".join(file.relative_to(ROOT).with_suffix("").parts))


def test_every_part_has_a_level():
    assert {own_part(file) for file in FILES} - {"__init__"} == set(LEVELS)


def test_imports_run_downward():
    wrong = []
    for file in FILES:
        own = own_part(file)
        for line, module in imports(file):
            part = part_of(module)
            if module.startswith("megavtp.") and part in LEVELS and part != own and LEVELS[part] >= LEVELS[own]:
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {own} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_process_groups_stay_in_two_parts():
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {module}"
        for file in (*FILES, *(ROOT / "tools").glob("*.py"), *(ROOT / "launchers").glob("*.py"))
        if not {"parallel", "launch"} & set(file.relative_to(ROOT).parts)
        for line, module in imports(file)
        if any(module == name or module.startswith(f"{name}.") for name in PROCESS_GROUPS)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_engine_room_knows_no_recipe():
    recipes = ("megavtp.pretraining", "megavtp.decoder", "megavtp.dit")
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {module}"
        for file in (PACKAGE / "training").glob("*.py") for line, module in imports(file) if module.startswith(recipes)
    ]
    assert not wrong, "\n".join(wrong)


def test_one_function_runs_the_passes_and_steps_the_engine():
    """What the equivalence matrix proves is then what every run does."""
    calls = []
    for folder in (PACKAGE, ROOT / "tools", ROOT / "launchers", ROOT / "benchmarks"):
        for file in sorted(folder.rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
                called = [ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)]
                if "execute" in called or any(f".{name}".endswith(".engine.step") for name in called):
                    calls.append(f"{file.relative_to(ROOT)}: {function.name}")
    assert calls == ["megavtp/training/step.py: train_step"]


def test_no_import_circle_between_files():
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    graph = {}
    for name, file in names.items():
        modules = {module for _, module in imports(file)} | {module.rpartition(".")[0] for _, module in imports(file)}
        graph[name] = modules & names.keys() - {name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("folder", ["megavtp", "tools", "launchers"])
def test_files_and_functions_are_small(folder):
    wrong = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        text = file.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            wrong.append(f"{file.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES:
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {node.name} has {lines} lines")
    assert not wrong, "\n".join(wrong)


def test_nothing_unsafe_is_called():
    """No shell, no eval, no pickle but the restricted one that reads LPIPS weights, no YAML beyond the safe subset.

    One file writes torch's own form, which other projects read.
    """
    wrong = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            loose_torch = call == "torch.load" and keywords.get("weights_only") != "True"
            loose_yaml = call == "yaml.load" and [ast.unparse(a) for a in node.args[1:]] != ["_Loader"]
            unsafe = ("eval", "exec", "os.system", "pickle.load", "pickle.loads", "torch.save", "yaml.unsafe_load")
            if call == "torch.save" and file == PACKAGE / "data" / "torch_file.py":
                continue
            if call in unsafe or loose_torch or loose_yaml or keywords.get("shell") == "True":
                wrong.append(f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)
