"""How many examples a property test draws: its own number in the default run, ``FUSEWIRE_TEST_EFFORT`` times as many in ``make test-all``."""

import os

EFFORT = int(os.environ.get("FUSEWIRE_TEST_EFFORT", "1"))


def examples(count: int) -> int:
    return count * EFFORT
