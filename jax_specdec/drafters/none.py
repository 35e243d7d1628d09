"""`none`: no drafting, plain decoding by the same loop."""

from jax_specdec.core.plain import NoDrafter
from jax_specdec.drafters import registry

KIND = registry.register(
    registry.Kind("none", lambda request: lambda length: NoDrafter(), usual_length=0)
)
