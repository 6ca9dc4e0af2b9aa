"""lm-evaluation-harness, its own command line, with a cache named in --gen_kwargs.

`kvplug run -- lm_eval ...` makes the names known to a program that never imports kvplug. Two local
tasks of four questions each are written, no download: `say` generates, through the named cache;
`choose` compares log-likelihoods, which the harness reads off one forward pass without `generate`,
so no cache stands between (to measure drift, see `python -m evals`). Printed: the command, what
kvplug did, the harness's table.

    python examples/harness_task.py [--tiny] [--model ID] [--cache SPEC]
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from common import folder, options

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo"}
COMMON = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "Question: What is the capital of {{{{country}}}}?\\nAnswer: The capital is"
"""
SAY = """\
task: say
output_type: generate_until
doc_to_target: "{{capital}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 8}
process_results: !function score.found
metric_list: [{metric: found, aggregation: mean, higher_is_better: true}]
"""
CHOOSE = """\
task: choose
output_type: multiple_choice
doc_to_choice: [Paris, Rome, Tokyo, Cairo]
doc_to_target: "{{capital}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SCORE = "def found(doc, results):\n    return {'found': float(doc['capital'] in results[0])}\n"


def write(tasks: Path) -> None:
    """Both tasks and their data, as the harness wants them."""
    rows = [json.dumps({"country": k, "capital": v}) for k, v in CAPITALS.items()]
    (tasks / "data.jsonl").write_text("\n".join(rows))
    (tasks / "score.py").write_text(SCORE)
    for text in (SAY, CHOOSE):
        name = text.split()[1]
        shared = COMMON.format(data=json.dumps(str(tasks / "data.jsonl")))
        (tasks / f"{name}.yaml").write_text(text + shared)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cache", default="sinks(sinks=4;window=60)+int4", help="as in a spec")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tasks, tempfile.TemporaryDirectory() as scratch:
        write(Path(tasks))
        model = folder(args, scratch)
        command = f"lm_eval run --model hf --model_args pretrained={model},dtype=float32"
        command += f" --tasks say,choose --include_path {tasks} --device cpu"
        command += f" --gen_kwargs {shlex.quote(f'cache_implementation={args.cache}')}"
        start = [sys.executable, "-m", "kvplug", "run", "--", *shlex.split(command)]
        done = subprocess.run(
            start,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        sys.exit(done.stdout)
    for line in done.stdout.splitlines():
        if line.startswith(("kvplug run:", "|")):
            print(line.replace(model, "MODEL").replace(tasks, "TASKS"))


if __name__ == "__main__":
    main()
