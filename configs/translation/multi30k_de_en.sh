#!/usr/bin/env bash
# Multi30k German-English, all 29,000 pairs: fairseq's label-smoothed cross-entropy.
# A small Transformer that trains on one CPU core; in 3 epochs cross-entropy underfits.
#
#     configs/translation/multi30k_de_en.sh DATA SAVE_DIR [any fairseq-train flag, the last wins]
#
# --required-batch-size-multiple 1: by default up to 7 of the longest sentences are never seen.
# --best-checkpoint-metric nll_loss: comparable across criterions, which the loss is not.
set -eu
data=$1 save_dir=$2
shift 2
# The log is kept beside the checkpoints, where `pskd report` looks; a resumed run adds to it.
mkdir -p "$save_dir"
exec > >(exec tee -ia "$save_dir/train.log") 2>&1
exec fairseq-train "$data" --save-dir "$save_dir" \
    --arch transformer --share-all-embeddings --dropout 0.1 \
    --encoder-layers 2 --encoder-embed-dim 96 --encoder-ffn-embed-dim 384 \
    --encoder-attention-heads 4 \
    --decoder-layers 2 --decoder-embed-dim 96 --decoder-ffn-embed-dim 384 \
    --decoder-attention-heads 4 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
    --lr 2e-3 --lr-scheduler inverse_sqrt --warmup-updates 500 \
    --max-tokens 1024 --required-batch-size-multiple 1 --max-epoch 3 --seed 1 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --no-epoch-checkpoints --best-checkpoint-metric nll_loss \
    --no-progress-bar --log-format simple --log-interval 100 "$@"
