"""What a KV cache costs and buys: speed, memory and drift, measured by one loop for every strategy.

    python -m evals run [cfg.toml]     measure, and write results/<config hash>/
    python -m evals report DIR         render those files again
    python -m evals compare DIR DIR    the figures of two runs, as ratios
    python -m evals list               suites, rows and metrics
    python -m evals validate cfg.toml  check a config without measuring

`accelerate launch -m evals run` (on CPUs with `--multi_gpu --num_processes N`, which is how it
starts several processes at all, or `torchrun --nproc-per-node N -m evals run`) splits the tasks
that measure no time over processes (processes.py).

A run is: a `Config` (config.py), a suite (suites/) that makes `Task`s (task.py) for strategies
(strategies.py, rivals/, control.py) on a `Bench` (bench.py: model.py, data.py, machine.py, fill.py,
pace.py), rows (schema.py) in a folder (store.py) and a report (report.py, tables.py, picture.py).
The measurements are speed.py, drift.py, greedy.py, needles.py, memory.py, peaks.py and race.py.
Nothing here is imported by kvplug.
"""
