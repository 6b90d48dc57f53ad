"""The context that all stages of a run share."""

import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from ccu_jax.config import Config
from ccu_jax.data import Dataset
from ccu_jax.distributed.device_tables import Table
from ccu_jax.distributed.executors import Executor
from ccu_jax.evaluate import predictions
from ccu_jax.evaluate.forward import Forward
from ccu_jax.methods import Problem
from ccu_jax.models import TAIL, Model, Params
from ccu_jax.runs.progress import Reporter
from ccu_jax.train.loop import Loop


class RunContext(NamedTuple):
    """The configuration, the data, the model and the devices of a run."""

    config: Config
    workdir: pathlib.Path
    reporter: Reporter
    executor: Executor
    data: Dataset  # after corruption
    corruptions: dict[str, Any]  # what each corruption changed, see `corruptions.apply`
    model: Model
    forward: Forward
    loop: Loop
    table: Table

    def predict(
        self, problem: Problem, params: Params, trained: Iterable[str]
    ) -> predictions.Predictions:
        """Returns the predictions of a model on all sets of a problem.

        Stored features are used if they are valid for the model: if all modules that
        differ from the original (`trained`) belong to the tail.
        """
        table, sets = problem.table, problem.sets
        if problem.store is not None and set(trained) <= set(TAIL):
            table = problem.store.as_table(table)
        return predictions.predict_all_splits(
            self.forward, params, table, self.data, sets
        )
