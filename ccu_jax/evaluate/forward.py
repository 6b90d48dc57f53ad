"""One forward pass over rows, and scores as pure functions of what it gives."""

import jax
import jax.numpy as jnp
import numpy as np

from ccu_jax.data.batches import HostColumn, plan_single_pass
from ccu_jax.distributed.executors import Executor
from ccu_jax.models import Model
from ccu_jax.train.step import gather, gather_replicated, on_devices, send_rows


class Forward:
    """Runs a model over rows of a table, over all devices, compiled once per use.

    Args:
        model: the classifier.
        executor: where it runs.
        batch: rows of one pass over all devices, rounded up to fill them.
    """

    def __init__(self, model: Model, executor: Executor, batch: int):  # noqa: D107
        self._model, self._executor = model, executor
        self._batch = -(-batch // executor.num_devices) * executor.num_devices
        self._compiled = {}

    def outputs(self, params, table, rows) -> dict[str, np.ndarray]:
        """What `Model.apply` gives for `rows` of `table`: arrays `[len(rows), ...]`.

        And `pooled`, the trunk's features as one vector for each row.

        The table has pictures and texts, or what `encode` gave for them; either way
        the heads are one program, so that equal features give equal bits.
        """
        encoded = "features" in table
        names = ("has_image", "has_text", *(("features", "h_text") if encoded else ()))

        def given(batch):
            columns = {name: _take(table[name], batch) for name in names}
            columns = self._executor.replicate(columns)
            return columns if encoded else columns | self._encoded(params, table, batch)

        heads = self.compile_cached("heads", self._heads)
        every = self._executor.shard(np.arange(self._batch, dtype=np.int32))
        return self._passes(
            rows, lambda batch: heads((), (params, given(batch)), {"rows": every})[1]
        )

    def encode(self, params, table, rows) -> dict[str, np.ndarray]:
        """What trunk and text branch give: `features` and `h_text` of the rows."""
        return self._passes(rows, lambda batch: self._encoded(params, table, batch))

    def compile_cached(self, name: str, fn):
        """A per-device function (`Executor.run`), compiled once for all its calls."""
        if name not in self._compiled:
            self._compiled[name] = self._executor.compile(fn)
        return self._compiled[name]

    def _passes(self, rows, one):
        plan, counted = plan_single_pass(rows, self._batch)
        pieces = jax.device_get([one(batch) for batch in plan])
        # What fills up the last batch stands at its end.
        return jax.tree.map(lambda *x: np.concatenate(x)[: counted.sum()], *pieces)

    def _encoded(self, params, table, batch):
        table = {name: table[name] for name in ("image", "text")}
        index = send_rows(self._executor, table, batch)
        encode = self.compile_cached("encode", self._encode)
        return encode((), (params, on_devices(table)), index)[1]

    def _encode(self, state, resident, index):
        params, table = resident
        rows = gather(table, index)
        said = {
            "features": self._model.trunk(params, rows["image"]),
            "h_text": self._model.read(params, rows["text"]),
        }
        return state, gather_replicated(said)

    def _heads(self, state, resident, index):
        params, columns = resident
        rows = gather(columns, index)
        out = self._model.apply(params, rows)._asdict()
        return state, gather_replicated(out | {"pooled": pool_tokens(rows["features"])})


def pool_tokens(features):
    """Trunk features `[N, P, W]` to `[N, 2 W]`: class token and mean of the others."""
    features = features.astype(np.float32)
    numpy = jnp if isinstance(features, jax.Array) else np
    return numpy.concatenate([features[:, 0], features[:, 1:].mean(axis=1)], axis=1)


def _take(column, rows):
    """Rows of a column, wherever it is, on the host."""
    return (
        column.take(rows)
        if isinstance(column, HostColumn)
        else np.asarray(column)[rows]
    )
