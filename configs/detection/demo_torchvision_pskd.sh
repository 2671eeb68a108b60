#!/bin/sh
# demo_torchvision.sh with PS-KD. So short a training has a weak teacher: alpha_final 0.3.
#
#     configs/detection/demo_torchvision_pskd.sh --train SPEC --test SPEC [any flag]
set -eu
exec "$(dirname "$0")/demo_torchvision.sh" --pskd-alpha-final 0.3 "$@"
