"""The page's frame and its looks: no script, no font and no image from elsewhere."""

from __future__ import annotations

from string import Template

__all__ = ["PAGE"]

_STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #595959; --line: #d4d4d4; 
  --good: #14692b; --bad: #a8330a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1.25rem 3rem; background: #fff;
  color: var(--ink); font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 2.4rem 0 .6rem; padding-top: .8rem;
  border-top: 2px solid var(--ink); }
h3 { font-size: 1.08rem; margin: 1.6rem 0 .5rem; }
p { margin: .4rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
thead th { vertical-align: bottom; }
th { font-weight: 600; }
th small, td small { font-weight: 400; font-size: .87em; color: var(--soft); }
thead small, td small { display: block; }
td small span { display: inline-block; }
th[scope=row], .text { text-align: left; }
th[scope=row] { min-width: 4.4rem; max-width: 15rem; }
.name { overflow-wrap: anywhere; min-width: 4.6rem; }
.meaning td { white-space: normal; }
.better, td small.better { color: var(--good); font-weight: 700; }
.worse, td small.worse { color: var(--bad); font-weight: 700; }
.right { color: var(--good); }
.wrong { color: var(--bad); }
.verdict { list-style: none; padding: 0; margin: .4rem 0; max-width: 60rem; }
.verdict li { margin: .25rem 0; overflow-wrap: anywhere; }
details { margin: .8rem 0; }
summary { cursor: pointer; font-weight: 600; }
.tables { display: grid; column-gap: 2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.tables th small { display: block; }
.tables .wide { min-width: 0; }
.figures { display: grid; gap: 1.2rem; align-items: start; margin: .8rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure { margin: 0; max-width: 44rem; break-inside: avoid; }
figure img, figure svg { display: block; width: 100%; height: auto; }
svg rect { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke; }
rect.object { stroke: #1b5fd0; stroke-dasharray: 5 4; }
rect.right { stroke: #1a9641; }
rect.wrong { stroke: #d7301f; }
svg text { stroke: #fff; stroke-width: .22em; paint-order: stroke; font-weight: 700; }
text.right { fill: #14692b; }
text.wrong { fill: #a8330a; }
.images { display: grid; gap: .8rem; margin: .6rem 0; grid-template-columns: repeat(4, 1fr); }
.sentence { margin: .7rem 0; padding-left: .8rem; border-left: 3px solid var(--line);
  break-inside: avoid; }
.sentence dt { margin: .2rem 0 0; font-size: .8rem; font-weight: 400; color: var(--soft); }
.examples { display: grid; gap: .6rem; padding: 0; list-style: none; margin: .4rem 0;
  grid-template-columns: repeat(auto-fill, minmax(5.4rem, 1fr)); }
.examples li { font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere;
  break-inside: avoid; }
.meaning .soft, .examples .soft { font-size: inherit; }
.examples img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #f2f2f2;
  image-rendering: pixelated; border: 1px solid var(--line); display: block; margin-bottom: .2rem; }
code { font-size: .82rem; overflow-wrap: anywhere; white-space: pre-wrap; color: var(--soft); }
dt { font-weight: 600; margin-top: .6rem; overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; }
h4 { font-size: 1rem; margin: 1.1rem 0 .3rem; }
h1, h2, h3, h4, figcaption { overflow-wrap: anywhere; }
h2, h3, h4 { break-after: avoid; }
tr { break-inside: avoid; }
@media (max-width: 48rem) { .images { grid-template-columns: repeat(2, 1fr); } }
@media (max-width: 30rem) {
  body { padding: 1rem .8rem 2rem; font-size: 15px; }
  th, td { padding: .3rem .3rem; }
  table { font-size: .82rem; }
  th small, td small { font-size: .88em; }
}
@page { margin: 14mm 12mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide { overflow: visible; }
  table { font-size: 8.5pt; }
  th, td { padding: .22rem .4rem; }
  details::details-content { content-visibility: visible; block-size: auto; }
  .figures, .tables { grid-template-columns: 1fr 1fr; }
  .images { grid-template-columns: repeat(4, 1fr); }
  .examples img, svg { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>"""
    + _STYLE
    + """</style>
</head>
<body>
$body
</body>
</html>
"""
)
