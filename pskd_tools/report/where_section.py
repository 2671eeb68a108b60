"""The section that says where a method differs from the baseline, and on which test examples."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pskd_tools.presets import Preset
from pskd_tools.report.changed import (
    SHOWN_SCORE,
    ChangedBoxes,
    ChangedSentence,
    Guess,
    changed_boxes,
    changed_predictions,
    changed_sentences,
)
from pskd_tools.report.compare import Comparison
from pskd_tools.report.example_files import Box, Boxes
from pskd_tools.report.verdict import difference_html
from pskd_tools.report.where import Group, Groups, by_class, by_confidence, most_changed

__all__ = ["where_section"]


def where_section(pair: Comparison, preset: Preset) -> str:
    """Return the HTML: by confidence, by class, and what changed most."""
    names = escape(pair.baseline.name), escape(pair.method.name)
    examples_of = {
        "detection": _told_of_boxes,
        "translation": _told_of_sentences,
        "classification": _told_of_predictions,
    }[pair.baseline.runs[0].task]
    parts = [f"<h3>Where {names[1]} differs from {names[0]}</h3>"]
    sure, classes = by_confidence(pair, preset), by_class(pair, preset)
    tables = []
    if sure is not None:
        tables.append(_table(f"confidence of {names[0]}", sure.groups, sure))
    if classes is not None:
        tables.append(_table("class", most_changed(classes), classes))
    if tables:
        parts += ['<div class="tables">', *tables, "</div>"]
    if sure or (classes and len(classes.groups[0].baseline) > 1):
        parts.append(
            f'<p class="soft">{names[0]} → {names[1]}, below it the difference with its 95 % '
            "interval. Of many groups, a few differ by chance.</p>"
        )
    return "\n".join([*parts, examples_of(pair)])


def _table(head: str, groups: Sequence[Group], of: Groups) -> str:
    heads = "".join(
        f'<th scope="col">{escape(metric.title)}<small>{escape(metric.unit)}</small></th>'
        for metric in of.metrics
    )
    lines = ['<div class="wide"><table class="metrics">', "<thead>"]
    lines += [f'<tr><th class="text" scope="col">{head}</th>{heads}</tr>', "</thead>", "<tbody>"]
    for group in groups:
        count = "" if group.count is None else f"<small>{group.count:,} {of.unit}</small>"
        cells = []
        for metric, start, difference in zip(
            of.metrics, group.baseline, group.differences, strict=True
        ):
            values = f"{metric.text(start)} → {metric.text(start + difference.value)}"
            cells.append(f"<td>{values}{difference_html(metric, difference)}</td>")
        lines.append(f'<tr><th scope="row">{escape(group.name)}{count}</th>{"".join(cells)}</tr>')
    left_out = len(of.groups) - len(groups)
    if left_out:
        lines.append(
            f'<tr><td class="text soft" colspan="{len(of.metrics) + 1}">'
            f"{left_out:,} between those that gained and lost most are left out</td></tr>"
        )
    return "\n".join([*lines, "</tbody>", "</table></div>"])


def _left_out(pair: Comparison, what: str, file: str) -> str:
    folders = ", ".join(str(row.runs[0].folder) for row in (pair.baseline, pair.method))
    return (
        f'<p class="soft">{what} left out: they need {file} of the same test set in both '
        f"{escape(folders)}.</p>"
    )


def _first_runs(pair: Comparison) -> str:
    several = max(len(pair.baseline.runs), len(pair.method.runs)) > 1
    return " Of the first run of each." if several else ""


# ---- classification ------------------------------------------------------------------------------


def _told_of_predictions(pair: Comparison) -> str:
    found = changed_predictions(pair)
    if found is None:
        what = "Classes and changed predictions are"
        return _left_out(pair, what, "ids, label and predicted in confidence.npz")
    (won, lost, moved), better, worse = found
    name = escape(pair.method.name)
    lines = [
        f"<h4>Predictions that changed</h4>\n<p>{name} corrects {won:,} and newly mistakes {lost:,}"
        f"; {moved:,} more are still wrong, but of another class.{_first_runs(pair)}</p>"
    ]
    for title, examples, count in (
        (f"Corrected by {name}", better, won),
        (f"Newly mistaken by {name}", worse, lost),
    ):
        if examples:
            of = f", {len(examples)} of {count:,} with the largest change of NLL"
            lines.append(f"<h4>{title}{of if len(examples) < count else ''}</h4>")
            lines.append('<ul class="examples">')
            lines += [_guess(example, pair) for example in examples]
            lines.append("</ul>")
    return "\n".join(lines)


def _guess(example: Guess, pair: Comparison) -> str:
    image = f'<img src="{escape(example.image)}" alt="">' if example.image else ""
    lines = [f"<li>{image}<b>{escape(example.label)}</b>"]
    for row, predicted, confidence in zip(
        (pair.baseline, pair.method), example.predicted, example.confidence, strict=True
    ):
        mark = "right" if predicted == example.label else "wrong"
        guess = f'<span class="{mark}">{escape(predicted)}</span>'
        lines.append(f"<br>{escape(row.name)}: {guess} {confidence:.2f}")
    return "".join([*lines, f'<br><span class="soft">{escape(example.id)}</span></li>'])


# ---- translation ---------------------------------------------------------------------------------


def _told_of_sentences(pair: Comparison) -> str:
    found = changed_sentences(pair)
    if found is None:
        return _left_out(pair, "Changed translations are", "sentences.json")
    (up, down, same), better, worse = found
    name = escape(pair.method.name)
    lines = [
        f"<h4>Translations that changed</h4>\n<p>{name} has a higher chrF on {up:,} sentences and "
        f"a lower one on {down:,}; {same:,} translations are the same text.{_first_runs(pair)}</p>"
    ]
    for title, examples in (("Gained most", better), ("Lost most", worse)):
        if examples:
            lines.append(f'<h4>{title}</h4>\n<div class="tables">')
            lines += [_sentence(example, pair) for example in examples]
            lines.append("</div>")
    return "\n".join(lines)


def _sentence(example: ChangedSentence, pair: Comparison) -> str:
    texts = [("source", example.source)] if example.source is not None else []
    texts.append(("reference", example.reference))
    for row, text, score in zip(
        (pair.baseline, pair.method), example.translations, example.scores, strict=True
    ):
        texts.append((f"{row.name}, chrF {score:.0f}", text))
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in texts]
    return f'<dl class="sentence">{"".join(lines)}</dl>'


# ---- detection -----------------------------------------------------------------------------------


def _told_of_boxes(pair: Comparison) -> str:
    found = changed_boxes(pair)
    if found is None:
        return _left_out(pair, "Images with the boxes of both runs are", "test_images.json")
    count, better, worse = found
    lines = [
        f"<h4>Images that changed</h4>\n<p>Among {count:,} test images of both runs. Green: a "
        "detection that is correct; red: one that is not; dashed: an annotated object. Boxes of a "
        f"score below {SHOWN_SCORE} are left out.{_first_runs(pair)}</p>"
    ]
    for title, images in (("Fewer errors", better), ("More errors", worse)):
        if images:
            lines.append(f"<h4>{title} by {escape(pair.method.name)}</h4>")
            lines.append('<div class="images">')
            lines += [_image(image, pair) for image in images]
            lines.append("</div>")
    return "\n".join(lines)


def _image(image: ChangedBoxes, pair: Comparison) -> str:
    lines = []
    for row, seen, errors in zip(
        (pair.baseline, pair.method), image.seen, image.errors, strict=True
    ):
        caption = f"{row.name}: {errors} wrong or missed. {image.id}"
        lines.append(f"<figure>{_drawing(seen)}<figcaption>{escape(caption)}</figcaption></figure>")
    return "\n".join(lines)


def _drawing(seen: Boxes) -> str:
    parts = [
        f'<svg viewBox="0 0 {seen.width:g} {seen.height:g}" role="img">',
        f'<image href="{escape(seen.image)}" width="{seen.width:g}" height="{seen.height:g}"/>',
    ]
    parts += [_rect(box, "object", seen.width) for box in seen.objects]
    parts += [
        _rect(box, "right" if box.correct else "wrong", seen.width)
        for box in seen.detections
        if (box.score or 0.0) >= SHOWN_SCORE
    ]
    return "".join([*parts, "</svg>"])


def _rect(box: Box, kind: str, image_width: float) -> str:
    left, top, width, height = box.box
    rect = f'<rect class="{kind}" x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"/>'
    if box.score is None:
        return rect
    size = image_width / 20
    at, anchor = (left + width, "end") if left > 0.75 * image_width else (left, "start")
    return (
        f'{rect}<text class="{kind}" x="{at:g}" y="{max(top - size / 4, size):g}" '
        f'text-anchor="{anchor}" font-size="{size:g}">{escape(box.label)} {box.score:.2f}</text>'
    )
