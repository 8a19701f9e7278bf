"""The parts of bench_int8.py: checks against references, one module per section, and its rows."""
