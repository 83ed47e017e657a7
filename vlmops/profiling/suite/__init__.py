"""What `pytest --benchmark` measures: cases (listed by the files of benchmarks/), peers, interleaved groups, the report."""

from vlmops.profiling.suite.cases import Case
from vlmops.profiling.suite.models import Model

__all__ = ["Case", "Model"]
