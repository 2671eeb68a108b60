#!/bin/sh
# wmt14.sh with PS-KD from the memory, in SAVE_DIR or --pskd-memory: 8.5 GB a file, one for each
# checkpoint of --keep-last-epochs 5 (wmt14.sh), one for the best if it is older, and the one that is
# written. With --keep-last-epochs 1 there are two or three.
#
#     configs/translation/wmt14_pskd.sh DATA SAVE_DIR [any fairseq-train flag]
set -eu
here=$(dirname "$0")
exec "$here/wmt14.sh" "$@" \
    --user-dir "$here/../../translation/pskd_fairseq" --criterion pskd --pskd-teacher memory
