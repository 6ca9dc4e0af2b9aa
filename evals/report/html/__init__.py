"""The HTML report: one file that needs no network, from the result files and nothing else."""
