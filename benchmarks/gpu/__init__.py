"""The parts of the report about a GPU, of which ``benchmarks/gpu_report.py`` runs one after another."""
