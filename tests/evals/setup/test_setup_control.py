import pytest

from evals.setup import control


def test_self_checks_let_the_right_through_and_stop_the_wrong():
    control.check_exact({"kl": 0.0})
    control.check_broken({"kl": 1.0})
    control.check_plain(10.0005, 10.0, "float32")
    with pytest.raises(control.SelfCheckFailed, match=r"differs from itself by a KL of 0\.001"):
        control.check_exact({"kl": 0.001})
    with pytest.raises(control.SelfCheckFailed, match=r"without a cache 10\.01"):
        control.check_plain(10.01, 10.0, "float32")
    control.check_plain(10.01, 10.0, "bfloat16")
