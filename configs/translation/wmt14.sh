#!/usr/bin/env bash
# WMT 2014 English-German: fairseq's transformer_wmt_en_de (the base model, 6 + 6 layers of 512).
# Batches of 8 x 4,096 tokens: on one GPU by --update-freq 8 (set here), on eight give 1.
#
#     configs/translation/wmt14.sh DATA SAVE_DIR [any fairseq-train flag, the last wins]
set -eu
data=$1 save_dir=$2
shift 2
# The log is kept beside the checkpoints, where `pskd report` looks; a resumed run adds to it.
mkdir -p "$save_dir"
exec > >(exec tee -ia "$save_dir/train.log") 2>&1
exec fairseq-train "$data" --save-dir "$save_dir" \
    --arch transformer_wmt_en_de --share-all-embeddings --dropout 0.1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 0.0 \
    --lr 7e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-07 \
    --max-tokens 4096 --update-freq 8 --max-epoch 25 --seed 1 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --keep-last-epochs 5 --best-checkpoint-metric nll_loss \
    --no-progress-bar --log-format simple --log-interval 100 "$@"
