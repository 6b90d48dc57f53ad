# shellcheck shell=bash
# Sourced by the scripts beside it: finds or makes the Python that has the package.
#
# Written for bash 3.2 as well, which is what macOS has.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '[%4ds] %s\n' "$SECONDS" "$*" >&2; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# Runs a command; with CCU_JAX_DRY_RUN=1 only prints it.
execute() {
    if [ -n "$CCU_JAX_DRY_RUN" ]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

# Whether Python $1 has the module $2. Asked from /, where no checkout is in the way.
has_module() {
    (cd / && "$1" -c "import sys, importlib.util as i
sys.exit(sys.version_info < (3, 11) or not i.find_spec('$2'))") >/dev/null 2>&1
}

# Whether Python $1 runs this checkout, and not a copy that was installed once.
has_checkout() {
    (cd / && "$1" -c "import sys, importlib.util as i, pathlib as p
found = i.find_spec('ccu_jax')
here = p.Path(sys.argv[1]).resolve()
sys.exit(not found or here not in p.Path(found.origin).resolve().parents)" "$root") \
        >/dev/null 2>&1
}

# Sets $base to a Python that can make an environment.
find_base() {
    local name without=""
    for name in python3.12 python3.13 python3.11 python3 python; do
        # It is run and not only looked up: pyenv has names for what is not there.
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1 || continue
        if "$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            base="$name"
            return
        fi
        without="$name"
    done
    if [ -n "$without" ]; then
        fail "$without has no ensurepip and cannot make .venv; remedy on Debian or" \
            "Ubuntu: apt install python3-venv"
    fi
    fail "there is no Python 3.11 or newer on the PATH; install one, python3.12 say"
}

# What an installation depends on. The folder too: a moved checkout is installed anew.
fingerprint() { { cat "$root/setup.cfg" "$root/setup.py" "$root/pyproject.toml"; pwd -P; } | cksum; }

# Sets $python. $1 is the extra that is needed ("" or "dev"), $2 a module that tells
# whether an active environment has it.
find_python() {
    local venv="$root/.venv" extra="$1" stamp target="$root"
    if [ -n "$VIRTUAL_ENV" ]; then
        python="$VIRTUAL_ENV/bin/python"
        if has_checkout "$python" && has_module "$python" "${2:-ccu_jax}"; then
            say "using the active environment $VIRTUAL_ENV"
            return
        fi
        if ! [ "$VIRTUAL_ENV" -ef "$venv" ]; then
            say "the active environment lacks this checkout's ccu_jax${2:+ or $2};" \
                "using $venv"
        fi
    fi
    python="$venv/bin/python"
    # What `dev` brings includes everything else.
    for stamp in "$venv/.ccu_jax" "$venv/.ccu_jax-dev"; do
        case "$extra$stamp" in dev*ccu_jax) continue ;; esac
        if [ "$(cat "$stamp" 2>/dev/null)" = "$(cd "$root" && fingerprint)" ]; then
            say "using $venv"
            return
        fi
    done
    if [ ! -e "$venv" ]; then
        find_base
        say "making $venv with $base"
        execute "$base" -m venv "$venv" || {
            rm -rf "$venv"
            fail "$base cannot make $venv; see above"
        }
    elif ! has_module "$python" pip; then
        fail "$venv is no environment of Python 3.11 or newer with pip; remove it and" \
            "run this again"
    fi
    if [ -n "$extra" ]; then target="${root}[$extra]"; fi
    say "installing the package and what it needs (2 GB, some minutes the first time)"
    execute "$python" -m pip install --quiet --disable-pip-version-check \
        --editable "$target" || fail "installing into $venv failed; see above"
    stamp="$venv/.ccu_jax${extra:+-$extra}"
    if [ -z "$CCU_JAX_DRY_RUN" ]; then (cd "$root" && fingerprint) >"$stamp"; fi
    say "installed"
}
