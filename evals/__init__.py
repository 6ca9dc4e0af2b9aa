"""What a KV cache costs and buys: speed, memory and drift, measured by one loop for all.

    python -m evals run [cfg.toml]     measure, and write results/<config hash>/
    python -m evals report DIR         render those files again
    python -m evals compare DIR DIR    the figures of two runs, as ratios
    python -m evals list               suites, rows and metrics
    python -m evals validate cfg.toml  check a config without measuring

Where what stands: README.md in this folder. Nothing here is imported by kvplug.
"""
