"""The runs that others are compared with."""

import helpers as h
import pytest
from loop_runs import MIXED, RAGGED


@pytest.fixture(scope="module")
def plain():
    """Plain decoding of the ragged mixed batch."""
    return h.decode(
        h.plain_loop(logprobs=True),
        h.all_params(),
        h.prompts_of(RAGGED),
        h.sampling_of(4, **MIXED),
    )


@pytest.fixture(scope="module")
def plain_single():
    out = {}
    for temperature in (0.0, 1.0):
        sampling = h.sampling_of(1, temperature=temperature, seed=5)
        out[temperature] = h.decode(
            h.plain_loop(), h.all_params(), h.prompts_of([9], seed=2), sampling
        )
    return out
