# shellcheck shell=bash
# Sourced by the other scripts: finds or makes a Python environment with the package.
#
# Must work in bash 3.2, the one of macOS.

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

# Tests whether Python $1 has the module $2; from /, so that no checkout is imported.
has_module() {
    (cd / && "$1" -c "import sys, importlib.util as i
sys.exit(sys.version_info < (3, 11) or not i.find_spec('$2'))") >/dev/null 2>&1
}

# Tests whether Python $1 imports this checkout and not an installed copy.
has_checkout() {
    (cd / && "$1" -c "import sys, importlib.util as i, pathlib as p
found = i.find_spec('ccu_jax')
here = p.Path(sys.argv[1]).resolve()
sys.exit(not found or here not in p.Path(found.origin).resolve().parents)" "$root") \
        >/dev/null 2>&1
}

# Sets $base to a Python that can create an environment.
find_base() {
    local name without=""
    for name in python3.12 python3.13 python3.11 python3 python; do
        # Run, not only looked up: pyenv has shims of versions that are not installed.
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
            >/dev/null 2>&1 || continue
        if "$name" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            base="$name"
            return
        fi
        without="$name"
    done
    if [ -n "$without" ]; then
        fail "$without has no ensurepip, so it cannot create .venv; on Debian or" \
            "Ubuntu: apt install python3-venv"
    fi
    fail "no Python 3.11 or newer on the PATH; install one, such as python3.12"
}

# A checksum of what an installation depends on, also the folder: a checkout that was
# moved is installed again.
fingerprint() { { cat "$root/setup.cfg" "$root/setup.py" "$root/pyproject.toml"; pwd -P; } | cksum; }

# Sets $python. $1 is the extra that is needed ("" or "dev"); $2 is a module by which an
# active environment with that extra is recognized.
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
    # The extra `dev` includes all that a run needs.
    for stamp in "$venv/.ccu_jax" "$venv/.ccu_jax-dev"; do
        case "$extra$stamp" in dev*ccu_jax) continue ;; esac
        if [ "$(cat "$stamp" 2>/dev/null)" = "$(cd "$root" && fingerprint)" ]; then
            say "using $venv"
            return
        fi
    done
    if [ ! -e "$venv" ]; then
        find_base
        say "creating $venv with $base"
        execute "$base" -m venv "$venv" || {
            rm -rf "$venv"
            fail "$base cannot create $venv; see above"
        }
    elif ! has_module "$python" pip; then
        fail "$venv is not an environment of Python 3.11 or newer with pip; remove it" \
            "and rerun"
    fi
    if [ -n "$extra" ]; then target="${root}[$extra]"; fi
    say "installing the package and its dependencies (2 GB; the first time, minutes)"
    execute "$python" -m pip install --quiet --disable-pip-version-check \
        --editable "$target" || fail "installing into $venv failed; see above"
    stamp="$venv/.ccu_jax${extra:+-$extra}"
    if [ -z "$CCU_JAX_DRY_RUN" ]; then (cd "$root" && fingerprint) >"$stamp"; fi
    say "installed"
}
