"""Size and speed of `pskd.PredictionMemory` in its forms.

Batches of 4,096 rows, in runs of 32 that lie side by side, as the tokens of a sentence do, at
random places. A file takes its whole size on the disk, twice for a moment: 130 million rows of 65
bytes, the target tokens of WMT14 English-German, are 8.5 GB an epoch.

    python benchmarks/prediction_memory.py [--rows 1000000 ...] [--folder FOLDER]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from _measuring import at_least, machine, markdown, options, resident_bytes, seconds

from pskd import PredictionMemory, TopK

BATCH, RUN = 4096, 32
#: Classes, k (None: dense), dtype, and whether in a file.
FORMS = {
    "dense, 100 classes, float16, RAM": (100, None, torch.float16, False),
    "top 16 of 32,768, float16, RAM": (32768, 16, torch.float16, False),
    "top 16 of 32,768, float16, file": (32768, 16, torch.float16, True),
    "top 64 of 32,768, float16, file": (32768, 64, torch.float16, True),
    "top 16 of 100,000, float32, file": (100_000, 16, torch.float32, True),
}
HEAD = [
    "rows", "form", "bytes a row", "GB an epoch", "M rows/s written", "M rows/s read",
    "s between epochs", "MB of RAM added",
]  # fmt: skip
LARGE = 10_000_000  # rows from which only the form that is meant for them is measured


def random_rows(rows: int) -> torch.Tensor:
    starts = torch.randint(rows - RUN, (BATCH // RUN,))
    return (starts[:, None] + torch.arange(RUN)).flatten()


def predictions(classes: int, k: int | None) -> torch.Tensor | TopK:
    probs = torch.rand(BATCH, k or classes)
    probs /= probs.sum(dim=1, keepdim=True)
    if k is None:
        return probs
    indices = torch.stack([torch.randperm(classes)[:k] for _ in range(64)])
    return TopK(indices.repeat(BATCH // 64, 1), probs.sort(dim=1, descending=True).values)


def median_seconds(function, calls: int) -> float:
    return statistics.median(seconds(function, "cpu") for _ in range(calls))


def line_of(rows: int, form: str, folder: str, batches: int) -> list[str]:
    classes, k, dtype, in_file = FORMS[form]
    with tempfile.TemporaryDirectory(dir=folder) as path:
        memory = PredictionMemory(
            rows, classes, top_k=k, dtype=dtype, path=path if in_file else None
        )
        probs, before = predictions(classes, k), resident_bytes()
        memory.next_epoch()
        written = median_seconds(lambda: memory.write(random_rows(rows), probs), batches)
        turned = seconds(memory.next_epoch, "cpu")
        read = median_seconds(lambda: memory.read(random_rows(rows)), batches)
        grown = resident_bytes() - before
        memory.close()
    return [
        f"{rows:,}", form, f"{memory.bytes_per_row}", f"{rows * memory.bytes_per_row / 1e9:.2f}",
        f"{BATCH / written / 1e6:.2f}", f"{BATCH / read / 1e6:.2f}", f"{turned:.1f}",
        f"{grown / 1e6:.0f}",
    ]  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--rows", type=at_least(RUN + 1), nargs="+", default=[1_000_000, 130_000_000]
    )
    parser.add_argument("--folder", default=".", help="where the files are made and removed")
    parser.add_argument("--batches", type=at_least(1), default=500)
    args = parser.parse_args()
    if not Path(args.folder).is_dir():
        parser.error(f"--folder: expected a folder that is there, got {args.folder}")
    torch.manual_seed(1)
    print(f"{machine('cpu')}, torch {torch.__version__}, batches of {BATCH:,} rows")
    lines = []
    for rows in args.rows:
        for form in FORMS:
            if rows < LARGE or form == "top 16 of 32,768, float16, file":
                print(f"{rows:,} rows, {form} ...", file=sys.stderr, flush=True)
                lines.append(line_of(rows, form, args.folder, args.batches))
    print(markdown(HEAD, lines))


if __name__ == "__main__":
    main()
