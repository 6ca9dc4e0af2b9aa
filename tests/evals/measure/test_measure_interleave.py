from evals.measure.interleave import interleave, speedup
from evals.setup.contenders import Contender


def test_rounds_alternate_and_go_on_without_those_that_fall():
    order = []
    a, b, c = (Contender(name) for name in "abc")

    def runner(name):
        def one_round():
            order.append(name)
            if name == "b" and len(order) > 3:
                raise RuntimeError("out")
            return [float(len(order))]

        return one_round

    rounds = interleave({s: runner(s.name) for s in (a, b, c)}, 3, lambda: None)
    assert "".join(order) == "abccbaac"
    assert isinstance(rounds[b], RuntimeError)
    assert len(rounds[a]) == len(rounds[c]) == 3
    assert speedup([[2.0], [4.0]], [[4.0, 4.0], [4.0]])["value"] == 1.5
    assert speedup([[1.0]], RuntimeError()) is None
