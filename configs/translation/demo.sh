#!/bin/sh
# The demo's baseline: fairseq's label-smoothed cross-entropy on the embedded locale corpus.
# The demo keeps its output in SAVE_DIR/train.log.
#
#     configs/translation/demo.sh DATA SAVE_DIR [any fairseq-train flag, the last wins]
set -eu
data=$1 save_dir=$2
shift 2
exec fairseq-train "$data" --save-dir "$save_dir" \
    --arch transformer --share-all-embeddings --dropout 0.1 \
    --encoder-layers 2 --encoder-embed-dim 64 --encoder-ffn-embed-dim 256 \
    --encoder-attention-heads 4 \
    --decoder-layers 2 --decoder-embed-dim 64 --decoder-ffn-embed-dim 256 \
    --decoder-attention-heads 4 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 1.0 \
    --lr 3e-3 --lr-scheduler inverse_sqrt --warmup-updates 300 \
    --max-tokens 1024 --required-batch-size-multiple 1 --max-epoch 10 --seed 1 \
    --criterion label_smoothed_cross_entropy --label-smoothing 0.1 \
    --no-epoch-checkpoints --best-checkpoint-metric nll_loss \
    --no-progress-bar --log-format json --log-interval 50 "$@"
