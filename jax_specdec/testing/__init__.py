"""A conformance test for drafters: does any object keep the contract of `jax_specdec.Drafter`?

In a test of your own:

    from jax_specdec.testing import check_drafter
    check_drafter(MyDrafter(...), {"my-drafter": params}, target.decoder, target.params)
"""

from jax_specdec.testing.draft import check_draft
from jax_specdec.testing.run import check_drafter

__all__ = ["check_draft", "check_drafter"]
