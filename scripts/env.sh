# Sourced by the other scripts: finds the checkout and keeps its virtual environment up to date.
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.12 python3.11 python3; do
        if command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    echo "error: Hivetrain needs Python 3.11 or 3.12; install one, or name it: PYTHON=/path/to/python3.12 $0" >&2
    return 2
}

# What is installed is right as long as this hash is the one in the stamp file.
wanted_stamp() {
    cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum
    echo "$ROOT"
}

install_into_venv() {
    local python log="$VENV/install.log"
    if ! "$VENV/bin/python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
        python="$(find_python)" || return
        echo "[1/3] making $VENV with $("$python" --version)" >&2
        "$python" -m venv --clear "$VENV" ||
            { echo "error: $python cannot make a virtual environment (on Debian: apt install python3-venv)" >&2; return 2; }
    fi
    local pip=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input)
    # First and by itself: the largest download, and its build decides what else is pulled in.
    echo "[2/3] installing PyTorch (log: $log)" >&2
    "${pip[@]}" install --quiet -c "$ROOT/constraints.txt" "torch==2.13.0" >"$log" 2>&1 </dev/null ||
        { tail -n 20 "$log" >&2; echo "error: PyTorch could not be installed; the whole log is $log" >&2; return 1; }
    echo "[3/3] installing Hivetrain and what it needs, a minute or two (log: $log)" >&2
    "${pip[@]}" install --quiet -c "$ROOT/constraints.txt" -e "$ROOT[dev]" >>"$log" 2>&1 </dev/null ||
        { tail -n 20 "$log" >&2; echo "error: Hivetrain could not be installed; the whole log is $log" >&2; return 1; }
}

# Make .venv fit pyproject.toml and constraints.txt; does nothing when it does already. One at a time.
ensure_venv() {
    local stamp="$VENV/.hivetrain-stamp"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted_stamp)" ]; then
        return 0
    fi
    (
        if command -v flock >/dev/null 2>&1; then
            exec 9<"$ROOT/pyproject.toml"
            flock 9
            # Somebody else may have finished it while we waited.
            if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted_stamp)" ]; then exit 0; fi
        fi
        install_into_venv 9>&- || exit
        wanted_stamp >"$stamp"
    )
}

# Run neurons/$1.py with the other arguments, and start it again when it ends.
keep_running() {
    local role="$1" delay=1 started status
    shift
    child=""
    trap stop_child INT TERM
    while true; do
        started=$SECONDS
        "$VENV/bin/python" "$ROOT/neurons/$role.py" "$@" &
        child=$!
        wait "$child"
        status=$?
        child=""
        # 2: a setting that cannot work, already explained; 0: asked for (--help, or SIGTERM to the neuron itself)
        case "$status" in 0 | 2) exit "$status" ;; esac
        if [ $((SECONDS - started)) -ge 60 ]; then delay=1; fi
        echo "$(date '+%F %T') $role ended with status $status, started again in $delay s" >&2
        sleep "$delay" &
        child=$!
        wait "$child"
        child=""
        delay=$((delay < 60 ? delay * 2 : 60))
    done
}

stop_child() {
    trap - INT TERM
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
    wait "$child" 2>/dev/null
    exit 0
}
