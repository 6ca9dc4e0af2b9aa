import pytest

from evals.setup.config import Config, ConfigError


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("windows", 0, "windows=0: accepted are whole numbers from 1"),
        ("context", (1,), "context=1: accepted are whole numbers from 2"),
        ("context", (10**20,), "100,000,000,000,000,000,000 tokens of text would be needed"),
        ("skip", 2047, "skip=2047: accepted are 0 to 2046, two less than window"),
        ("threads", 0, "threads=0: accepted are whole numbers from 1"),
        ("dtype", "bfloat61", "unknown dtype 'bfloat61'. Did you mean 'bfloat16'? Known: float32,"),
        ("strategies", (), "strategies is empty"),
        ("batch", (), "batch is empty"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_accepted(field, value, said):
    with pytest.raises(ConfigError) as caught:
        Config(**{field: value})
    assert said in str(caught.value)


def test_the_key_depends_on_every_field():
    assert Config().key == Config().key
    assert len({Config().key, Config(windows=3).key, Config(strategies=("int4",)).key}) == 3
