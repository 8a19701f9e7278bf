"""The parts of benchmarks/bench_int8.py: clocks, checks against references, one module a section, and the report."""
