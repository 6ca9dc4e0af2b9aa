import torch

from evals.measure import energy


def test_a_processor_s_joules(tmp_path, monkeypatch):
    """Packages count, their parts do not, and a counter starts again at its range."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert energy.meter(torch.device("cpu")) is None
    for name in ("intel-rapl", "intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        if ":" in name:
            (tmp_path / name / "energy_uj").write_text("7000000\n")
            (tmp_path / name / "max_energy_range_uj").write_text("9000000\n")
    joules = energy.meter(torch.device("cpu"))
    assert joules() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("1000000\n")
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("8000000\n")
    assert joules() == 3
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("7500000\n")
    assert joules() == 3.5
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert energy.meter(torch.device("cpu")) is None
