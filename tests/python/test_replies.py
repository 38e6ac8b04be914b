"""Conversion of the sidecar's replies to samples, scores, states and errors, with every field in its place and of its type."""

from __future__ import annotations

import random
import tempfile
import threading
import unittest
from pathlib import Path

import grpc
import numpy as np
from fake_sidecar import FakeSidecar

import rollout
from rollout import BatchError, BusyError, RequestError, Rollout, RolloutError, RolloutTimeoutError, StateError, UnavailableError
from rollout import _wire as wire
from rollout.address import target
from rollout.errors import from_status
from rollout.generation import Batch


def chunk(index=0, ids=(5,), **more):
    fields = {"logprobs": [-float(i) for i in ids], "sampling_logprobs": [-2.0 * i for i in ids], "finish_reason": 1}
    return {"index": index, "ids": ids, **fields, **more}


class SampleTests(unittest.TestCase):
    """A batch of three groups of two."""

    def setUp(self) -> None:
        self.batch = Batch([[1], [2, 3], "text"], 2, [40, None, 2**64 - 1], {"cache_salt": "mine"})
        self.requests = list(self.batch.requests())
        self.ids = [request.request_id for request in self.requests]

    def add(self, group: int, *chunks, **more) -> None:
        self.batch.add(wire.GenerateReply(request_id=self.ids[group], samples=chunks, **more))

    def test_requests_are_made_for_each_prompt(self) -> None:
        self.assertEqual(len(set(self.ids)), 3)
        self.assertEqual([list(request.prompt_ids.ids) for request in self.requests], [[1], [2, 3], []])
        self.assertEqual([request.prompt_text for request in self.requests], ["", "", "text"])
        self.assertEqual([request.HasField("seed") for request in self.requests], [True, False, True])
        self.assertEqual([request.seed for request in self.requests], [40, 0, 2**64 - 1])
        self.assertEqual({(request.n, request.cache_salt, request.stream) for request in self.requests}, {(2, "mine", False)})

    def test_groups_that_interleave_keep_their_own_tokens_seeds_and_prompts(self) -> None:
        order = [(group, index) for group in range(3) for index in range(2)]
        for seed in range(20):
            self.setUp()
            random.Random(seed).shuffle(order)
            heads = set()
            for group, index in order:
                first = 100 * group + 10 * index + 1
                head = {} if group in heads else {
                    "seed": 2**63 + group, "prompt": {"ids": [group], "logprobs": [-0.5 * group], "cached_tokens": 16 * group}}
                heads.add(group)
                ids = list(range(first, first + index + 2))
                versions = [{"version": 2**40, "start": 0, "end": 1}, {"version": 2**40 + 1, "start": 1, "end": len(ids)}]
                top = {"k": 3, "ids": range(3 * len(ids)), "logprobs": [-i / 2 for i in range(3 * len(ids))]}
                reason = {"finish_reason": 5, "error": "why"} if (group, index) == (2, 1) else {"finish_reason": index + 1}
                self.add(group, chunk(index, ids, versions=versions, oldest_kv_version=2**40 - 1, top=top, text=f"{ids}", **reason), **head)
            groups = self.batch.groups()
            self.assertEqual([[sample.index for sample in group] for group in groups], [[0, 1]] * 3)
            for group, index in order:
                sample, first = groups[group][index], 100 * group + 10 * index + 1
                ids = list(range(first, first + index + 2))
                self.assertEqual((sample.request_id, sample.seed), (self.ids[group], 2**63 + group))
                self.assertEqual((sample.ids.tolist(), sample.text), (ids, f"{ids}"))
                self.assertEqual((sample.logprobs.tolist(), sample.sampling_logprobs.tolist()), ([-i for i in ids], [-2 * i for i in ids]))
                self.assertEqual(
                    sample.versions, (rollout.VersionSpan(2**40, 0, 1), rollout.VersionSpan(2**40 + 1, 1, len(ids))))
                self.assertEqual(sample.oldest_kv_version, 2**40 - 1)
                ended = ("error", "why") if (group, index) == (2, 1) else (("stop", "length")[index], "")
                self.assertEqual((sample.finish_reason, sample.error), ended)
                self.assertEqual((sample.prompt.ids.tolist(), sample.prompt.logprobs.tolist()), ([group], [-0.5 * group]))
                self.assertEqual(sample.prompt.cached_tokens, 16 * group)
                self.assertEqual(sample.top.ids.tolist(), np.arange(3 * len(ids)).reshape(-1, 3).tolist())
                self.assertEqual(sample.top.logprobs.tolist(), (-np.arange(3 * len(ids)).reshape(-1, 3) / 2).tolist())
                for array, dtype in (
                    (sample.ids, np.int32), (sample.logprobs, np.float32), (sample.sampling_logprobs, np.float32),
                    (sample.prompt.ids, np.int32), (sample.prompt.logprobs, np.float32), (sample.top.ids, np.int32),
                    (sample.top.logprobs, np.float32)):
                    self.assertEqual(array.dtype, dtype)

    def test_an_aborted_sample_without_a_token_is_a_sample(self) -> None:
        for group in range(3):
            self.add(group, chunk(0, [], finish_reason=3), chunk(1, [7]), seed=1, prompt={})
        first, second = self.batch.groups()[0]
        self.assertEqual((first.finish_reason, first.ids.tolist(), first.ids.dtype), ("abort", [], np.int32))
        self.assertEqual((first.versions, first.top), ((), None))
        self.assertEqual(second.ids.tolist(), [7])

    def test_chunks_that_do_not_fit_are_an_error(self) -> None:
        wrong = (
            [chunk(2)], [chunk(0), chunk(0)], [chunk(0, start=1)], [chunk(0, finish_reason=0)], [chunk(0, logprobs=[])],
            [chunk(0, sampling_logprobs=[1, 2])])
        for chunks in wrong:
            self.setUp()
            with self.subTest(chunks), self.assertRaisesRegex(RolloutError, "does not fit"):
                self.add(0, *chunks, seed=1, prompt={})
        with self.assertRaisesRegex(RolloutError, "does not fit"):  # a group's seed comes with its first reply
            self.add(1, chunk(0))
        with self.assertRaisesRegex(RolloutError, "not in flight"):
            self.batch.add(wire.GenerateReply(request_id="other"))

    def test_a_call_that_ends_before_its_samples_is_an_error_that_names_the_group(self) -> None:
        for group in range(3):
            self.add(group, chunk(0), *([chunk(1)] if group != 1 else []), seed=1, prompt={})
        with self.assertRaisesRegex(RolloutError, "1 of 2 samples") as failed:
            self.batch.groups()
        self.assertEqual(failed.exception.request_id, self.ids[1])

    def test_a_refused_group_costs_no_sample_of_the_others(self) -> None:
        self.add(0, chunk(0), seed=1, prompt={})
        self.add(1, refused={"code": 8, "message": "no room"})
        self.add(2, chunk(0), chunk(1), seed=1, prompt={})
        self.add(0, chunk(1))
        groups = self.batch.groups()
        self.assertEqual([group and len(group) for group in groups], [2, None, 2])
        [refused] = self.batch.refused.values()
        self.assertIsInstance(refused, BusyError)
        self.assertEqual((refused.request_id, refused.code), (self.ids[1], grpc.StatusCode.RESOURCE_EXHAUSTED))


