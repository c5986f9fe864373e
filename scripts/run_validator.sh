#!/usr/bin/env bash
# Run a validator and start it again when it ends, for machines without systemd or pm2 (deploy/ has files for those).
#   scripts/run_validator.sh --netuid N --wallet.name NAME --wallet.hotkey HOTKEY ...
# It does not update itself: code that pays is updated by its operator, from a tag that the operator chose.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
ensure_venv || exit
keep_running validator "$@"
