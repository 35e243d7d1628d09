"""A ragged batch of mixed rows, and what must hold of any run's counts."""

import numpy as np

# Prompt lengths of a ragged batch; a prompt of one token has nothing in the cache.
RAGGED = (1, 7, 2, 12)
# One row greedy, the others sampled, each with filters of its own.
MIXED = {
    "temperature": [0.0, 1.0, 0.3, 1.7],
    "top_k": [0, 0, 5, 12],
    "top_p": [1.0, 0.9, 1.0, 0.8],
    "min_p": [0.0, 0.0, 0.05, 0.0],
    "seed": [1, 2, 3, 4],
}
TREE = (0, 0, 1, 2, 3, 0, 5, 6, 1, 8, 8, 2, 5, 0)


def check_stats(result, loop):
    """What must hold of the counts of any run."""
    stats = result.stats
    emitted = np.array([len(t) for t in result.tokens])
    accepted = stats.accepted.sum(axis=1)
    assert (stats.accepted[:, 0] == 0).all() and (stats.drafted[:, 0] == 0).all()
    assert (stats.accepted <= stats.drafted).all()
    assert (accepted == stats.accepted_per_pos.sum(axis=1)).all()
    assert (np.diff(stats.accepted_per_pos, axis=1) <= 0).all(), "a path is accepted from its top"
    # A round emits what it accepts and the target's own token, unless it was cut short.
    assert (emitted <= stats.rounds + accepted).all()
    assert (emitted >= stats.rounds + accepted - 1).all()
    assert (stats.calls <= stats.rounds[:, None]).all()
    assert (stats.rounds >= 1).all()
    capacity = result.text.shape[1]
    place = np.arange(capacity)[None]
    span = (place >= result.state.prompt_length[:, None]) & (
        place < result.state.text.length[:, None]
    )
    for i in range(1, stats.accepted.shape[1]):
        assert ((stats.source == i) & span).sum(axis=1).tolist() == stats.accepted[:, i].tolist()
    cache = result.state.view.cache
    assert (cache.length == result.state.text.length - 1).all()
