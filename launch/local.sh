#!/usr/bin/env bash
# Several processes on this machine, as on several hosts, on simulated devices.
#
#   bash launch/local.sh N M [flags of python -m ccu_jax.launch]
#
# N processes with M devices each. Process 0 logs to the terminal, the others to files,
# of which the last lines are shown when a process fails; then the others are ended.
# CCU_JAX_DRY_RUN=1 only prints the commands. This is slow and only shows that several
# processes work: on a machine with real accelerators one process uses them all.

set -e -o pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

count="$1" devices="$2"
for number in "$count" "$devices"; do
    case "$number" in
        "" | *[!0-9]* | 0*) fail "usage: local.sh PROCESSES DEVICES [flags]" ;;
    esac
done
shift 2
find_python ""

port=PORT
pids=()
if [ -z "$CCU_JAX_DRY_RUN" ]; then
    port="$("$python" -c 'import socket
with socket.socket() as s: s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
    logs="$(mktemp -d "${TMPDIR:-/tmp}/ccu_jax.XXXXXX")"
fi

# Ends all processes with SIGINT, and after 5 s with SIGKILL, since a process that waits
# for another handles no signal. Each is a process group that includes its children.
end_all() {
    local pid signal tries
    for signal in INT KILL; do
        for pid in "${pids[@]}"; do kill "-$signal" -- "-$pid" 2>/dev/null || true; done
        tries=0
        while [ "$tries" -lt 25 ] && any_alive; do
            sleep 0.2
            tries=$((tries + 1))
        done
    done
}

any_alive() {
    local pid
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then return 0; fi
    done
    return 1
}

interrupted() {
    trap '' INT TERM HUP
    end_all
    say "stopped; rerun the same command to resume"
    rm -rf "$logs"
    exit 130
}

# Signals all processes: once they are connected, one would be enough.
preempted() {
    local pid
    for pid in "${pids[@]}"; do kill -TERM -- "-$pid" 2>/dev/null || true; done
}

start() {
    local index="$1"
    shift
    set -- "$python" -m ccu_jax.launch --devices "$devices" \
        --multihost "127.0.0.1:$port" "$count" "$index" "$@"
    if [ -n "$CCU_JAX_DRY_RUN" ]; then
        execute "$@"
    elif [ "$index" = 0 ]; then
        "$@" </dev/null &
        pids+=($!)
    else
        "$@" </dev/null >"$logs/process-$index.log" 2>&1 &
        pids+=($!)
    fi
}

trap interrupted INT HUP
trap preempted TERM
say "$count processes with $devices devices each, coordinator on port $port"
# Job control makes each process a group that receives Ctrl-C itself.
set -m
for ((index = 0; index < count; index++)); do start "$index" "$@"; done
set +m

failed=0 first_failed=""
running=("${!pids[@]}")  # none in a dry run
while [ "${#running[@]}" -gt 0 ] && [ "$failed" = 0 ]; do
    still=()
    for index in "${running[@]}"; do
        if kill -0 "${pids[index]}" 2>/dev/null; then
            still+=("$index")
        else
            status=0
            wait "${pids[index]}" 2>/dev/null || status=$?
            # A failing process ends others by a signal: its own code is more useful.
            if [ "$failed" = 0 ] || { [ "$failed" -ge 128 ] && [ "$status" != 0 ]; }
            then
                failed="$status" first_failed="$index"
            fi
        fi
    done
    running=("${still[@]}")
    # Preempted, for example: all processes save one checkpoint before they exit.
    if [ "$failed" = 75 ]; then
        for ((tries = 0; tries < 300; tries++)); do
            any_alive || break
            sleep 0.2
        done
        end_all
        say "all processes were ended; rerun the same command to resume"
        rm -rf "$logs"
        exit 75
    fi
    if [ "${#running[@]}" -gt 0 ]; then sleep 0.2; fi
done

if [ "$failed" = 0 ]; then
    if [ -n "$logs" ]; then rm -rf "$logs"; fi
    if [ -z "$CCU_JAX_DRY_RUN" ]; then say "all processes finished"; fi
    exit 0
fi
trap '' INT TERM HUP
end_all
for ((index = 1; index < count; index++)); do
    say "last lines of process $index ($logs/process-$index.log):"
    tail -n 15 "$logs/process-$index.log" >&2 || true
done
say "process $first_failed failed with exit code $failed; all were ended"
exit "$failed"
