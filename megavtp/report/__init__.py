"""One self-contained HTML page about a run, or about several side by side."""

from megavtp.report.page import render_page

__all__ = ["render_page"]
