#!/usr/bin/env bash
# Run a validator and start it again when it ends, for machines without systemd or pm2 (deploy/ has files for those).
#   scripts/run_validator.sh --netuid N --wallet.name NAME --wallet.hotkey HOTKEY ...
# It does not update itself: code that pays is updated by its operator, from a tag that the operator chose.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_venv || exit

child=""
stop() {
    trap - INT TERM
    [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
    wait "$child" 2>/dev/null
    exit 0
}
trap stop INT TERM

delay=1
while true; do
    started=$SECONDS
    "$VENV/bin/python" "$ROOT/neurons/validator.py" "$@" &
    child=$!
    wait "$child"
    status=$?
    child=""
    # 2: a setting that cannot work, already explained; 0: asked for (--help, or SIGTERM to the validator itself)
    case "$status" in 0 | 2) exit "$status" ;; esac
    if [ $((SECONDS - started)) -ge 60 ]; then delay=1; fi
    echo "$(date '+%F %T') validator ended with status $status, started again in $delay s" >&2
    sleep "$delay" &
    child=$!
    wait "$child"
    child=""
    delay=$((delay < 60 ? delay * 2 : 60))
done
