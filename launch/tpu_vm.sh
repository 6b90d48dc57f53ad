#!/usr/bin/env bash
# How processes get started on a Cloud TPU slice: one on each of its hosts.
#
#   bash launch/tpu_vm.sh NAME ZONE --config mmimdb --workdir /mnt/runs/mmimdb
#
# NAME and ZONE are those of the slice. Every host has the checkout in ~/ccu_jax, with
# an environment in ~/ccu_jax/.venv (`python -m venv .venv; .venv/bin/pip install
# '.[tpu]'`), and sees --workdir (a Filestore, or a bucket by gcsfuse). JAX learns from
# the slice where the others are. CCU_JAX_DRY_RUN=1 prints the command.

set -e -o pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

name="$1" zone="$2"
for given in "$name" "$zone"; do
    case "$given" in
        "" | -*) fail "usage: tpu_vm.sh NAME ZONE [flags of ccu_jax.launch]" ;;
    esac
done
shift 2
# Quoted once more: it is a shell on the hosts that reads it.
flags=""
if [ $# -gt 0 ]; then flags="$(printf ' %q' "$@")"; fi
execute gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command \
    "cd ~/ccu_jax && .venv/bin/python -m ccu_jax.launch$flags --multihost"
