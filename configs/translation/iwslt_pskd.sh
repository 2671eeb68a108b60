#!/bin/sh
# iwslt.sh with PS-KD from the memory.
#
#     configs/translation/iwslt_pskd.sh DATA SAVE_DIR [any fairseq-train flag]
set -eu
here=$(dirname "$0")
exec "$here/iwslt.sh" "$@" \
    --user-dir "$here/../../translation/pskd_fairseq" --criterion pskd --pskd-teacher memory
