"""Last epoch's predictions by row: records, their tables and files, and processes' exchange."""

from pskd.memory.predictions import PredictionMemory as PredictionMemory

__all__ = ["PredictionMemory"]
