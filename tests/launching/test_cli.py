"""How scripts end: Ctrl-C while they import, output that nobody reads, signals that ask to stop."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from launched import ROOT

from megavtp import cli

pytestmark = pytest.mark.timeout(120)
CHECKPOINT = ["--tokenizer", "t", "--out", "o"]
SCRIPTS = {
    "launchers/pretrain.py": [], "launchers/train_decoder.py": [], "launchers/train_dit.py": [],
    "launchers/doctor.py": [],
    "tools/convert_checkpoint.py": ["--from", "a", "--to", "native", "--out", "o"],
    "tools/evaluate.py": ["--checkpoint", "c", "--data", "d"], "tools/extract_latents.py": ["--data", "d", *CHECKPOINT],
    "tools/plan.py": ["--gpus", "8"], "tools/prepare_data.py": ["index", "d"],
    "tools/sample.py": ["--dit", "d", "--classes", "1", *CHECKPOINT],
    "tools/report.py": ["d", "--out", "o.html"], "tools/study.py": ["plan", "s.yaml"],
}
# In the place of torch: Ctrl-C in the midst of its import, which modules in C turn into another error.
INTERRUPTED_IMPORT = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    raise ImportError("initialization failed") from None
"""


def start(code_or_script: list[str], **given) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *code_or_script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **given,
    )


def test_every_script_is_here():
    found = {str(path.relative_to(ROOT)) for folder in ("launchers", "tools") for path in (ROOT / folder).glob("*.py")}
    assert found - set(SCRIPTS) == {"tools/check_install.py"}  # which imports nothing heavy


def test_ctrl_c_during_imports_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(INTERRUPTED_IMPORT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = {name: start([str(ROOT / name), *SCRIPTS[name]], cwd=tmp_path) for name in SCRIPTS}
    ends = {name: (*process.communicate(timeout=60), process.returncode) for name, process in started.items()}
    assert ends == {name: ("", "interrupted\n", 130) for name in SCRIPTS}


def test_ctrl_c_elsewhere_is_an_exception_so_that_things_are_tidied_up():
    code = "import os, signal\nfrom megavtp.cli import run\nrun(lambda: os.kill(os.getpid(), signal.SIGINT))"
    process = start(["-c", code], cwd=ROOT)
    assert process.communicate(timeout=60) == ("", "interrupted\n")
    assert process.returncode == 130


PRINTS = """
import os, sys
from megavtp.cli import go_on_unread
go_on_unread()
for _ in range(3):
    print("x" * 100_000, flush=True)
    print("y" * 100_000, file=sys.stderr)
out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
assert out > 2
os.write(out, b"done")
os._exit(0)
"""


@pytest.mark.parametrize("closed", ["", ">&- 2>&-", "| true", "2>&1 | head -c 1"])
def test_a_run_goes_on_when_nobody_reads_its_output(closed, tmp_path):
    script = f'"$0" -c "$1" "$2" {closed}'
    subprocess.run(
        ["bash", "-c", script, sys.executable, PRINTS, str(tmp_path / "out")], cwd=ROOT, timeout=60, check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    assert (tmp_path / "out").read_text() == "done"


def test_what_is_read_arrives():
    code = "import sys\nfrom megavtp.cli import go_on_unread\ngo_on_unread()\nprint('ü')\nprint(2, file=sys.stderr)"
    for unbuffered in ([], ["-u"]):
        assert start([*unbuffered, "-c", code], cwd=ROOT).communicate(timeout=60) == ("ü\n", "2\n")


def test_sighup_asks_to_stop_unless_it_was_ignored_at_the_start():
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert cli.stop_signals() == (signal.SIGTERM, signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        assert cli.stop_signals() == (signal.SIGTERM,)
    finally:
        signal.signal(signal.SIGHUP, previous)
