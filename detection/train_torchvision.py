#!/usr/bin/env python
"""Train or evaluate a torchvision detector with PS-KD; its text is `pskd_torchvision.train`."""

import sys

from pskd_torchvision.train import main

if __name__ == "__main__":
    sys.exit(main())
