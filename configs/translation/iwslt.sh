#!/usr/bin/env bash
# IWSLT 2014 or 2015, English and German in either direction: fairseq's transformer_iwslt_de_en
# (6 + 6 layers of 512) with label smoothing, as in fairseq's own example. One GPU.
#
#     configs/translation/iwslt.sh DATA SAVE_DIR [any fairseq-train flag, the last wins]
set -eu
data=$1 save_dir=$2
shift 2
# The log is kept beside the checkpoints, where `pskd report` looks; a resumed run adds to it.
mkdir -p "$save_dir"
exec > >(exec tee -ia "$save_dir/train.log") 2>&1
exec fairseq-train "$data" --save-dir "$save_dir" \
    --arch transformer_iwslt_de_en --share-all-embeddings --dropout 0.3 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay 0.0001 --clip-norm 0.0 \
    --lr 5e-4 --lr-scheduler inverse_sqrt --warmup-updates 4000 --warmup-init-lr 1e-07 \
    --max-tokens 4096 --required-batch-size-multiple 1 --max-epoch 50 --seed 1 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --no-epoch-checkpoints --best-checkpoint-metric nll_loss \
    --no-progress-bar --log-format simple --log-interval 100 "$@"
