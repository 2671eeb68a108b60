#!/usr/bin/env python
"""Compare three methods in a given time; its text is `pskd_classification.compare`."""

import sys

from pskd_classification.compare import main

if __name__ == "__main__":
    sys.exit(main())
