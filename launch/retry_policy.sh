# shellcheck shell=bash
# Sourced by slurm.sbatch: after which exit codes all processes are started again.
#
# gke_jobset.yaml has the same limit, and restarts after every exit code but 2. How long a
# process waits for a lost host is set in ccu_jax/distributed/lost_hosts.py.

# shellcheck disable=SC2034
max_retries=20

# Tests whether a run with exit code $1 is started again.
should_retry() {
    # 75: preempted, or a temporary error, such as a lost process; 134: JAX aborted
    # because a process was lost; 137, 143: killed. A user error (2), such as a full disk,
    # is not retried.
    case "$1" in
        75 | 134 | 137 | 143) return 0 ;;
    esac
    return 1
}
