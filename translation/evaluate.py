#!/usr/bin/env python
"""Measure a fairseq checkpoint, from a checkout; installed it is ``pskd-evaluate``."""

import sys

from pskd_fairseq.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
