#!/usr/bin/env python
"""Turn a ResNet into a backbone of Detectron2; its text is `pskd_torchvision.convert_backbone`."""

import sys

from pskd_torchvision.convert_backbone import main

if __name__ == "__main__":
    sys.exit(main())
