from evals.rows.noise import Noise
from evals.rows.schema import measured
from evals.setup.contenders import EXACT


def test_noise_is_what_the_reference_differs_from_itself():
    def row(name, metric, value, context=8):
        place = {"strategy": name, "batch": 1, "context": context, "case": None}
        return measured(metric, value) | place

    rows = [
        row(EXACT, "decode", 100.0),
        row("control:same", "decode", 104.0),
        row("near", "decode", 97.0),
        row("far", "decode", 80.0),
        row(EXACT, "decode", 100.0, 16),
        row("near", "decode", 97.0, 16),
    ]
    noise = Noise(rows)
    flags = [noise.flag(r, r["value"] / 100) for r in rows]
    assert flags == ["", "", " ≈", "", "", " ≈"], "where it is not known, the typical noise"
    assert "decode by 4.0 %" in noise.lines()[0]
    assert Noise(rows[2:]).lines() == []
    assert Noise(rows[2:]).flag(rows[2], 1.01) == ""
