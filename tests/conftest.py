"""Set before any test: eight simulated devices, silent TensorFlow, a compile cache."""

import os
import signal

# All of this is read once, when JAX or TensorFlow starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8"
    # Compiling is most of the work here; programs this small need no optimising. The
    # older way of making kernels, and one piece for all, take a third of the time.
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# More threads than devices: else devices that wait for each other starve on two cores.
os.environ["NPROC"] = "32"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
# Figures are drawn to files only.
os.environ["MPLBACKEND"] = "Agg"


# A shell's background jobs ignore SIGINT, and so would all processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Keeps what is compiled for the next run, in a folder of pytest's own cache."""
    cache = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("jax")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


def pytest_collection_modifyitems(config, items):
    """What is marked `table` is run where the marker is asked for by its name."""
    if "table" in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker("table")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not item.get_closest_marker("table")]
