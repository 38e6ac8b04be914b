"""Samples, scores and control against a real sidecar."""

from __future__ import annotations

import threading
import unittest

import numpy as np
from support import cases, eventually, start

from rollout import BatchError, RequestError, Rollout, RolloutError, RolloutTimeoutError, UnavailableError

TOLERANCE = 1e-4  # between two fp32 implementations with different orders of summation


class GenerateTests(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.sidecar = start("qwen3", "--tokenizer", "bytes")
        cls.addClassCleanup(cls.sidecar.stop)
        cls.rollout = cls.sidecar.connect()
        cls.addClassCleanup(cls.rollout.close)

    def test_greedy_is_golden_for_many_prompts_on_one_call(self) -> None:
        expected = cases("qwen3")
        groups = self.rollout.generate([case.prompt for case in expected], max_tokens=len(expected[0].tokens), temperature=0)
        for case, [sample] in zip(expected, groups, strict=True):
            self.assertEqual(sample.ids.tolist(), case.tokens)
            self.assertLess(np.abs(sample.logprobs - case.logprobs).max(), TOLERANCE)
            self.assertEqual((sample.ids.dtype, sample.logprobs.dtype), (np.int32, np.float32))
            self.assertTrue((sample.sampling_logprobs == 0).all())
            self.assertEqual(sample.finish_reason, "length")

    def test_the_same_seed_draws_the_same_tokens_and_seeds_count_up_over_the_groups(self) -> None:
        def draw(seed, prompts=3):
            return [[s.ids.tolist() for s in group] for group in self.rollout.generate([[5, 6, 7]] * prompts, n=4, max_tokens=12, seed=seed)]

        drawn = draw(40)
        self.assertEqual(draw(40), drawn)
        self.assertEqual(draw(41, prompts=2), drawn[1:])
        self.assertEqual(draw([42, 40, 41]), [drawn[2], drawn[0], drawn[1]])
        self.assertEqual(len({tuple(ids) for group in drawn for ids in group}), 12)
        [[sample, *_], *_] = self.rollout.generate([[5, 6, 7]], n=4, max_tokens=12)
        self.assertEqual(draw(sample.seed, prompts=1)[0][0], sample.ids.tolist())

    def test_a_sample_says_which_version_drew_every_token(self) -> None:
        [[first, second]] = self.rollout.generate([[1, 2, 3]], n=2, max_tokens=9, seed=3)
        for sample in (first, second):
            self.assertEqual([(span.version, span.start, span.end) for span in sample.versions], [(0, 0, 9)])
            self.assertEqual(sample.oldest_kv_version, 0)
        self.assertEqual((first.index, second.index), (0, 1))
        np.testing.assert_array_equal(first.logprobs, first.sampling_logprobs)  # nothing was cut off

    def test_every_argument_reaches_the_sidecar(self) -> None:
        [[sample]] = self.rollout.generate(
            [np.array([1, 2, 3])], max_tokens=8, min_tokens=8, temperature=0.5, top_k=3, top_p=0.9, min_p=0.01, seed=1, top_logprobs=4,
            prompt_logprobs=True, cache_salt="mine", max_staleness=2, return_text=True, ignore_eos=True)
        self.assertEqual((sample.top.ids.shape, sample.top.logprobs.shape), ((8, 4), (8, 4)))
        self.assertTrue(all(token in row[:3] for token, row in zip(sample.ids, sample.top.ids)))
        self.assertTrue((sample.sampling_logprobs > sample.logprobs).all())
        self.assertEqual(sample.prompt.logprobs.shape, (2,))
        self.assertNotEqual(sample.text, "")
        [[forced]] = self.rollout.generate([[1, 2]], max_tokens=5, logit_bias={7: 100.0}, stop_token_ids=[7])
        self.assertEqual((forced.ids.tolist(), forced.finish_reason), ([7], "stop"))
        [[stopped]] = self.rollout.generate(["ab"], max_tokens=50, logit_bias={ord("x"): 100.0}, stop=["xx"], return_text=True)
        self.assertEqual((stopped.ids.tolist(), stopped.text, stopped.finish_reason), ([ord("x")] * 2, "", "stop"))
        self.assertEqual(stopped.prompt.ids.tolist(), [ord("a"), ord("b")])

    def test_score_agrees_with_the_samples(self) -> None:
        case = cases("qwen3")[0]
        score = self.rollout.score(case.prompt + case.tokens, top=2)
        self.assertLess(np.abs(score.logprobs[len(case.prompt) - 1 :] - case.logprobs).max(), TOLERANCE)
        self.assertEqual(score.ids.tolist(), case.prompt + case.tokens)
        self.assertEqual(score.top.ids.shape, (len(score.ids), 2))
        self.assertEqual(score.version, 0)

    def test_a_request_that_cannot_run_lists_every_problem(self) -> None:
        with self.assertRaises(RequestError) as refused:
            self.rollout.generate([[1]], temperature=-1, top_p=7)
        self.assertIn("sampling.temperature", refused.exception.problems)
        self.assertIn("sampling.top_p", refused.exception.problems)

    def test_a_refused_group_disturbs_no_other(self) -> None:
        with self.assertRaises(BatchError) as error:
            self.rollout.generate([[1, 2], [], [3, 9_999]], n=2, max_tokens=3)
        self.assertEqual([type(refused) for refused in error.exception.refused], [RequestError, RequestError])
        self.assertEqual([group and len(group) for group in error.exception.groups], [2, None, None])

    def test_what_is_no_prompt_is_found_here(self) -> None:
        for wrong in ("text", [1, 2, 3], [[1.5]], [[[1]]]):
            with self.assertRaises(TypeError, msg=repr(wrong)):
                self.rollout.generate(wrong)
        with self.assertRaises(ValueError):
            self.rollout.generate([[-1]])
        with self.assertRaises(ValueError):
            self.rollout.generate([[1]], seed=[1, 2])
        for name, wrong in {"n": -1, "max_tokens": 1 << 32, "top_k": -5, "top_p": "x", "logit_bias": {-1: 1.0}}.items():
            with self.assertRaisesRegex((ValueError, TypeError), f"^{name}: ", msg=name):
                self.rollout.generate([[1]], **{name: wrong})
        with self.assertRaisesRegex(ValueError, "^top: "):
            self.rollout.score([1, 2], top=-1)
        with self.assertRaises(ValueError):
            self.rollout.sleep([])
        self.assertEqual(self.rollout.generate([]), [])

    def test_abort_returns_the_partial_tokens(self) -> None:
        self.rollout.pause("keep", owner="test", lease=20)
        result = []
        thread = threading.Thread(target=lambda: result.extend(self.rollout.generate([[1, 2, 3]], n=3, max_tokens=400)))
        thread.start()
        eventually(lambda: self.rollout.status().waiting == 3, "the group has arrived")
        self.assertEqual(self.rollout.abort(["no such"]).unknown, ("no such",))
        aborted = self.rollout.abort()
        self.rollout.resume()
        thread.join(20)
        self.assertEqual((aborted.groups, aborted.samples), (1, 3))
        self.assertEqual([sample.finish_reason for sample in result[0]], ["abort"] * 3)

    def test_a_pause_names_its_owner_and_ends_at_resume(self) -> None:
        self.assertEqual(self.rollout.pause("keep", owner="me", lease=20), 0)
        status = self.rollout.status()
        self.assertEqual(status.state, "paused")
        self.assertIn("me", status.reason)
        with self.assertRaises(RolloutTimeoutError):
            self.rollout.generate([[1]], max_tokens=1, timeout=0.2)
        self.assertEqual(self.rollout.resume(), "running")
        with self.assertRaisesRegex(ValueError, "'abort', 'wait', 'keep'"):
            self.rollout.pause("stop", owner="me", lease=1)

    def test_describe_lists_the_model(self) -> None:
        described = self.rollout.describe()
        self.assertEqual(described.tensors["model.norm.weight"].shape, (64,))
        self.assertRegex(described.tensors["lm_head.weight"].digest, "^[0-9a-f]{32}$")

    def test_ready_at_once_and_over_tcp(self) -> None:
        self.assertEqual(self.rollout.wait_until_ready(5).model, "qwen3")
        lines: list[str] = []
        with start("qwen3", "--listen", "127.0.0.1:0") as sidecar:
            lines = sidecar.last_lines
            port = next(line for line in lines if line.startswith("ready ")).split("127.0.0.1:")[1].split('"')[0].rstrip("/")
            for address in (f"127.0.0.1:{port}", f"http://127.0.0.1:{port}", f"unix://{sidecar.address.removeprefix('unix:')}"):
                with Rollout(address) as tcp:
                    self.assertEqual(tcp.status().version, 0)


class ConnectionTests(unittest.TestCase):
    def test_nobody_there_is_unavailable(self) -> None:
        with Rollout("unix:/tmp/rollout-no-such.sock") as nobody:
            for call in (nobody.status, lambda: nobody.generate([[1]]), lambda: nobody.push_weights({"a": np.zeros(3)})):
                with self.assertRaises(UnavailableError) as error:
                    call()
                self.assertIsInstance(error.exception, ConnectionError)
            with self.assertRaisesRegex(RolloutTimeoutError, "not ready after 0.2 s"):
                nobody.wait_until_ready(0.2)

    def test_addresses(self) -> None:
        for wrong in ("", "unix:", "unix:relative", "localhost", "http://localhost", "127.0.0.1:port", "unix:/" + "x" * 108):
            with self.assertRaises(ValueError, msg=wrong):
                Rollout(wrong)

    def test_a_sidecar_that_dies_ends_the_call(self) -> None:
        with start() as sidecar, sidecar.connect() as client:
            client.pause("keep", owner="test", lease=60)
            caught: list[RolloutError] = []

            def generate() -> None:
                try:
                    client.generate([[1]], max_tokens=400)
                except RolloutError as error:
                    caught.append(error)

            thread = threading.Thread(target=generate)
            thread.start()
            eventually(lambda: client.status().waiting == 1, "the group has arrived")
            sidecar.kill()
            thread.join(20)
            self.assertIsInstance(caught[0], UnavailableError)


if __name__ == "__main__":
    unittest.main()
