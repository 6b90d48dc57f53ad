"""A whole run of ccu_plus in plain PyTorch: `methods/ccu.py` on stored features.

As one writes it in eager mode: tables and row gathers on the device, nothing in Python
for each row, nothing computed that no objective looks at, no gradients at refreshes.
"""

import math

import torch
import torch.nn.functional as F

from ccu_jax import bench_torch_targets as targets
from ccu_jax.bench_torch_model import TAIL, unit
from ccu_jax.bench_torch_train import MULTI_LABEL_SCALE, cross_entropy_rows, hidden
from ccu_jax.bench_torch_train import mean as mean_of

VISUAL = ("image", "fused")
PARTS = ("unlearn", "held", "retain")


def _say(model, h_image, rows, see=None, read=None, h_text=None):
    """Logits of the views that see the picture."""
    see = rows["has_image"] if see is None else see
    read = rows["has_text"] if read is None else read
    h_text = rows["h_text"] if h_text is None else h_text
    return {
        "image": model.image_head(h_image),
        "fused": model.fused_head(h_image, h_text, see, read),
    }


def positives(a, b):
    """Jaccard similarity of label sets."""
    shared = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None] - shared
    return shared / either.clamp(min=1)


def divergence_rows(teacher, logits, multi_label):
    """KL divergence of each row from a teacher's predictions."""
    if multi_label:
        # Both cross-entropies have the same form; the teacher's is its own entropy.
        p = teacher.sigmoid()
        apart = F.softplus(logits) - F.softplus(teacher) - p * (logits - teacher)
        return MULTI_LABEL_SCALE * apart.mean(-1)
    t, s = teacher.log_softmax(1), logits.log_softmax(1)
    return (t.exp() * (t - s)).sum(1)


def _retention(weight, rows, said, whole=True):
    total = 0.0
    for view in VISUAL:
        counts = rows["has_image"]
        if view == "fused" and whole is not True:
            counts = counts & whole
        total = total + mean_of(
            divergence_rows(
                rows[f"original_{view}"], said[view], rows["labels"].shape[1] < 0
            ),
            counts.float(),
        )
    return weight * total
