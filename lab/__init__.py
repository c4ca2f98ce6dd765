"""The lab: a virtual machine with NVMe drives and peer memory, for tests of gdsdirect."""

from lab.drives import Drive
from lab.errors import LabError
from lab.machine import KERNEL_PROBLEM, TIMEOUT, Result, run
from lab.trace import TraceRead

__all__ = ["KERNEL_PROBLEM", "TIMEOUT", "Drive", "LabError", "Result", "TraceRead", "run"]
