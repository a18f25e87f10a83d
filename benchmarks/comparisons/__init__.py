"""MegaVTP beside other libraries; ``benchmarks/rivals.py`` runs each comparison."""
