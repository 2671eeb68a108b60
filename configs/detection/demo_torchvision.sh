#!/bin/sh
# The demo's baseline without Detectron2: a small Faster R-CNN on 128 x 128 images of handwritten
# digits. A mirrored digit is no digit, so nothing is flipped.
#
#     configs/detection/demo_torchvision.sh --train SPEC --test SPEC [any flag of train_torchvision.py,
#                                                                     the last wins]
set -eu
here=$(dirname "$0")
exec python "$here/../../detection/train_torchvision.py" \
    --model fasterrcnn_tiny_fpn --epochs 6 --batch-size 4 --hflip 0 \
    --opt adamw --lr 1e-3 --weight-decay 0.05 --lr-steps 4 5 --warmup-iters 50 \
    --device cpu --workers 0 --seed 1 "$@"
