"""A draft model with sharding rules of its own."""

import meshes as m
import pytest

from jax_specdec import SpeculativeDecoder, UserError, load_drafter, load_target
from jax_specdec.core.sharding import REPLICATED, ShardingRules

pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers")


@pytest.fixture(scope="module")
def target(tiny_checkpoints):
    return load_target(tiny_checkpoints / "target", mesh=m.mesh_of(2, 4))


def test_divided_and_replicated(target):
    """The same texts, and as many drafted tokens accepted: what is drafted is the same, too."""
    texts, held = [], []
    for rules in (None, ShardingRules()):
        drafter = load_drafter("lm:3", target, rules=rules)
        answers = SpeculativeDecoder(target, drafter).generate(
            ["Once upon a time", "The cat saw a"], max_new_tokens=12, batch_size=2
        )
        texts.append([(a.token_ids, a.stats.num_spec_steps) for a in answers])
        head = drafter.params["lm"]["head"]
        held.append(head.size // head.addressable_shards[0].data.size)
    assert texts[0] == texts[1] and held == [1, 4]


def test_wrong_use(target, tiny_checkpoints):
    with pytest.raises(UserError, match="Sharding rules are for lm: max-gram lies as its target"):
        load_drafter("max-gram:4", target, rules=ShardingRules())
    with pytest.raises(UserError, match="batch must be 'data', not None"):
        load_drafter("lm:3", target, rules=ShardingRules(batch=None))
    with pytest.raises(UserError, match="divide mlp over the mesh axis 'expert'"):
        load_drafter("lm:3", target, rules=ShardingRules(mlp="expert"))
    one = load_target(tiny_checkpoints / "target", tokenizer=False)
    with pytest.raises(UserError, match="Sharding rules need a mesh"):
        load_drafter("lm:3", one, rules=REPLICATED)
