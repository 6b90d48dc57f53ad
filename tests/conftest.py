"""Prepares JAX for tests: eight simulated devices and a compilation cache."""

import functools
import os
import signal

import pytest

# JAX and TensorFlow read these variables once, when they are imported.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # Tests mostly compile, and programs this small need no optimization. The older
    # emitters and a single code-generation unit take a third of the time.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# With fewer threads than devices, collectives would deadlock.
os.environ["NPROC"] = "32"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["MPLBACKEND"] = "Agg"


# Background jobs of a shell ignore SIGINT, and subprocesses inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Keeps executables between runs, in a folder of pytest's cache."""
    cache = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_collection_modifyitems(config, items):
    """Deselects tests with the mark `table`, unless `-m` names it."""
    if "table" in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker("table")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not item.get_closest_marker("table")]


@pytest.fixture(scope="session")
def problem():
    """A problem whose original is right on all rows but held-out ones."""
    from ccu_jax.distributed import executors
    from tests import toy

    return toy.with_fitted_labels(toy.make_problem(executors.vmap(2)))


@pytest.fixture(scope="session")
def run_method(problem):
    """Runs a method on the problem in one loop for all tests, see `toy.run_method`."""
    from tests import toy

    return functools.partial(toy.run_method, problem, toy.make_loop(problem))
