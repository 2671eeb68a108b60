#!/usr/bin/env python
"""Train or evaluate a Detectron2 model with PS-KD; its text is `pskd_detectron2.train_net`."""

import sys

from pskd_detectron2.train_net import main, parse, run, setup

__all__ = ["main", "parse", "run", "setup"]

if __name__ == "__main__":
    sys.exit(run())
