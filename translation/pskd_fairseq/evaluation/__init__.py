"""The steps of `evaluate.py`, from a fairseq checkpoint to its scores."""
