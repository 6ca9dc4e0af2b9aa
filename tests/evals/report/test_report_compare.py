import json
from dataclasses import replace

import pytest

from evals.__main__ import main
from evals.report.compare import compare
from evals.run import run

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture
def two(config, tmp_path, console):
    """Two folders of the same run; in the second int8 is twice as slow, and drifts more."""
    config = replace(config, strategies=("transformers:dynamic", "int8"), windows=1)
    assert run(config, tmp_path / "out", console)
    (old,) = (tmp_path / "out").iterdir()
    new = tmp_path / "new"
    new.mkdir()
    for name in ("config.json", "env.json"):
        (new / name).write_bytes((old / name).read_bytes())
    rows = [json.loads(line) for line in (old / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        if row["strategy"] == "int8" and row["metric"] in ("decode", "kl"):
            for name in ("value", "p20", "p80", "p99"):
                row[name] *= 1000
        if row["strategy"] == "transformers:dynamic" and row["metric"] == "decode":
            row["value"] *= 1.0001
    kept = [row for row in rows if row["metric"] != "greedy"]
    (new / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return old, new


def test_ratios_and_which_of_them_are_noise(two, capsys):
    table = compare(*two)
    found = {(cells[0], cells[1].split(",")[0]): cells[-2:] for cells in table.body}
    assert found["int8", "decode"] == ["1000.000", ""]
    assert found["int8", "kl"] == ["1000.000", ""]
    assert found["int8", "bytes_held"] == ["1.000", "≈"]
    assert found["transformers:dynamic", "decode"] == ["1.000", "≈"]
    assert ("int8", "greedy") not in found
    assert "in one only" in table.notes[0]

    assert main(["compare", *map(str, two)]) == 0
    assert "1000.000" in capsys.readouterr().out
    assert main(["compare", str(two[0]), "none"]) == 2
    assert "none is no result folder" in capsys.readouterr().err
