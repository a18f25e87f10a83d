"""Scripts that measure, which import one another as ``benchmarks.NAME``."""
