"""What several benchmarks use: clocks, reports, data, models, the look of figures."""
