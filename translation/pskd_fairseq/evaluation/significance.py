"""sacreBLEU's paired bootstrap between evaluations of one test set."""

from __future__ import annotations

from collections.abc import Sequence

import sacrebleu
from sacrebleu.significance import PairedTest

from pskd_fairseq.evaluation.metrics import metrics
from pskd_fairseq.programs import UserError
from pskd_tools.report.compare import way_of
from pskd_tools.report.runs import Run, read_runs


def compare(words: Sequence[str]) -> str:
    """Compare evaluations, ``FOLDER`` or ``NAME=FOLDER``, with the first as sacreBLEU does.

    Returns a table of scores, their means and 95 % intervals over 1,000 resamples, and the p-values
    of the differences from the first; then the signatures.
    """
    try:
        runs = read_runs(words)
    except ValueError as error:
        raise UserError(str(error)) from error
    if len(runs) < 2:
        raise UserError(f"compare: expected two evaluations or more, got {len(runs)}")
    systems = [_system(run, runs[0]) for run in runs]
    references = [run.sentences.reference for run in runs[:1] if run.sentences is not None]
    named = {type(metric).__name__: metric for metric in _metrics(runs[0])}
    signatures, scores = PairedTest(systems, named, references, test_type="bs")()
    width = max(len(name) for name, _ in systems)
    lines = [f"{'':{width}}" + "".join(f"  {name:>31}" for name in signatures)]
    for row, (name, _) in enumerate(systems):
        cells = (_cell(scores[metric][row]) for metric in signatures)
        lines.append(f"{name:{width}}" + "".join(f"  {cell:>31}" for cell in cells))
    return "\n".join([*lines, *(f"{name}: {signature}" for name, signature in signatures.items())])


def _cell(result) -> str:
    p = "" if result.p_value is None else f"p {result.p_value:.4f}"
    return f"{result.score:.2f} ({result.mean:.2f} ± {result.ci:.2f}) {p:>8}"


def _system(run: Run, first: Run) -> tuple[str, list[str]]:
    """Return a run's name and translations."""
    got, expected = way_of(run.numbers, "bleu"), way_of(first.numbers, "bleu")
    if run.sentences is None or got is None:
        raise UserError(
            f"{run.folder}: expected an evaluation with sentences.json and bleu_signature, as "
            "evaluate.py makes of data with prepare.json, got none"
        )
    # The first has passed the line above when another is looked at.
    if first.sentences is None or run.sentences.reference != first.sentences.reference:
        raise UserError(f"{run.folder}: expected the references of {first.folder}, got others")
    if got != expected:
        raise UserError(f"{run.folder}: expected BLEU of {expected} as {first.folder}, got {got}")
    return run.name, run.sentences.translation


def _metrics(run: Run) -> tuple[sacrebleu.BLEU, sacrebleu.CHRF]:
    """Return BLEU and chrF as a run was scored with."""
    fields = dict(part.partition(":")[::2] for part in str(way_of(run.numbers, "bleu")).split("|"))
    lowercase, tokens = fields.get("case") == "lc", fields.get("tok", "")
    # Of ja-mecab the signature also names the dictionary.
    known = [name for name in sacrebleu.BLEU.TOKENIZERS if tokens.startswith(name)]
    if not known:
        raise UserError(f"{run.folder}: expected a tokeniser of sacreBLEU's, got tok:{tokens}")
    return metrics(str(run.folder), lowercase, tokenize=known[0])
