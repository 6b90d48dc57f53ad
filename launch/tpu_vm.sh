#!/usr/bin/env bash
# Starts one process on each host of a Cloud TPU slice.
#
#   bash launch/tpu_vm.sh NAME ZONE --config mmimdb --workdir /mnt/runs/mmimdb
#
# NAME and ZONE are those of the slice. Every host has the checkout in ~/ccu_jax, with
# an environment in ~/ccu_jax/.venv (`python -m venv .venv; .venv/bin/pip install
# '.[tpu]'`), and can access --workdir (a Filestore, or a bucket mounted by gcsfuse). JAX
# gets the addresses of the hosts from the slice. CCU_JAX_DRY_RUN=1 only prints the
# command.

set -e -o pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

name="$1" zone="$2"
for argument in "$name" "$zone"; do
    case "$argument" in
        "" | -*) fail "usage: tpu_vm.sh NAME ZONE [flags of ccu_jax.launch]" ;;
    esac
done
shift 2
# Quoted again, for the shell on the hosts.
flags=""
if [ $# -gt 0 ]; then flags="$(printf ' %q' "$@")"; fi
execute gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command \
    "cd ~/ccu_jax && .venv/bin/python -m ccu_jax.launch$flags --multihost"
