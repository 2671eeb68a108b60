#!/bin/sh
# The demo's baseline with PS-KD.
#
#     configs/translation/demo_pskd.sh DATA SAVE_DIR [any fairseq-train flag]
set -eu
here=$(dirname "$0")
exec "$here/demo.sh" "$@" --user-dir "$here/../../translation/pskd_fairseq" --criterion pskd
