"""Runs all tests here; prints one JSON line a test, {"test", "outcome", "message", "seconds"}, for PythonTests.cs to report as its own.

Classes, and the tests of a class, run in an order shuffled with a seed, a new one in each run: no test may depend on another. A failure
names the seed; `run.py --seed N` repeats its order, and `run.py test_push test_failures.SharedMemoryTests` runs some.

For people: python3 -m unittest discover tests/python
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import unittest
from collections.abc import Iterator
from pathlib import Path


class JsonLines(unittest.TestResult):
    """The worst outcome of a test counts: a failed subtest fails the test."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed = seed

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._outcome, self._messages, self._started = "passed", [], time.monotonic()

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
        if self._outcome == "failed":
            self._messages.append(f"in the order of run.py --seed {self._seed}")
        self._print(test.id(), self._outcome, "\n".join(self._messages), time.monotonic() - self._started)

    def addError(self, test: unittest.TestCase, err) -> None:
        super().addError(test, err)
        self._failed(test, self.errors[-1][1])

    def addFailure(self, test: unittest.TestCase, err) -> None:
        super().addFailure(test, err)
        self._failed(test, self.failures[-1][1])

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err) -> None:
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._failed(test, f"{subtest}: {self._exc_info_to_string(err, subtest)}")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        super().addSkip(test, reason)
        if not isinstance(test, unittest.TestCase):  # a class or module that its setUp skips
            self._print(str(test), "skipped", reason, 0)
        elif self._outcome != "failed":  # a skipped subtest does not hide a failed one
            self._outcome, self._messages = "skipped", [reason]

    def _failed(self, test: unittest.TestCase, message: str) -> None:
        self._outcome = "failed"
        if isinstance(test, unittest.TestCase):
            self._messages.append(message)
        else:  # setUpClass, or a file that cannot be imported: its tests have no line
            print(message, file=sys.stderr)

    @staticmethod
    def _print(test: str, outcome: str, message: str, seconds: float) -> None:
        print(json.dumps({"test": test, "outcome": outcome, "message": message, "seconds": seconds}), flush=True)


def tests_of(suite: unittest.TestSuite) -> Iterator[unittest.TestCase]:
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from tests_of(test)
        else:
            yield test


def shuffled(suite: unittest.TestSuite, seed: int) -> unittest.TestSuite:
    """Classes stay together: what their tests share is made once."""
    classes: dict[tuple[str, str], list[unittest.TestCase]] = {}
    for test in sorted(tests_of(suite), key=lambda test: test.id()):
        classes.setdefault((type(test).__module__, type(test).__qualname__), []).append(test)
    order = random.Random(seed)
    groups = list(classes.values())
    order.shuffle(groups)
    for group in groups:
        order.shuffle(group)
    return unittest.TestSuite(unittest.TestSuite(group) for group in groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="of the order; a new one unless given")
    parser.add_argument("tests", nargs="*", help="files, classes or tests, as unittest names them; all unless given")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    loader = unittest.defaultTestLoader
    found = loader.loadTestsFromNames(arguments.tests) if arguments.tests else loader.discover(str(Path(__file__).parent))
    print(f"seed {arguments.seed}", file=sys.stderr)
    shuffled(found, arguments.seed).run(JsonLines(arguments.seed))


if __name__ == "__main__":
    main()
