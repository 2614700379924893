"""Hidden states in tensors, tuples, lists, named tuples and model outputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from fastmemit.models.running import hidden_of, with_hidden


class Pair(NamedTuple):
    states: torch.Tensor
    cache: Any


HIDDEN, OTHER = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    "output",
    [
        HIDDEN,
        (HIDDEN,),
        (HIDDEN, None, "cache"),
        [HIDDEN, 1],
        Pair(HIDDEN, 1),
        BaseModelOutput(last_hidden_state=HIDDEN, attentions=(OTHER,)),
    ],
)
def test_hidden_states_are_read_and_replaced_in_kind(output: Any) -> None:
    assert hidden_of(output) is HIDDEN
    changed = with_hidden(output, OTHER)
    assert type(changed) is type(output)
    assert hidden_of(changed) is OTHER
    assert hidden_of(output) is HIDDEN  # what was given is as it was
    if not isinstance(output, torch.Tensor):
        assert len(changed) == len(output)
    if isinstance(output, (tuple, list)):
        assert list(changed[1:]) == list(output[1:])


@pytest.mark.parametrize("output", [None, (), ("text", HIDDEN), {"a": 1}, 3])
def test_what_holds_no_hidden_states_is_refused(output: Any) -> None:
    with pytest.raises(TypeError, match=type(output).__name__):
        hidden_of(output)
    with pytest.raises(TypeError):
        with_hidden(output, OTHER)
