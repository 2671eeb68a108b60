"""report.html: tables, figures and examples on one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from pskd.version import __version__
from pskd_tools.presets import Preset
from pskd_tools.report.changed import changed_examples
from pskd_tools.report.compare import Comparison
from pskd_tools.report.figures import confidence_figures, hard_example_figures, teacher_figures
from pskd_tools.report.files import SHOWN_SCORE
from pskd_tools.report.tables import Table
from pskd_tools.report.verdict import LEADS, sentences
from pskd_tools.report.where import by_class, by_confidence, most_changed

__all__ = ["make_page"]


def make_page(
    tables: Sequence[Table], pairs: Mapping[str, Sequence[Comparison]], preset: Preset
) -> str:
    """Return the page as HTML.

    Args:
        pairs: the comparisons of each task.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: as the plots.
    """
    # Names of runs, classes and files are anybody's: whatever is not the template's is escaped.
    templates = Environment(
        loader=PackageLoader("pskd_tools.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    templates.filters["signed"] = lambda raw, metric: metric.signed(raw)
    page = templates.get_template("page.html")
    return page.render(
        title=f"pskd report: {', '.join(table.task for table in tables)}",
        version=__version__,
        preset=preset,
        shown_score=SHOWN_SCORE,
        leads=LEADS,
        sentences=sentences,
        most_changed=most_changed,
        sections=[_section(table, pairs[table.task], preset) for table in tables],
    )


def _section(table: Table, pairs: Sequence[Comparison], preset: Preset) -> dict[str, object]:
    return {
        "table": table,
        "pairs": pairs,
        "where": [
            (by_confidence(pair, preset), by_class(pair, preset), changed_examples(pair))
            for pair in pairs
        ],
        "confidence": confidence_figures(table, preset),
        "training": [*teacher_figures(table), *hard_example_figures(table)],
    }
