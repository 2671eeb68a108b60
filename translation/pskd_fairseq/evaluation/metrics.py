"""The scores of translated text: sacreBLEU's for the target language, and COMET if installed."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import sacrebleu
import torch

from pskd_fairseq.programs import UserError

logger = logging.getLogger("evaluate")

# The codes of three letters (NLLB's zho_Hans) of those that are treated differently here.
_TWO_LETTERS = {
    "zho": "zh", "cmn": "zh", "yue": "zh", "lzh": "zh", "jpn": "ja", "kor": "ko",
    "tha": "th", "lao": "lo", "khm": "km", "mya": "my", "bod": "bo", "dzo": "dz",
}  # fmt: skip
# Written without spaces, and without a tokeniser of their own in sacreBLEU.
_BY_CHARACTER = {"th", "lo", "km", "my", "shn", "bo", "dz"}
_COMET = "Unbabel/wmt22-comet-da"


def language_of(code: str) -> str:
    """Return the language of a code with a region or script: zh of zh_CN, zh-Hant or zho_Hans."""
    language = re.split(r"[-_.@]", code.lower())[0]
    return _TWO_LETTERS.get(language, language)


def corpus_metrics(target_lang: str, lowercase: bool) -> tuple[sacrebleu.BLEU, sacrebleu.CHRF]:
    """Return sacreBLEU's BLEU and chrF, with the tokens that it counts in the target language."""
    language = language_of(target_lang)
    tokenize = "char" if language in _BY_CHARACTER else None
    name = f"BLEU of target language {target_lang}"
    return metrics(name, lowercase, tokenize=tokenize, trg_lang=language)


def metrics(
    name: str, lowercase: bool, **options: str | None
) -> tuple[sacrebleu.BLEU, sacrebleu.CHRF]:
    """Return BLEU with these options and chrF; ``name`` begins the error for what is missing."""
    try:
        bleu = sacrebleu.BLEU(lowercase=lowercase, **options)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from error
    return bleu, sacrebleu.CHRF(lowercase=lowercase)


def comet_score(
    sources: Sequence[str], translations: Sequence[str], references: Sequence[str], *, cpu: bool
) -> dict[str, float | str]:
    """Return COMET of a corpus, a fraction, and its model; nothing without unbabel-comet or model.

    Only a model that lies on this machine is used: it is a download of gigabytes.
    """
    try:
        import comet
    except ImportError:
        return {}
    rows = [
        {"src": source, "mt": translation, "ref": reference}
        for source, translation, reference in zip(sources, translations, references, strict=True)
    ]
    gpus = int(torch.cuda.is_available() and not cpu)
    try:
        model = comet.load_from_checkpoint(comet.download_model(_COMET, local_files_only=True))
        score = model.predict(rows, batch_size=8, gpus=gpus, progress_bar=False).system_score
    except Exception as error:  # after minutes of translating, the other scores are not lost
        logger.warning(
            "no COMET: %s: %s; if the model is missing, fetch it once: python -c "
            "'import comet; comet.download_model(\"%s\")'",
            type(error).__name__, error, _COMET,
        )  # fmt: skip
        return {}
    return {"comet": float(score), "comet_model": _COMET}
