#!/usr/bin/env bash
# The first run: creates .venv if needed, then starts one process on this machine.
#
#   bash launch/first_run.sh [flags of python -m ccu_jax.launch]
#
# Results are written to runs/ in the current folder. Flags given here override those
# below, so `--config clipart` works. CCU_JAX_DRY_RUN=1 only prints the commands.

set -e -o pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_python ""
say "running; --help lists the flags"
status=0
execute "$python" -m ccu_jax.launch --config mmimdb "$@" || status=$?
say "ended with exit code $status"
exit "$status"
