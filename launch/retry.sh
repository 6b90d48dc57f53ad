# shellcheck shell=bash
# Sourced by slurm.sbatch: which exit codes of a run start all processes again.
#
# gke_jobset.yaml has the same limit; it restarts after every exit code but 2.

# shellcheck disable=SC2034
max_retries=20

# Tests whether a run with exit code $1 is started again.
should_retry() {
    # 75: preempted, or an error that may be over later, such as a lost process; 134: JAX
    # aborted because a process was lost; 137, 143: killed. A user error (2), such as a
    # full disk, is not retried.
    case "$1" in
        75 | 134 | 137 | 143) return 0 ;;
    esac
    return 1
}
