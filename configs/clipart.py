"""Clip art: the real pictures with captions that come with the package.

python -m ccu_jax.launch --config clipart
"""

from ccu_jax.config import Config, Data

config = Config(
    name="clipart",
    data=Data(dataset="pairs"),
    methods=("original", "retrain", "ccu"),
)
