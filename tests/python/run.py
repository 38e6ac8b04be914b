"""Runs all tests here; prints one JSON line a test, {"test", "outcome", "message", "seconds"}, for PythonTests.cs to report as its own.

For people: python3 -m unittest discover tests/python
"""

from __future__ import annotations

import json
import sys
import time
import unittest
from pathlib import Path


class JsonLines(unittest.TestResult):
    """Of one test the worst outcome counts: a subtest that fails fails it."""

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self._outcome, self._messages, self._started = "passed", [], time.monotonic()

    def stopTest(self, test: unittest.TestCase) -> None:
        super().stopTest(test)
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
        self._outcome, self._messages = "skipped", [reason]
        if not isinstance(test, unittest.TestCase):  # a class or module that its setUp skips
            self._print(str(test), "skipped", reason, 0)

    def _failed(self, test: unittest.TestCase, message: str) -> None:
        self._outcome = "failed"
        if isinstance(test, unittest.TestCase):
            self._messages.append(message)
        else:  # setUpClass, or a file that cannot be imported: its tests have no line
            print(message, file=sys.stderr)

    @staticmethod
    def _print(test: str, outcome: str, message: str, seconds: float) -> None:
        print(json.dumps({"test": test, "outcome": outcome, "message": message, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    tests = unittest.defaultTestLoader.discover(str(Path(__file__).parent))
    tests.run(JsonLines())
