"""The steps of `pskd_fairseq.prepare`, from parallel text to what fairseq-train reads."""
