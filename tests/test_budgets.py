"""What each head needs, measured, and the budgets that come of it."""

import pytest
import torch

import kvplug
from kvplug.retention.budgets import split
from kvplug.retention.needs import _errors, _give, measure
from kvplug.testing.tools import normal, prompt, tiny_llama


def test_budgets():
    """In proportion, the mean as asked, and no head below what it cannot do without."""
    needs = torch.tensor([[0.5, 0.25, 0.25], [0.0, torch.nan, torch.nan], [torch.nan] * 3])
    assert split(needs, 100, 10) == [(195, 98, 98), (10,), None]
    assert split(torch.full((2, 2), 0.3), 64, 60) == [(64, 64), (64, 64)]


def test_needs_of_a_model_are_measured():
    model = tiny_llama()
    needs = measure(model, prompt(768, batch=2))["budgets.need"]
    assert needs.shape == (2, 2)
    assert ((needs > 0) & (needs <= 1)).all()
    assert needs.mean() <= 0.25
    with pytest.raises(kvplug.SpecError, match="too short"):
        measure(model, prompt(64, batch=2))


def test_shares_go_to_those_that_need_them():
    """Of two heads that attend alike, that whose far tokens have values of their own needs more."""
    T, R, D = 640, 32, 8
    keys = normal(1, 2, T + R, D, seed=0)
    keys[:, 1] = keys[:, 0]
    values = torch.ones(1, 2, T + R, D)
    values[:, 0] = normal(1, T + R, D, seed=1)  # all equal: any of them will do
    positions = torch.arange(T + R).expand(1, 2, T + R)
    queries = normal(1, 2, R + 64, D, seed=2)
    queries[:, 1] = queries[:, 0]
    tokens = kvplug.Candidates(
        keys, values, positions, torch.tensor([0]), queries=queries, scale=D**-0.5
    )
    errors = _errors(tokens, T)
    assert (errors[0].diff() <= 0).all()
    assert errors[0, 0] > 0.1
    assert errors[1].max() < 1e-9
    assert errors[0, -1] < 1e-9, "with all tokens nothing is off"
    assert _give(errors).tolist() == [0.375, 0.0625]
