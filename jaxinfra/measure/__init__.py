"""The only clock of the project: what was timed, how often, under which conditions, against whom.

from jaxinfra.measure import compare, stages, time
print(compare({"ours": f, "theirs": g}).verdict())
"""

from jaxinfra.measure.clock import Sample, Stages, compiles, stages, time
from jaxinfra.measure.compare import Comparison, compare
from jaxinfra.measure.environment import environment
from jaxinfra.measure.ledger import Entry, read_all, write
from jaxinfra.measure.structure import Cost, Memory, collectives, cost, flops, memory

__all__ = [
    "Comparison",
    "Cost",
    "Entry",
    "Memory",
    "Sample",
    "Stages",
    "collectives",
    "compare",
    "compiles",
    "cost",
    "environment",
    "flops",
    "memory",
    "read_all",
    "stages",
    "time",
    "write",
]
