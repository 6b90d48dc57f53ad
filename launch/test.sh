#!/usr/bin/env bash
# The tests: makes .venv when needed, then runs the fast tests and after them the slow.
# The whole table of methods takes longer still: `pytest -m table`.
#
#   bash launch/test.sh [arguments of pytest]
#
# CCU_JAX_DRY_RUN=1 prints the commands.

set -e -o pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_python dev xdist

ran=""
for which in "not slow" slow; do
    say "tests that are $which"
    status=0
    # In a subshell, and from the root: tests read files of the checkout.
    # Side by side, a file at a time: its tests share what they have compiled.
    (cd "$root" && execute "$python" -m pytest -m "$which" \
        --numprocesses auto --maxprocesses 4 --dist loadfile "$@") || status=$?
    case "$status" in
        0) ran=yes ;;
        5) say "none of them was asked for" ;;
        *) say "failed"; exit "$status" ;;
    esac
done
[ -n "$ran" ] || fail "no test was run"
say "all passed"
