"""Every call, and every message of a push, with its answer lost: the reported outcome is right, and nothing is sent twice."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
import unittest
from pathlib import Path

import grpc
import numpy as np
from fake_sidecar import FakeSidecar, FakeWeights, Proxy
from support import eventually, own_files

import rollout
from rollout import RolloutError, RolloutTimeoutError, UnavailableError, UpdateOutcome, WeightDigestError, WeightUpdateFailed
from rollout import _wire as wire
from rollout.weights.digest import xxhash

PATIENCE = 60
TRANSPORTS = ("shared_memory", "inline", "file")
VALUES = (np.arange(700_000) % 251).astype(np.float32)  # bfloat16 holds them
WEIGHTS = {"a": VALUES.reshape(700, 1000)}  # more than one chunk
SENT = (VALUES.view(np.uint32) >> 16).astype("<u2").tobytes()

CALLS = {
    "Status": lambda client, **limit: client.status(**limit),
    "Pause": lambda client, **limit: client.pause("wait", owner="me", lease=9, **limit),
    "Resume": lambda client, **limit: client.resume(**limit),
    "Sleep": lambda client, **limit: client.sleep(**limit),
    "WakeUp": lambda client, **limit: client.wake_up(**limit),
    "Describe": lambda client, **limit: client.describe(**limit),
    "Score": lambda client, **limit: client.score([1, 2], **limit),
    "Abort": lambda client, **limit: client.abort(["a"], **limit),
    "GenerateBatch": lambda client, **limit: client.generate([[1, 2]], n=2, **limit),
}


class Cut(Exception):
    """Ends the fake's side of a call."""


class LostTests(unittest.TestCase):
    """A fake sidecar behind a proxy that can cut the connection."""

    def connect(self, *, resolve_within: float = 30.0):
        folder = tempfile.mkdtemp(prefix="rollout-test-")
        self.addCleanup(shutil.rmtree, folder)
        weights = FakeWeights()
        fake = FakeSidecar(
            f"{folder}/fake", weights.update, self.samples, status=weights.status, describe=weights.describe, pause=wire.PauseReply(),
            resume=wire.ResumeReply(state=2), sleep=wire.SleepReply(state=6), wake_up=wire.WakeUpReply(state=2), score=wire.ScoreReply(),
            abort=wire.AbortReply())
        self.addCleanup(fake.stop)
        proxy = Proxy(f"{folder}/proxy", f"{folder}/fake")
        self.addCleanup(proxy.close)
        client = rollout.Rollout(proxy.address)
        client._publisher.resolve_within = resolve_within
        self.addCleanup(client.close)
        return fake, weights, proxy, client

    @staticmethod
    def samples(requests):
        for request in requests:
            for i in range(request.n):
                chunk = {"index": i, "ids": [5], "logprobs": [-1], "sampling_logprobs": [-2], "finish_reason": 1}
                yield wire.GenerateReply(request_id=request.request_id, seed=1, prompt={}, samples=[chunk])


