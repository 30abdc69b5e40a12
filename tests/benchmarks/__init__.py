"""Measurements, run by `make bench`. Each module prints JSON lines; ratios compare two things in one run."""

import os

# Read by numpy when it is imported. A virtual machine pays for a huge page that it has not touched before 30 times what
# it costs to fill it, so that who happened to get one would decide how any two ways of reading compare.
os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")