class Connected(unittest.TestCase):
    def connect(self, **replies):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        fake = FakeSidecar(str(Path(folder.name, "s")), **replies)
        self.addCleanup(fake.stop)
        client = Rollout(fake.address)
        self.addCleanup(client.close)
        return fake, client


class StatusTests(Connected):
    def test_every_field_of_the_status_is_reported_under_its_name(self) -> None:
        """Each field has a different value, so that swapped fields are detected."""
        reply = wire.StatusReply(state=4, asleep=[2])
        plain = [field for field in reply.DESCRIPTOR.fields if field.name not in ("state", "asleep", "memory")]
        for number, field in enumerate(reply.memory.DESCRIPTOR.fields):
            setattr(reply.memory, field.name, number + (1 << 40))
        for number, field in enumerate(plain):
            kind = type(field.default_value)
            large = field.cpp_type == field.CPPTYPE_UINT64
            setattr(reply, field.name, f"text {number}" if kind is str else True if kind is bool else number + (1 << 40 if large else 1))
        _, client = self.connect(status=reply)
        status = client.status()
        self.assertEqual((status.state, status.asleep), ("paused", ("kv_cache",)))
        for field in plain:
            self.assertEqual(getattr(status, field.name), getattr(reply, field.name), field.name)
        for field in reply.memory.DESCRIPTOR.fields:
            self.assertEqual(getattr(status.memory, field.name), getattr(reply.memory, field.name), field.name)
        self.assertEqual(len(plain) + 3, len(status.__dataclass_fields__))

    def test_states_keep_their_names_and_one_from_the_future_is_not_taken_for_another(self) -> None:
        names = ["loading", "running", "pausing", "paused", "updating", "sleeping", "poisoned", "faulted"]
        numbers = iter([*range(1, 9), 99])
        _, client = self.connect(status=lambda: wire.StatusReply(state=next(numbers)))
        self.assertEqual([client.status().state for _ in range(9)], [*names, "unknown_99"])

    def test_what_is_asked_for_arrives_as_it_was_meant(self) -> None:
        fake, client = self.connect(
            pause=wire.PauseReply(aborted_samples=3), abort=wire.AbortReply(groups=1, samples=2, unknown=["b"]),
            sleep=wire.SleepReply(state=6), wake_up=wire.WakeUpReply(state=7),
            score=wire.ScoreReply(ids=[4, 5], logprobs=[-1], version=2**40))
        for mode in ("abort", "wait", "keep"):
            self.assertEqual(client.pause(mode, owner="me", lease=1.5), 3)
        self.assertEqual([(r.mode, r.owner, r.lease_milliseconds) for r in fake.requests], [(i, "me", 1500) for i in (1, 2, 3)])
        fake.requests.clear()
        self.assertEqual(client.abort(["a", "b"]), rollout.Aborted(1, 2, ("b",)))
        client.abort([])  # an empty list does not mean all
        client.abort()
        self.assertEqual(
            [(r.WhichOneof("which"), list(r.ids.ids), r.all) for r in fake.requests],
            [("ids", ["a", "b"], False), ("ids", [], False), ("all", [], True)])
        fake.requests.clear()
        for call in (client.sleep, client.wake_up):
            call(["kv_cache"])
            call(["weights", "kv_cache"])
            call()
            with self.assertRaises(ValueError):
                call([])  # on the wire, none means all
            with self.assertRaises(ValueError):
                call(["everything"])
            with self.assertRaises(TypeError):
                call("weights")
        self.assertEqual([list(request.tags) for request in fake.requests], [[2], [1, 2], []] * 2)
        fake.requests.clear()
        score = client.score("text", top=3, cache_salt="mine")
        client.score(np.array([7, 8]))
        self.assertEqual((score.ids.tolist(), score.logprobs.tolist(), score.top, score.version), ([4, 5], [-1], None, 2**40))
        self.assertEqual(
            [(r.text, list(r.ids.ids), r.top, r.cache_salt) for r in fake.requests], [("text", [], 3, "mine"), ("", [7, 8], 0, "")])


