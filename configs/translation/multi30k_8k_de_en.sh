#!/bin/sh
# The first 8,000 pairs of Multi30k, a wider model, and 20 epochs: cross-entropy overfits.
#
#     configs/translation/multi30k_8k_de_en.sh DATA SAVE_DIR [any fairseq-train flag]
set -eu
data=$1 save_dir=$2
shift 2
exec "$(dirname "$0")/multi30k_de_en.sh" "$data" "$save_dir" \
    --encoder-embed-dim 128 --encoder-ffn-embed-dim 512 \
    --decoder-embed-dim 128 --decoder-ffn-embed-dim 512 --max-epoch 20 "$@"
