"""The `pskd` command, its doctor and its report, and what train scripts share."""
