"""The study of fixed-point networks: models, data, training and tables. Run by benchmarks/fixed_point_study.py."""
