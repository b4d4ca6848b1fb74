"""A call's report for the sdpa backend: as in reference.py."""

from .reference import exact_pairs, summary  # noqa: F401
