"""What a KV cache costs and buys: speed, memory and drift, measured by one loop for every strategy.

    python -m evals run          measure, and write results/<config hash>/
    python -m evals report DIR   render those files again
    python -m evals list         the rows and the metrics

A run is: a `Config` (config.py), a model (model.py), a text (data.py), strategies (strategies.py,
rivals/), three measurements (speed.py, drift.py, greedy.py; memory.py serves speed.py), rows
(schema.py) and a report (report.py, picture.py). Nothing here is imported by kvplug.
"""
