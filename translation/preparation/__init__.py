"""The steps of `prepare.py`, from parallel text to what fairseq-train reads."""
