"""The GPU tests, of which each outcome is told when it is known."""

from pathlib import Path

import pytest

from benchmarks.gpu.measure import tell
from megavtp.errors import UserError

TESTS = Path(__file__).parents[2] / "tests"


class Outcomes:
    """A plugin of pytest; a test that fails says in one line why, and the whole is in the output."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        why = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            why = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = next(iter(crash.message.splitlines()), "") if crash else f"in its {report.when}"
        case = report.nodeid.rpartition("/")[2].replace("|", "/")
        if report.skipped:
            tell(case=case, missing=why)
        else:
            tell(case=case, outcome=report.outcome + (f": {why[:200]}" if why else ""), seconds=report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            last = str(report.longrepr).splitlines()[-1]
            tell(case=report.nodeid.rpartition("/")[2], missing=f"it cannot be read: {last[:200]}")


def run_tests(_: str, rehearse: bool) -> None:
    """Run them; a rehearsal has those of one file, which a machine without a GPU skips."""
    place = TESTS / "gpu" / "test_gpu_step.py" if rehearse else TESTS
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", str(TESTS.parent)]
    status = pytest.main([*options, str(place)], plugins=[Outcomes()])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise UserError("some tests failed" if status == pytest.ExitCode.TESTS_FAILED else f"pytest: {status!r}")
