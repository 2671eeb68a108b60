"""What the train scripts share: random states, logs, files that are never half written."""
