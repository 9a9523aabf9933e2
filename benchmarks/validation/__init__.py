"""Live system against simulator, cell by cell: see benchmarks/validate.py."""
