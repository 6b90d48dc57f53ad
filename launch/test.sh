#!/usr/bin/env bash
# Creates .venv if needed, then runs the fast tests and one end-to-end run of each kind.
# With --all it runs every slow test, as .ci/run does. The full table of methods takes
# even longer: `pytest -m table`.
#
#   bash launch/test.sh [--all] [arguments of pytest]
#
# CCU_JAX_DRY_RUN=1 only prints the commands.

set -e -o pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_python dev xdist

slow="slow and smoke"
if [ "$1" = --all ]; then
    slow=slow
    shift
fi
ran=""
for which in "not slow" "$slow"; do
    say "tests: $which"
    status=0
    # From the root, since tests read files of the checkout. In parallel by file, since
    # the tests of a file share compiled programs.
    (cd "$root" && execute "$python" -m pytest -m "$which" \
        --numprocesses auto --maxprocesses 4 --dist loadfile "$@") || status=$?
    case "$status" in
        0) ran=yes ;;
        5) say "no tests selected" ;;
        *) say "failed"; exit "$status" ;;
    esac
done
[ -n "$ran" ] || fail "no tests were run"
say "all passed"
