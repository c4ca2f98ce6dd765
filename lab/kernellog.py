"""Signs of trouble in a kernel's log."""

import re

# The time, and on some kernels the task, go before each message.
_STAMP = r"(?:\[[ \d.]+\](?:\[[ TC\d]+\])? )?"
_ANYWHERE = r".*\b(?:BUG:|kernel BUG at|Oops:|KASAN:|KCSAN:|UBSAN:|general protection fault)"
_AT_THE_START = (
    r"WARNING: |Call Trace:|Kernel panic|Internal error|Unable to handle kernel"
    r"|INFO: (?:task|rcu|possible) |rcu: INFO: |refcount_t: |list_(?:add|del) corruption"
)
_PROBLEM = re.compile(f"{_STAMP}(?:{_ANYWHERE}|{_AT_THE_START})")


def problems(log: str) -> tuple[str, ...]:
    """The lines of a kernel log that no healthy kernel writes."""
    return tuple(line for line in log.splitlines() if _PROBLEM.match(line))
