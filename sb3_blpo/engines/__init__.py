"""The gradient steps of both levels. An engine knows networks and optimizers; what they are trained on comes from outside."""

from sb3_blpo.engines.torch import ActorPass, TorchEngine

__all__ = ["ActorPass", "TorchEngine"]
