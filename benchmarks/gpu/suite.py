"""The GPU tests, of which each outcome is told when it is known."""

from pathlib import Path

import pytest

from benchmarks.gpu.measure import tell
from megavtp.errors import UserError

TESTS = Path(__file__).parents[2] / "tests"


class Outcomes:
    """A plugin of pytest; a test that fails says in one line why, and the whole is in the output."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:  # those that the time does not suffice for are missing
            tell(case=_name(item.nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        why = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            why = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = next(iter(crash.message.splitlines()), "") if crash else f"in its {report.when}"
        if report.skipped:
            tell(case=_name(report.nodeid), missing=why)
        else:
            outcome = report.outcome + (f": {why[:200]}" if why else "")
            tell(case=_name(report.nodeid), outcome=outcome.replace("|", "/"), seconds=report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            last = str(report.longrepr).splitlines()[-1]
            tell(case=_name(report.nodeid), missing=f"it cannot be read: {last[:200]}")


def _name(node: str) -> str:
    return node.rpartition("/")[2].replace("|", "/")  # a cell of the page's table must not hold its mark


def run_tests(_: str, rehearse: bool) -> None:
    """Run them, which a machine without a GPU skips. Only files that have such tests are read: the others take long."""
    files = [str(file) for file in sorted(TESTS.rglob("test_*.py")) if "pytest.mark.gpu\n" in file.read_text("utf-8")]
    options = ["-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--rootdir", str(TESTS.parent)]
    status = pytest.main([*options, *files], plugins=[Outcomes()])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise UserError("some tests failed" if status == pytest.ExitCode.TESTS_FAILED else f"pytest: {status!r}")
