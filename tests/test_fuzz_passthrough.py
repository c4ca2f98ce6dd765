"""The fuzzer of fuzz_passthrough.py for two seconds, and that it sees what is wrong."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
from fuzz_passthrough import (
    RULES,
    Commands,
    Disagreement,
    Mask,
    Setting,
    Tally,
    fuzz,
    good_commands,
    judge,
    settings,
)


def test_two_seconds() -> None:
    """Every rule was broken, and good commands were taken."""
    tally = Tally()
    fuzz(2, random.randrange(2**31), tally)
    assert tally.accepted > 1000
    assert set(tally.refused) == set(RULES)
    assert tally.commands > 10_000


@pytest.fixture
def setting() -> Iterator[Setting]:
    with settings() as made:
        yield made[0]


@pytest.fixture
def commands(setting: Setting) -> Commands:
    return good_commands(setting, 40, np.random.default_rng(1))


def test_good_commands_are_good(setting: Setting, commands: Commands) -> None:
    tally = Tally()
    judge(setting, commands, lambda: 7, tally)
    assert (tally.accepted, tally.calls) == (40, 6)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_the_package_has_not(
    setting: Setting, commands: Commands, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is accepted (by the decoder, for rules of the format) is reported."""
    known = Setting.broken_rules

    def stricter(self: Setting, given: Commands) -> dict[str, Mask]:
        broken = known(self, given)
        broken[rule][23] = True
        return broken

    monkeypatch.setattr(Setting, "broken_rules", stricter)
    with pytest.raises(Disagreement, match=r"command 23 was accepted|decoder takes command 23"):
        judge(setting, commands, lambda: 40, Tally())


BREAKING = {
    "opcode": ("opcode", 1),
    "reserved": ("reserved", 1),
    "count": ("last", 65536),
    "nsid": ("nsid", 4),
    "capacity": ("lba", 1000),
    "length": ("last", 128),
    "alignment": ("address", None),
    "destination": ("address", 0),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_the_fuzzer_has_not(
    setting: Setting, commands: Commands, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that is refused for no reason is reported, and one for a wrong reason."""
    known = Setting.broken_rules
    name, value = BREAKING[rule]
    if name == "reserved":
        commands.view(np.uint8).reshape(-1, 64)[23, 63] = value
    else:
        commands[name][23] = value if value is not None else commands[name][23] + 2
    judge(setting, commands, lambda: 40, Tally())

    def laxer(self: Setting, given: Commands) -> dict[str, Mask]:
        broken = known(self, given)
        broken[rule] = np.zeros_like(broken[rule])
        return broken

    monkeypatch.setattr(Setting, "broken_rules", laxer)
    with pytest.raises(Disagreement, match=r"refuse|expected an error"):
        judge(setting, commands, lambda: 40, Tally())
