"""Measurements, run by `make bench`. Each module prints JSON lines; ratios compare two things in one run."""
