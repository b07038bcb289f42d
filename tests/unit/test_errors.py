"""The tree of errors: each can be told to another process of ours by its name and a text."""

from __future__ import annotations

import pytest

from holdfast import errors
from holdfast.errors import HoldfastError, HostError, by_name

TREE = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, HoldfastError)
]


@pytest.mark.parametrize("kind", TREE)
def test_an_error_that_is_of_a_text_comes_back_as_itself(kind: type[HoldfastError]) -> None:
    of_a_text = "__init__" not in vars(kind)
    told = by_name(kind.__name__, "why")
    assert type(told) is (kind if of_a_text else HostError)
    assert str(told) == "why"


@pytest.mark.parametrize("name", ["", "OSError", "exit_code", "Mapping", "__doc__"])
def test_what_is_no_error_of_ours_is_the_hosts(name: str) -> None:
    assert type(by_name(name, "why")) is HostError
