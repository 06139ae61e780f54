"""The tour: every layer's stage on this machine, bottom to top, ending in one HTML report.

A layer registers its stage as an entry point of the group `jaxinfra.tour`, named so that names sort
into the order of the stack ("20-train"): a function `stage(tour: Tour) -> None`.
"""

from jaxinfra.tour.report import Report, Section
from jaxinfra.tour.shell import Tour, run

__all__ = ["Report", "Section", "Tour", "run"]
