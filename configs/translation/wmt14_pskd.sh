#!/bin/sh
# wmt14.sh with PS-KD from the memory: 8.5 GB a file, two of them, in SAVE_DIR or --pskd-memory.
#
#     configs/translation/wmt14_pskd.sh DATA SAVE_DIR [any fairseq-train flag]
set -eu
here=$(dirname "$0")
exec "$here/wmt14.sh" "$@" \
    --user-dir "$here/../../translation/pskd_fairseq" --criterion pskd --pskd-teacher memory
