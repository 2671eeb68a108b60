"""The page's frame and its looks: no script, no font and no image from elsewhere."""

from __future__ import annotations

from string import Template

__all__ = ["PAGE"]

_STYLE = """
:root { color-scheme: light; --ink: #222; --soft: #595959; --line: #d4d4d4; --best: #e3f1e4; }
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
th, td { padding: .35rem .5rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
td, thead th { white-space: nowrap; }
thead th { vertical-align: bottom; }
.groups td, .groups th { border-bottom: 0; padding-bottom: 0; }
th { font-weight: 600; }
table small { display: block; font-weight: 400; font-size: .8rem; color: var(--soft); }
th[scope=row], .text { text-align: left; }
th[scope=row] { overflow-wrap: break-word; min-width: 6rem; max-width: 15rem; }
th[scope=colgroup] { text-align: center; border-left: 1px solid var(--line); }
.first { border-left: 1px solid var(--line); }
.best { background: var(--best); font-weight: 700; }
.meaning td { white-space: normal; }
.figures { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: flex-start; margin: .8rem 0; }
figure { margin: 0; max-width: 100%; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; }
.narrow { width: 23.6rem; }
.broad { width: 36rem; overflow-x: auto; }
.broad img { min-width: 26rem; }
.examples { display: flex; flex-wrap: wrap; gap: .7rem; padding: 0; list-style: none;
  margin: .4rem 0; }
.examples li { width: 6.6rem; font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere;
  break-inside: avoid; }
.meaning .soft, .examples .soft { font-size: inherit; }
.examples img { width: 100%; height: 6.6rem; object-fit: contain; background: #f2f2f2;
  image-rendering: pixelated; border: 1px solid var(--line); display: block; margin-bottom: .2rem; }
code { font-size: .82rem; overflow-wrap: anywhere; white-space: pre-wrap; color: var(--soft); }
dt { font-weight: 600; margin-top: .6rem; overflow-wrap: anywhere; }
dd { margin: 0; overflow-wrap: anywhere; }
h1, h2, h3, figcaption { overflow-wrap: anywhere; }
h2, h3 { break-after: avoid; }
tr { break-inside: avoid; }
@media (max-width: 30rem) { body { padding: 1rem .8rem 2rem; font-size: 15px; } }
@page { margin: 14mm 12mm; }
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  .wide { overflow: visible; }
  table { font-size: 8pt; }
  th, td { padding: .22rem .32rem; }
  .best, .examples img { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .narrow { width: 43%; }
  .broad { width: 66%; overflow: visible; }
  .broad img { min-width: 0; }
  .figures { display: block; }
  figure { margin-bottom: 4mm; }
  .figures .narrow { display: inline-block; vertical-align: top; margin-right: 3%; }
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
