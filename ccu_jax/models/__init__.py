"""The image-text classifier: two towers, projections and heads."""

from ccu_jax.models.classifier import (
    TAIL,
    TEXT,
    VIEWS,
    VISUAL,
    Model,
    Outputs,
    Params,
    build,
    l2_normalize,
)

__all__ = [
    "TAIL",
    "TEXT",
    "VIEWS",
    "VISUAL",
    "Model",
    "Outputs",
    "Params",
    "build",
    "l2_normalize",
]
