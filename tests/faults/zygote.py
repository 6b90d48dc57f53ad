"""What the process imports that quick runs are forked from; it begins nothing."""

import importlib

from tests.faults import runs as faults_runs

for _name in faults_runs.HEAVY:
    importlib.import_module(_name)
importlib.import_module("ccu_jax.launch")
importlib.import_module("ccu_jax.experiments.run")
