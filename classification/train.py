#!/usr/bin/env python
"""Train or evaluate an image classifier with PS-KD; its text is `pskd_classification.train`."""

import sys

from pskd_classification.train import main

if __name__ == "__main__":
    sys.exit(main())