class CallTests(Connected):
    def answered(self, requests):
        for request in requests:
            self.asked.append(request)
            samples = [chunk(i) for i in range(request.n)]
            yield wire.GenerateReply(request_id=request.request_id, seed=request.seed, prompt={}, samples=samples)

    def setUp(self) -> None:
        self.asked: list = []

    def test_seeds_count_up_over_the_groups_and_round_the_end(self) -> None:
        _, client = self.connect(batch=self.answered)
        for seed, sent in (
            (7, [7, 8, 9]), (0, [0, 1, 2]), (2**64 - 2, [2**64 - 2, 2**64 - 1, 0]), (np.int64(5), [5, 6, 7]),
            ([9, 0, 2**64 - 1], [9, 0, 2**64 - 1]), (np.array([3, 1, 2]), [3, 1, 2]), (None, [None] * 3),
        ):
            self.asked.clear()
            groups = client.generate([[1]] * 3, n=2, seed=seed)
            self.assertEqual([request.seed if request.HasField("seed") else None for request in self.asked], sent)
            self.assertEqual([[sample.seed for sample in group] for group in groups], [[seed or 0] * 2 for seed in sent])

    def test_every_option_reaches_its_field_and_what_is_left_out_is_absent(self) -> None:
        _, client = self.connect(batch=self.answered)
        client.generate(
            [np.array([1, 2], np.int64)], n=2, max_tokens=5, min_tokens=2, temperature=0.5, top_k=7, top_p=0.25, min_p=0.125,
            logit_bias={3: -np.inf}, seed=1, stop_token_ids=[8, 9], stop=["end"], ignore_eos=True, top_logprobs=6, prompt_logprobs=True,
            return_text=True, max_staleness=0, cache_salt="mine")
        client.generate([[1]])
        given, plain = self.asked
        expected = wire.GenerateRequest(
            request_id=given.request_id, prompt_ids={"ids": [1, 2]}, n=2, seed=1,
            sampling={"temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "logit_bias": {3: -np.inf}},
            stopping={"max_tokens": 5, "min_tokens": 2, "stop_token_ids": [8, 9], "stop_strings": ["end"], "ignore_eos": True},
            top_logprobs=6, prompt_logprobs=True, return_text=True, max_staleness=0, cache_salt="mine")
        self.assertEqual(given, expected)
        self.assertEqual(plain, wire.GenerateRequest(
            request_id=plain.request_id, prompt_ids={"ids": [1]}, n=1, sampling={"temperature": 1, "top_p": 1}, stopping={}))

    def test_a_call_that_is_given_up_is_ended_at_the_sidecar_too(self) -> None:
        told = threading.Event()

        def foreign(requests):
            next(requests)
            yield wire.GenerateReply(request_id="somebody else's")
            told.wait(60)

        fake, client = self.connect(batch=foreign)
        fake.arrived = lambda _, context: context.add_callback(told.set)
        try:
            client.generate([[1]], timeout=None)
        except RolloutError as error:  # kept with its traceback, as a notebook does
            self.assertIn("not in flight", str(error))
            self.assertTrue(told.wait(20), "its samples would go on")
        self.assertTrue(told.is_set())

    def test_a_pause_waits_as_long_as_its_lease(self) -> None:
        left = []
        fake, client = self.connect(pause=wire.PauseReply())
        fake.arrived = lambda _, context: left.append(context.time_remaining())
        for lease, timeout in ((7200, None), (1, None), (7200, 40.0)):
            client.pause("wait", owner="me", lease=lease, timeout=timeout)
        for seconds, limit in zip(left, (7200, 30, 40), strict=True):
            self.assertTrue(0.8 * limit < seconds < 1.2 * limit, (seconds, limit))  # gRPC rounds what it sends


class ErrorTests(unittest.TestCase):
    def test_each_status_has_its_class_and_keeps_what_the_sidecar_said(self) -> None:
        classes = {
            grpc.StatusCode.INVALID_ARGUMENT: RequestError, grpc.StatusCode.ALREADY_EXISTS: RequestError,
            grpc.StatusCode.RESOURCE_EXHAUSTED: BusyError, grpc.StatusCode.FAILED_PRECONDITION: StateError,
            grpc.StatusCode.UNAVAILABLE: UnavailableError, grpc.StatusCode.DEADLINE_EXCEEDED: RolloutTimeoutError,
        }
        for code in grpc.StatusCode:
            error = from_status(code, "n: is 0; top_p: is 7", "mine")
            self.assertIs(type(error), classes.get(code, RolloutError), code)
            self.assertEqual((error.code, error.request_id), (code, "mine"))
            if code is not grpc.StatusCode.DEADLINE_EXCEEDED:
                self.assertIn("request 'mine': n: is 0; top_p: is 7", str(error))
        self.assertEqual(from_status(grpc.StatusCode.INVALID_ARGUMENT, "n: is 0").problems, "n: is 0")
        self.assertIsInstance(from_status(grpc.StatusCode.UNAVAILABLE, ""), ConnectionError)
        self.assertIsInstance(from_status(grpc.StatusCode.DEADLINE_EXCEEDED, ""), TimeoutError)

    def test_a_batch_error_shows_five_refusals_and_counts_the_others(self) -> None:
        refused = [from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, f"no room {i}") for i in range(8)]
        self.assertIn("and 3 more", str(BatchError(refused, [])))
        self.assertNotIn("no room 5", str(BatchError(refused, [])))
        self.assertNotIn("more", str(BatchError(refused[:5], [])))


class AddressTests(unittest.TestCase):
    def test_what_grpc_is_told(self) -> None:
        for address, told in {
            "unix:/run/r.sock": "unix:/run/r.sock", "unix:///run/r.sock": "unix:/run/r.sock", "localhost:50051": "localhost:50051",
            "http://trainer-3:50051/": "trainer-3:50051", "http://[::1]:50051": "[::1]:50051", "unix:/" + "x" * 106: "unix:/" + "x" * 106,
            "unix:/" + "ä" * 53: "unix:/" + "ä" * 53,
        }.items():
            self.assertEqual(target(address), told)
        for wrong in (
            "unix:/" + "x" * 107, "unix:/" + "ä" * 54, "unix://relative", "https://localhost:50051", "http://localhost:1/path", ":50051",
            "a:١",
        ):
            with self.assertRaises(ValueError, msg=wrong):
                target(wrong)


if __name__ == "__main__":
    unittest.main()
