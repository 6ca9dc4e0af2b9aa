"""The HTML report: one file that needs no network, from the result files and nothing else."""

from evals.html.page import page

__all__ = ["page"]
