"""Compiled forward passes over rows of a table, on all devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.data.batches import plan_single_pass
from ccu_jax.distributed.device_tables import (
    Table,
    device_columns,
    gather_replicated,
    gather_rows,
    read_rows,
    send_rows,
)
from ccu_jax.distributed.executors import Executor
from ccu_jax.models import Model, Params


class Forward:
    """Runs forward passes of a model on all devices, compiled at their first call."""

    def __init__(self, model: Model, executor: Executor, batch: int):
        """Rounds the global batch size up to a multiple of the number of devices."""
        self.model, self.executor = model, executor
        self._batch = -(-batch // executor.num_devices) * executor.num_devices
        self._compiled: dict[str, Callable] = {}

    def compute_outputs(
        self, params: Params, table: Table, rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Computes all outputs of the model for some rows of a table.

        The table has the columns `has_image` and `has_text`, and either `image` and
        `text` or the results of `encode`. Both cases share the executable of the heads,
        so that equal features give bit-identical outputs.

        Returns:
            The fields of `models.Outputs` and `pooled`, the pooled trunk features
            `[len(rows), 2 W]`.
        """
        is_encoded = "features" in table
        names = ["has_image", "has_text"]
        names += ["features", "h_text"] if is_encoded else []
        heads = self.compile_cached("heads", self._apply_heads)
        # The columns contain only the rows of this batch, in order.
        positions = self.executor.shard(np.arange(self._batch, dtype=np.int32))

        def run_batch(batch):
            columns = {name: read_rows(table[name], batch) for name in names}
            columns = self.executor.replicate(columns)
            if not is_encoded:
                columns |= self._encode_batch(params, table, batch)
            return heads((), (params, columns), {"rows": positions})[1]

        return self._run_batches(rows, run_batch)

    def encode(
        self, params: Params, table: Table, rows: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Computes the trunk's `features` and the text tower's `h_text` of the rows."""
        return self._run_batches(rows, partial(self._encode_batch, params, table))

    def compile_cached(self, name: str, fn: Callable) -> Callable:
        """Compiles a per-device function, or returns the one compiled as `name`."""
        if name not in self._compiled:
            self._compiled[name] = self.executor.compile(fn)
        return self._compiled[name]

    def _run_batches(self, rows, run_batch):
        """Runs `run_batch` on batches of rows and concatenates its outputs."""
        plan, is_counted = plan_single_pass(rows, self._batch)
        outputs = jax.device_get([run_batch(batch) for batch in plan])
        # Padding rows are at the end of the last batch.
        num_rows = is_counted.sum()
        return jax.tree.map(lambda *x: np.concatenate(x)[:num_rows], *outputs)

    def _encode_batch(self, params, table, batch):
        """Encodes one batch on all devices; see `encode`."""
        table = {name: table[name] for name in ("image", "text")}
        sent = send_rows(self.executor, table, batch)
        encode = self.compile_cached("encode", self._encode)
        return encode((), (params, device_columns(table)), sent)[1]

    def _encode(self, state, static_inputs, sent):
        """Encodes one device's rows of a batch and gathers the results."""
        params, table = static_inputs
        rows = gather_rows(table, sent)
        features = {
            "features": self.model.trunk(params, rows["image"]),
            "h_text": self.model.encode_text(params, rows["text"]),
        }
        return state, gather_replicated(features)

    def _apply_heads(self, state, static_inputs, sent):
        """Applies the heads to one device's rows of a batch and gathers the results."""
        params, columns = static_inputs
        rows = gather_rows(columns, sent)
        outputs = self.model.apply(params, rows)._asdict()
        outputs["pooled"] = pool_tokens(rows["features"])
        return state, gather_replicated(outputs)


def pool_tokens(features: Any) -> Any:
    """Concatenates the class token and the mean image token of trunk features.

    Converts a NumPy or JAX array `[N, P, W]` to a float32 array `[N, 2 W]` of the same
    library.
    """
    xnp = jnp if isinstance(features, jax.Array) else np
    features = features.astype(np.float32)
    return xnp.concatenate([features[:, 0], features[:, 1:].mean(axis=1)], axis=1)
