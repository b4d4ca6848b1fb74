"""A call's report for torch's own libraries: as reference.py has it."""

from .reference import exact_pairs, summary  # noqa: F401