class LostCallTests(LostTests):
    def setUp(self) -> None:
        self.fake, _, self.proxy, self.client = self.connect()

    def unavailable(self, call, called: int) -> UnavailableError:
        self.fake.calls.clear()
        with self.assertRaises(UnavailableError) as error:
            CALLS[call](self.client, timeout=PATIENCE)
        self.assertEqual(self.fake.calls[call], called)
        # A lost connection is re-established, also for a call made while gRPC waits to retry.
        self.fake.arrived = self.fake.done = None
        self.proxy.deaf = False
        self.client.wait_until_ready(PATIENCE)
        CALLS[call](self.client, timeout=PATIENCE)
        return error.exception

    def cut(self, *_) -> None:
        self.proxy.cut()
        raise Cut

    def test_a_request_that_never_arrived_is_unavailable(self) -> None:
        for call in CALLS:
            with self.subTest(call):
                self.proxy.cut()
                self.proxy.deaf = True
                self.unavailable(call, 0)

    def test_a_request_that_arrived_is_not_sent_twice_when_its_answer_is_lost(self) -> None:
        def refused(_, context):
            context.abort(grpc.StatusCode.UNAVAILABLE, "the engine has failed")

        for call in CALLS:
            for how in ("before it is done", "after it is done", "by an error of its own"):
                if call == "GenerateBatch" and how == "after it is done":
                    continue  # see below
                with self.subTest(call, how=how):
                    if how == "before it is done":
                        self.fake.arrived = lambda method, _, call=call: self.cut() if method == call else None
                    elif how == "after it is done":
                        self.fake.done = lambda method, _, call=call: self.cut() if method == call else None
                    else:
                        self.fake.arrived = lambda method, context, call=call: refused(method, context) if method == call else None
                    error = self.unavailable(call, 1)
                    if how == "by an error of its own":
                        self.assertIn("the engine has failed", str(error))

    def test_a_stream_that_is_cut_after_the_first_sample_is_not_taken_for_whole(self) -> None:
        def one(requests):
            samples = self.samples(requests)
            yield next(samples)
            if self.fake.calls["GenerateBatch"] == 1:
                self.cut()
            yield next(samples)

        self.fake._streams["GenerateBatch"] = (one, *self.fake._streams["GenerateBatch"][1:])
        self.unavailable("GenerateBatch", 1)

    def test_an_answer_that_does_not_come_is_a_timeout_and_the_sidecar_is_told(self) -> None:
        released, told = threading.Event(), []
        self.addCleanup(released.set)

        def hang(method, context):
            context.add_callback(lambda: told.append(method))
            released.wait(PATIENCE)

        self.fake.arrived = hang
        errors = self.at_once(timeout=1.5)
        for call, error in errors.items():
            self.assertIsInstance(error, RolloutTimeoutError, call)
        eventually(lambda: sorted(told) == sorted(CALLS), "the sidecar is told of each", PATIENCE)

    def test_closing_the_client_ends_every_call_that_waits(self) -> None:
        released = threading.Event()
        self.addCleanup(released.set)
        self.fake.arrived = lambda *_: released.wait(PATIENCE)
        closing = threading.Thread(target=lambda: (
            eventually(lambda: sum(self.fake.calls.values()) == len(CALLS), "all have arrived", PATIENCE), self.client.close()))
        closing.start()
        errors = self.at_once(timeout=PATIENCE)
        closing.join(PATIENCE)
        for call, error in errors.items():
            self.assertIsInstance(error, RolloutError, call)
            self.assertNotIsInstance(error, RolloutTimeoutError, call)

    def at_once(self, timeout: float) -> dict[str, BaseException | None]:
        """All calls, each on a thread of its own: what each of them raised."""
        errors: dict[str, BaseException | None] = {}

        def run(name):
            try:
                CALLS[name](self.client, timeout=timeout)
                errors[name] = None
            except BaseException as error:
                errors[name] = error

        threads = [threading.Thread(target=run, args=[name]) for name in CALLS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(set(errors), set(CALLS), "some are still waiting")
        return errors


class LostPushTests(LostTests):
    def break_at(self, transport: str, mode: str, at: str, how: str) -> None:
        fake, weights, proxy, client = self.connect()
        weights.mode = 2 if mode == "in_place" else 1

        def breaks(step, request):
            last = step != "chunk" or request.chunk.offset + len(request.chunk.data) == weights.begun[-1].payload_bytes
            payload = step in ("chunk", "shared_memory", "file") and (at == "first" or last)
            here = {"begin": step == "begin", "commit": step == "commit"}.get(at, payload)
            if not here:
                return
            if how == "hang":
                released.wait(PATIENCE)
                raise Cut
            if how != "error":
                proxy.cut()
            raise Cut

        released = threading.Event()
        self.addCleanup(released.set)
        setattr(weights, "done" if how == "after" else "arrived", breaks)
        served = 7
        push = {"transport": transport, "mode": mode, "timeout": 2 if how == "hang" else PATIENCE}
        if transport == "file":
            push["folder"] = Path(proxy.address.removeprefix("unix:")).parent
        if at == "commit" and how == "after":
            result = client.push_weights(WEIGHTS, **push)
            served = 8
            self.assertEqual((result.version, result.confirmed_by_status, result.mode), (8, True, mode))
        elif at == "begin":
            with self.assertRaises(RolloutTimeoutError if how == "hang" else RolloutError if how == "error" else UnavailableError) as error:
                client.push_weights(WEIGHTS, **push)
            self.assertNotIsInstance(error.exception, WeightUpdateFailed)  # it was not begun
        else:
            if how == "hang":  # it has dropped the update at its deadline
                fake.done = lambda method, _: released.set() if method == "Status" else None
            with self.assertRaises(WeightUpdateFailed) as failed:
                client.push_weights(WEIGHTS, **push)
            # In place, the old weights are lost when the payload's first message has been handled.
            first = at == "first" or at == "last" and transport != "inline"
            lost = mode == "in_place" and (how == "after" or not first)
            self.assertEqual(weights.poisoned, lost)
            self.assertIs(failed.exception.outcome, UpdateOutcome.POISONED if lost else UpdateOutcome.NOT_COMMITTED)
        released.set()
        self.assertEqual((weights.version, fake.calls["Update"]), (served, 1))
        weights.arrived = weights.done = None
        eventually(lambda: not weights.updating, "the fake has let go", PATIENCE)
        client.wait_until_ready(PATIENCE)
        self.assertEqual(client.push_weights(WEIGHTS, **{**push, "timeout": PATIENCE}).version, served + 1)
        self.assertTrue(weights.tensors["a"] == SENT, "other bytes have arrived")
        self.assertFalse(weights.poisoned)
        client.close()

    def test_wherever_a_push_breaks_its_outcome_is_true_and_the_next_one_goes_on_from_what_is_served(self) -> None:
        for case in itertools.product(
                TRANSPORTS, ("staged", "in_place"), ("begin", "first", "last", "commit"), ("before", "after", "error")):
            with self.subTest(" ".join(case)):
                self.break_at(*case)
        self.assertEqual(own_files(), [])

    def test_a_sidecar_that_hangs_at_any_message_costs_no_more_than_the_timeout(self) -> None:
        for case in itertools.product(TRANSPORTS, ("staged",), ("begin", "last", "commit"), ("hang",)):
            with self.subTest(" ".join(case)):
                self.break_at(*case)

    def test_while_the_sidecar_has_not_decided_it_is_asked_again(self) -> None:
        """Its status replies, from the first call on; the last one repeats."""
        undecided, committed, old = {"version": 7, "updating": True}, {"version": 8}, {"version": 7}
        poisoned, overtaken, restarted, gone = {"version": 7, "state": 7}, {"version": 12}, {"version": 0}, None
        for said, expected in (
            ([undecided] * 3 + [committed], "committed"), ([undecided] * 3 + [old], "not committed"), ([undecided, poisoned], "poisoned"),
            ([gone, gone, undecided, gone, committed], "committed"), ([gone, old], "not committed"), ([undecided, overtaken], "unknown"),
            ([gone, restarted], "unknown"),  # it serves its checkpoint again: neither the old weights nor the new
        ):
            with self.subTest(f"{len(said)} answers, {expected}"):
                fake, weights, proxy, client = self.connect()
                asked = []

                def says(said=said, asked=asked):
                    asked.append(said[min(len(asked), len(said) - 1)])
                    if asked[-1] is None:
                        proxy.cut()
                        raise Cut
                    return wire.StatusReply(**{"state": 2, **asked[-1]})

                def breaks(step, _, says=says, weights=weights, proxy=proxy):
                    if step == "commit":
                        weights.says = says
                        proxy.cut()
                        raise Cut

                setattr(weights, "done" if expected == "committed" else "arrived", breaks)
                if expected == "committed":
                    self.assertTrue(client.push_weights(WEIGHTS).confirmed_by_status)
                else:
                    with self.assertRaises(WeightUpdateFailed) as failed:
                        client.push_weights(WEIGHTS)
                    self.assertEqual(failed.exception.outcome.value, expected)
                self.assertEqual(asked[: len(said)], said)

    def test_a_sidecar_that_never_decides_is_asked_no_longer_than_it_takes(self) -> None:
        for answers in (True, False):
            with self.subTest(answers=answers):
                fake, weights, proxy, client = self.connect(resolve_within=0.5)
                released = threading.Event()
                self.addCleanup(released.set)

                def breaks(step, _, fake=fake, weights=weights, proxy=proxy, answers=answers, released=released):
                    if step == "commit":
                        weights.says = lambda: wire.StatusReply(state=2, version=7, updating=True)
                        fake.arrived = None if answers else lambda *_: released.wait(PATIENCE)
                        proxy.cut()
                        raise Cut

                weights.arrived = breaks
                with self.assertRaisesRegex(WeightUpdateFailed, "did not say within 0.5 s whether version 8 is served") as failed:
                    client.push_weights(WEIGHTS)
                self.assertIs(failed.exception.outcome, UpdateOutcome.UNKNOWN)

    def test_a_version_that_was_replaced_while_its_digests_were_asked_for_is_not_claimed(self) -> None:
        fake, weights, proxy, client = self.connect()

        def breaks(step, _):
            if step == "commit":
                fake.done = replaced
                proxy.cut()
                raise Cut

        def replaced(method, _):
            if method == "Status":  # right after it has reported 8
                weights.version, weights.tensors["a"] = 12, b"\0\0"

        weights.done = breaks
        with self.assertRaises(WeightUpdateFailed) as failed:
            client.push_weights(WEIGHTS)
        self.assertIs(failed.exception.outcome, UpdateOutcome.UNKNOWN)

    def test_digests_of_a_sparse_push_are_not_compared_with_what_is_described(self) -> None:
        """The sidecar describes whole tensors."""
        _, weights, proxy, client = self.connect()

        def breaks(step, _):
            if step == "commit":
                weights.tensors["b"] = bytes(2000)
                proxy.cut()
                raise Cut

        weights.done = breaks
        sparse = rollout.SparseTensor((1000,), np.array([3, 7]), np.array([1, 2], np.float32))
        result = client.push_weights({**WEIGHTS, "b": sparse}, partial=True)
        self.assertEqual((result.version, result.confirmed_by_status, result.digest), (8, True, ""))

    @unittest.skipIf(xxhash is None, "xxhash is not installed")
    def test_digests_of_another_algorithm_are_not_compared(self) -> None:
        _, weights, proxy, client = self.connect()
        weights.digest_algorithm = "xxh3-128-tree-4096"

        def breaks(step, _):
            if step == "commit":
                proxy.cut()
                raise Cut

        weights.done = breaks
        with self.assertRaisesRegex(WeightUpdateFailed, "'xxh3-128-tree-4096', this client as 'xxh3-128-tree-131072'") as failed:
            client.push_weights(WEIGHTS)
        self.assertNotIsInstance(failed.exception, WeightDigestError)
        self.assertIs(failed.exception.outcome, UpdateOutcome.UNKNOWN)
        self.assertEqual(client.describe().digest_algorithm, "xxh3-128-tree-4096")

    def test_digests_that_cannot_be_asked_for_at_once_are_asked_for_again(self) -> None:
        fake, weights, proxy, client = self.connect()

        def breaks(step, _):
            if step == "commit":
                fake.arrived = lost
                proxy.cut()
                raise Cut

        def lost(method, _):
            if method == "Describe" and fake.calls["Describe"] < 3:
                proxy.cut()
                raise Cut

        weights.done = breaks
        result = client.push_weights(WEIGHTS)
        self.assertEqual((result.version, result.confirmed_by_status, fake.calls["Describe"]), (8, True, 3))

    def test_a_client_that_is_closed_while_it_waits_for_the_commit_does_not_know(self) -> None:
        fake, weights, proxy, client = self.connect()
        released = threading.Event()
        self.addCleanup(released.set)
        threads = []

        def closes(step, _):
            if step == "commit":
                threads.append(threading.Thread(target=client.close))
                threads[0].start()
                released.wait(PATIENCE)

        weights.arrived = closes
        with self.assertRaises(WeightUpdateFailed) as failed:
            client.push_weights(WEIGHTS)
        self.assertIs(failed.exception.outcome, UpdateOutcome.UNKNOWN)
        released.set()
        threads[0].join(PATIENCE)
        self.assertFalse(threads[0].is_alive())

    def test_pushes_build_on_what_is_served_whatever_became_of_those_before(self) -> None:
        fake, weights, proxy, client = self.connect(resolve_within=0.2)

        def status_calls(push) -> int:
            before = fake.calls["Status"]
            push()
            return fake.calls["Status"] - before

        def fails(step, _):
            if step == "commit":
                raise Cut

        def base() -> int:
            return weights.begun[-1].base_version

        good = lambda **more: client.push_weights(WEIGHTS, transport="inline", **more)  # noqa: E731
        self.assertEqual((status_calls(good), base()), (1, 7))  # the first asks
        self.assertEqual((status_calls(good), base()), (0, 8))  # the next one does not need to
        self.assertEqual((status_calls(lambda: good(version=20)), base(), weights.version), (0, 9, 20))
        self.assertEqual((status_calls(good), base()), (0, 20))
        weights.version = 30  # another trainer's
        with self.assertRaises(rollout.WeightUpdateRejected):
            good()
        self.assertEqual((status_calls(good), base(), weights.version), (1, 30, 31))
        weights.arrived = fails
        with self.assertRaises(WeightUpdateFailed):
            good()
        weights.arrived = None
        weights.version = 40
        self.assertEqual((status_calls(good), base(), weights.version), (1, 40, 41))
        with self.assertRaises(rollout.WeightUpdateRejected):
            good(base_version=40)
        self.assertEqual((status_calls(good), base(), weights.version), (1, 41, 42))


if __name__ == "__main__":
    unittest.main()
