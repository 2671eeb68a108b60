#!/usr/bin/env python
"""Parallel text -> fairseq binaries, from a checkout; installed it is ``pskd-prepare``."""

import sys

from pskd_fairseq.prepare import main

if __name__ == "__main__":
    sys.exit(main())
