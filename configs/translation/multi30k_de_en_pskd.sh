#!/bin/sh
# multi30k_de_en.sh with PS-KD; --label-smoothing 0 takes the smoothing out.
#
#     configs/translation/multi30k_de_en_pskd.sh DATA SAVE_DIR [any fairseq-train flag]
set -eu
here=$(dirname "$0")
exec "$here/multi30k_de_en.sh" "$@" \
    --user-dir "$here/../../translation/pskd_fairseq" --criterion pskd
