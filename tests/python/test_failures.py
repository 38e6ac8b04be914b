"""The state and the reported outcome after a push that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

import numpy as np
from fake_sidecar import FakeSidecar, FakeWeights
from support import PROGRAM, SHM, SidecarTests, eventually, golden, golden_weights, in_another_container, other_weights, own_files

import rollout
from rollout import (
    RolloutError,
    SharedMemoryError,
    UpdateOutcome,
    WeightDigestError,
    WeightUpdateFailed,
)
from rollout import _wire as wire
from rollout.weights import digest, shared_memory
from rollout.weights.call import StreamEnded, UpdateCall
from rollout.weights.publisher import Publisher

WEIGHTS = {"a": np.arange(8, dtype=np.float32)}
SEND, UNTIL = UpdateCall.send, UpdateCall.until


class RealSidecarTests(SidecarTests):
    def test_a_sidecar_killed_before_the_commit(self) -> None:
        for step in ("shared_memory", "chunk"):
            with self.subTest(step):
                self.setUp()

                def kill_at(call, **request):
                    if step in request:
                        self.sidecar.kill()
                    SEND(call, **request)

                transport = "inline" if step == "chunk" else "shared_memory"
                with mock.patch.object(UpdateCall, "send", kill_at), self.assertRaises(WeightUpdateFailed) as failed:
                    self.rollout.push_weights(other_weights("qwen3"), transport=transport)
                self.assertIs(failed.exception.outcome, UpdateOutcome.NOT_COMMITTED)

    def test_a_sidecar_killed_at_the_commit(self) -> None:
        def kill_at_commit(call, **request):
            if "commit" in request:
                self.sidecar.kill()
            SEND(call, **request)

        with mock.patch.object(UpdateCall, "send", kill_at_commit), mock.patch.object(Publisher, "resolve_within", 0.5):
            with self.assertRaisesRegex(WeightUpdateFailed, "version 1 is served") as failed:
                self.rollout.push_weights(other_weights("qwen3"))
        self.assertIs(failed.exception.outcome, UpdateOutcome.UNKNOWN)

    def test_a_restarted_sidecar_gets_its_own_memory_and_a_larger_push_a_larger_one(self) -> None:
        """The sidecar's memory is kept mapped from push to push, unless that sidecar has ended or the memory has become too small."""
        weights = other_weights("qwen3")
        some = {name: weights[name] for name in list(weights)[3:5]}
        self.rollout.push_weights(some, partial=True)
        self.rollout.push_weights(weights)
        self.rollout.push_weights(some, partial=True)
        socket = self.sidecar.address.removeprefix("unix:")
        for version in (1, 2):
            self.sidecar.kill()
            self.sidecar.stop()
            self.assertFalse(Path(socket).exists())  # a killed sidecar leaves it
            self.sidecar = rollout.Sidecar.start(golden("qwen3"), program=PROGRAM, threads=1, socket=socket)
            self.addCleanup(self.sidecar.stop)
            self.rollout.wait_until_ready(60)
            self.assertEqual(self.rollout.push_weights(weights, base_version=0, version=version).version, version)
        self.assertEqual(own_files(), [])

    def test_a_commit_whose_answer_is_lost_is_found_out(self) -> None:
        def lost(call, step):
            if step == "committed":
                eventually(lambda: self.rollout.status().version == 1, "it commits")
                raise StreamEnded(None)
            return UNTIL(call, step)

        with mock.patch.object(UpdateCall, "until", lost):
            result = self.rollout.push_weights(other_weights("qwen3"))
        # The sidecar's digest was in the lost answer; the client's own takes xxhash.
        self.assertEqual((result.version, result.confirmed_by_status, len(result.digest)), (1, True, 32 if digest.xxhash else 0))
        self.assertEqual(self.rollout.push_weights(other_weights("qwen3")).version, 2)

    def test_a_connection_that_breaks_before_the_sidecar_commits(self) -> None:
        def breaks(call, **request):
            if "commit" in request:
                raise StreamEnded(None)
            SEND(call, **request)

        # The stream itself is still open while the sidecar is asked: it is updating until the call is closed.
        with mock.patch.object(UpdateCall, "send", breaks), mock.patch.object(Publisher, "resolve_within", 0.5):
            with self.assertRaises(WeightUpdateFailed) as failed:
                self.rollout.push_weights(other_weights("qwen3"))
        self.assertIs(failed.exception.outcome, UpdateOutcome.UNKNOWN)
        self.assert_serves_the_old_weights()

    def test_a_stream_that_breaks_in_place_poisons_until_a_full_push(self) -> None:
        def breaks(call, **request):
            if "commit" in request:
                eventually(lambda: self.rollout.status().state == "updating", "the first bytes stop the engine")
                call._stream.cancel()
            SEND(call, **request)

        with mock.patch.object(UpdateCall, "send", breaks), self.assertRaisesRegex(WeightUpdateFailed, "push a full update") as failed:
            self.rollout.push_weights(other_weights("qwen3"), mode="in_place")
        self.assertIs(failed.exception.outcome, UpdateOutcome.POISONED)
        self.assertEqual(self.rollout.status().state, "poisoned")
        self.rollout.push_weights(golden_weights("qwen3"), mode="in_place")
        self.assert_serves_the_old_weights(version=1)

    def test_a_flipped_bit_is_not_committed(self) -> None:
        if digest.xxhash is None:
            self.skipTest("xxhash is not installed")

        def flip(call, **request):
            if "shared_memory" in request:
                with open(request["shared_memory"].path, "r+b") as file:
                    byte = file.read(1)[0]
                    file.seek(0)
                    file.write(bytes([byte ^ 1]))
            SEND(call, **request)

        with mock.patch.object(UpdateCall, "send", flip), self.assertRaisesRegex(WeightUpdateFailed, "digest") as failed:
            self.rollout.push_weights(other_weights("qwen3"))
        self.assertIs(failed.exception.outcome, UpdateOutcome.NOT_COMMITTED)
        self.assert_serves_the_old_weights()

    def test_without_xxhash_a_push_goes_unchecked(self) -> None:
        with mock.patch.object(digest, "xxhash", None):
            result = self.rollout.push_weights(other_weights("qwen3"))
        self.assertEqual(result.version, 1)
        self.assertEqual(len(result.digest), 32)  # the sidecar's own

    def test_an_interrupt_leaves_the_old_weights(self) -> None:
        def interrupted(call, **request):
            if "shared_memory" in request:
                raise KeyboardInterrupt
            SEND(call, **request)

        with mock.patch.object(UpdateCall, "send", interrupted), self.assertRaises(KeyboardInterrupt):
            self.rollout.push_weights(other_weights("qwen3"))
        self.assert_serves_the_old_weights()
        self.assertEqual(self.rollout.push_weights(other_weights("qwen3")).version, 1)

    def test_a_killed_trainer_leaves_nothing(self) -> None:
        trainer = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed_trainer.py")), self.sidecar.address], stdout=subprocess.PIPE, text=True)
        self.addCleanup(trainer.stdout.close)
        self.assertEqual(trainer.stdout.readline(), "midway\n")
        self.assertTrue(self.rollout.status().updating)
        self.assertEqual(len(list(SHM.glob(f"rollout-{trainer.pid}-*"))), 1)
        trainer.kill()
        trainer.wait()
        self.assert_serves_the_old_weights()
        with rollout.Rollout(self.sidecar.address) as restarted:
            self.assertEqual(list(SHM.glob(f"rollout-{trainer.pid}-*")), [])
            self.assertEqual(restarted.push_weights(other_weights("qwen3")).version, 1)

    def test_a_full_dev_shm_is_an_error_and_the_old_weights_stay(self) -> None:
        with in_another_container(), mock.patch("os.posix_fallocate", side_effect=OSError(28, "No space left on device")):
            with self.assertRaisesRegex(SharedMemoryError, "transport='inline'") as full:
                self.rollout.push_weights(other_weights("qwen3"), transport="shared_memory")
        self.assertIsInstance(full.exception, OSError)
        self.assertEqual(own_files(), [])
        self.assert_serves_the_old_weights()

    def test_a_process_that_ends_takes_its_file_along(self) -> None:
        code = (
            "import os, support, rollout\n"
            "print(os.getpid())\n"
            f"client = rollout.Rollout({self.sidecar.address!r})\n"
            "support.in_another_container().start()\n"
            "client.push_weights(support.other_weights('qwen3'), transport='shared_memory')\n"
            "if os.fork() == 0: raise SystemExit\n"  # a child that ends leaves its parent's file
            "os.wait()\n"
            "assert support.own_files(), 'gone with the child'\n"
        )
        # gRPC does not survive a fork in the child; ending is all that this one does.
        ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60)
        self.assertEqual(ended.returncode, 0, ended.stderr)
        self.assertEqual(list(SHM.glob(f"rollout-{ended.stdout.split()[0]}-*")), [])


class FakeSidecarTests(SidecarTests):
    """Digests that differ, broken commits, sidecars of another age."""

    def setUp(self) -> None:
        self.status = wire.StatusReply(state=2, version=4)

    def connect(self, update=None, **replies):
        fake = FakeSidecar(
            str(self.temporary_folder() / "s"), update, status=lambda: self.status() if callable(self.status) else self.status, **replies)
        self.addCleanup(fake.stop)
        client = rollout.Rollout(fake.address)
        self.addCleanup(client.close)
        return fake, client

    def test_in_place_and_poisoned(self) -> None:
        begun = []

        def update(requests):
            begun.append(next(requests).begin)
            yield wire.UpdateReply(ready={"mode": 2})
            yield wire.UpdateReply(failed={"reason": "a disk is gone", "poisoned": True})

        _, client = self.connect(update)
        with self.assertRaisesRegex(WeightUpdateFailed, "a disk is gone") as failed:
            client.push_weights(WEIGHTS, mode="in_place", partial=True, policy="abort", owner="me", timeout=7)
        self.assertIs(failed.exception.outcome, UpdateOutcome.POISONED)
        begin = begun[0]
        self.assertEqual((begin.mode, begin.partial, begin.policy, begin.owner), (2, True, 4, "me"))
        self.assertEqual((begin.base_version, begin.new_version, begin.payload_bytes), (4, 5, 16))
        self.assertTrue(6000 < begin.deadline_milliseconds <= 7000)

    def test_what_is_left_when_the_sidecar_gives_up_is_what_it_says(self) -> None:
        for step in ("failed", "aborted"):
            for poisoned, outcome in ((False, UpdateOutcome.NOT_COMMITTED), (True, UpdateOutcome.POISONED)):
                with self.subTest(step, poisoned=poisoned):

                    def update(requests, step=step, poisoned=poisoned):
                        next(requests)
                        yield wire.UpdateReply(**{step: {"reason": "the server stops", "poisoned": poisoned}})

                    _, client = self.connect(update)
                    with self.assertRaisesRegex(WeightUpdateFailed, "the server stops") as failed:
                        client.push_weights(WEIGHTS)
                    self.assertIs(failed.exception.outcome, outcome)

    def test_every_policy_and_mode_arrives_as_the_one_that_was_meant(self) -> None:
        weights = FakeWeights(version=4)
        _, client = self.connect(weights.update)
        self.status = weights.status
        for policy in ("recompute", "keep", "drain", "abort"):
            client.push_weights(WEIGHTS, policy=policy, base_version=weights.version)
            self.assertEqual(wire.UPDATE_POLICY.name(weights.begun[-1].policy), policy)
            self.assertEqual((weights.begun[-1].partial, weights.begun[-1].segment_bytes), (False, 16))
        for mode, sent, given in (("auto", 0, "staged"), ("staged", 1, "staged"), ("in_place", 2, "in_place"), ("auto", 0, "in_place")):
            weights.mode = wire.UPDATE_MODE.number(given, "mode")
            result = client.push_weights(WEIGHTS, mode=mode, base_version=weights.version, transport="inline", partial=True)
            begin = weights.begun[-1]
            self.assertEqual((begin.mode, begin.partial, begin.segment_bytes, result.mode), (sent, True, 0, given))

    def test_a_sidecar_that_gives_up_ends_the_sending(self) -> None:
        copied = 0

        def update(requests):
            next(requests)
            yield wire.UpdateReply(ready={"mode": 1})
            yield wire.UpdateReply(failed={"reason": "out of luck"})

        class Slow(np.ndarray):
            """Rows are counted, and the first one waits until the sidecar has given up."""

            def __getitem__(self, rows):
                nonlocal copied
                copied += 1
                if copied == 3:
                    eventually(lambda: any(call._ended.is_set() for call in calls), "it has given up")
                return np.ndarray.__getitem__(self, rows).view(np.ndarray)

        calls = []
        init = UpdateCall.__init__

        def seen(call, *arguments):
            calls.append(call)
            init(call, *arguments)

        for transport in ("shared_memory", "inline"):
            with self.subTest(transport), mock.patch.object(UpdateCall, "__init__", seen):
                copied = 0
                calls.clear()
                _, client = self.connect(update)
                weights = {"a": rollout.BFloat16(np.zeros((40, 1 << 19), np.uint16).view(Slow))}  # a piece a row
                with self.assertRaisesRegex(WeightUpdateFailed, "out of luck"):
                    client.push_weights(weights, transport=transport)
                self.assertLess(copied, 20)

    def test_a_sidecar_that_stops_reading_and_gives_up_ends_a_push_that_waits_to_send(self) -> None:
        def update(requests):
            next(requests)
            yield wire.UpdateReply(ready={"mode": 1})
            stuck.wait(60)
            yield wire.UpdateReply(failed={"reason": "out of luck"})

        def push():
            try:
                client.push_weights({"a": rollout.BFloat16(np.zeros((64, 1 << 19), np.uint16))}, transport="inline")
            except WeightUpdateFailed as error:
                errors.append(error)

        stuck, errors, sent = threading.Event(), [], []
        fake, _ = self.connect(update)
        client = rollout.Rollout(fake.address)  # closing it would wait for the push
        pushing = threading.Thread(target=push, daemon=True)

        def counted(call, **step):
            sent.append(step)
            SEND(call, **step)

        def nothing_moves() -> bool:
            before = len(sent)
            pushing.join(0.3)
            return 1 < before == len(sent)

        with mock.patch.object(UpdateCall, "send", counted):
            pushing.start()
            eventually(nothing_moves, "nothing more can be sent")
        stuck.set()
        pushing.join(20)
        self.assertFalse(pushing.is_alive())
        self.assertIn("out of luck", str(errors[0]))
        client.close()

    def test_a_file_that_was_removed_is_made_anew(self) -> None:
        weights = FakeWeights(version=4)
        _, client = self.connect(weights.update)
        self.status = weights.status
        client.push_weights(WEIGHTS, transport="shared_memory")
        [first] = own_files()
        (SHM / first).unlink()  # as a cleanup job might
        client.push_weights({"a": WEIGHTS["a"] + 1}, transport="shared_memory")
        [second] = own_files()
        self.assertNotEqual(first, second)
        self.assertEqual(weights.tensors["a"], (np.arange(1, 9, dtype=np.float32).view(np.uint32) >> 16).astype("<u2").tobytes())
        client.push_weights({"a": np.zeros(9, np.float32)}, transport="shared_memory")  # larger
        self.assertEqual((len(own_files()), weights.tensors["a"]), (1, bytes(18)))

    def test_another_trainers_version_is_not_taken_for_one_that_was_never_committed(self) -> None:
        """A push in place broke before its commit: the same version number is served, but it cannot be ours."""

        def update(requests):
            next(requests)
            yield wire.UpdateReply(ready={"mode": 2})
            next(requests)
            self.status.version = 5
            raise OSError("broken")

        _, client = self.connect(update, describe=wire.DescribeReply(version=5))
        with self.assertRaises(WeightUpdateFailed) as failed:
            client.push_weights(WEIGHTS)
        self.assertIs(failed.exception.outcome, UpdateOutcome.UNKNOWN)

    def test_a_stream_that_breaks_in_place_asks_what_is_left(self) -> None:
        def update(requests):
            next(requests)
            yield wire.UpdateReply(ready={"mode": 2})
            next(requests)
            self.status.state = 7
            raise OSError("broken")

        _, client = self.connect(update)
        with self.assertRaises(WeightUpdateFailed) as failed:
            client.push_weights(WEIGHTS)
        self.assertIs(failed.exception.outcome, UpdateOutcome.POISONED)

    def test_an_older_sidecar_that_cannot_do_what_was_asked_is_found_out(self) -> None:
        aborted = []

        def update(requests):
            next(requests)
            yield wire.UpdateReply(ready={})
            aborted.append(next(requests).abort.reason)

        _, client = self.connect(update)
        with self.assertRaisesRegex(RolloutError, "would update staged, not in_place"):
            client.push_weights(WEIGHTS, mode="in_place")
        self.assertIn("in_place", aborted[0])

    def test_a_digest_that_differs_after_the_commit(self) -> None:
        if digest.xxhash is None:
            self.skipTest("xxhash is not installed")

        def update(requests):
            next(requests)
            yield wire.UpdateReply(ready={"mode": 1})
            next(requests)
            yield wire.UpdateReply(progress={"payload_bytes": 16})
            next(requests)
            yield wire.UpdateReply(committed={"version": 5, "digest": bytes(16)})

        _, client = self.connect(update)
        with self.assertRaises(WeightDigestError) as failed:
            client.push_weights(WEIGHTS)
        error = failed.exception
        self.assertEqual((error.outcome, error.version, error.received), (UpdateOutcome.COMMITTED, 5, "00" * 16))

    def test_a_broken_commit_that_somebody_else_has_overtaken(self) -> None:
        def update(requests):
            next(requests)
            yield wire.UpdateReply(ready={"mode": 1})
            next(requests)
            yield wire.UpdateReply(progress={"payload_bytes": 16})
            next(requests)
            self.status.version = 9
            raise OSError("broken")

        _, client = self.connect(update)
        with self.assertRaises(WeightUpdateFailed) as failed:
            client.push_weights(WEIGHTS)
        self.assertIs(failed.exception.outcome, UpdateOutcome.UNKNOWN)

    def test_a_broken_commit_that_was_never_made(self) -> None:
        def update(requests):
            next(requests)
            yield wire.UpdateReply(ready={"mode": 1})
            next(requests)
            yield wire.UpdateReply(progress={"payload_bytes": 16})
            next(requests)
            raise OSError("broken")

        _, client = self.connect(update)
        with self.assertRaisesRegex(WeightUpdateFailed, "nothing has replaced version 4") as failed:
            client.push_weights(WEIGHTS)
        self.assertIs(failed.exception.outcome, UpdateOutcome.NOT_COMMITTED)

    def test_sleep_and_wake_up(self) -> None:
        fake, client = self.connect(
            sleep=wire.SleepReply(state=6, freed=[dict(
                tag=2, allocated_bytes=9, freed_bytes=8, free_bytes_before=1, free_bytes_after=7, host_bytes=3)], asleep=[1, 2]),
            wake_up=wire.WakeUpReply(state=7, asleep=[2]))
        slept = client.sleep(["kv_cache"])
        self.assertEqual((slept.state, slept.asleep), ("sleeping", ("weights", "kv_cache")))
        self.assertEqual(slept.freed, {"kv_cache": rollout.FreedMemory(9, 8, 1, 7, 3)})
        self.assertEqual(client.wake_up(["weights"]), "poisoned")
        client.sleep(keep_weights=True)
        self.assertEqual([list(request.tags) for request in fake.requests], [[2], [1], []])
        self.assertEqual([fake.requests[0].keep_weights, fake.requests[2].keep_weights], [False, True])


class SharedMemoryTests(unittest.TestCase):
    def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(self) -> None:
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True).stdout.strip()
        zombie = subprocess.Popen([sys.executable, "-c", ""])
        eventually(lambda: Path(f"/proc/{zombie.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z", "a zombie")
        self.addCleanup(zombie.wait)
        folder = self.folder()
        of_the_dead = [folder / f"rollout-{dead}-{'0' * 16}", folder / f"rollout-{zombie.pid}-{'1' * 16}"]
        locked = folder / f"rollout-{dead}-{'2' * 16}"  # of another container, recognised only by its lock
        others = [locked, folder / f"rollout-{dead}-123", folder / "rollout-x", folder / f"rollout-1-{'3' * 16}"]
        for path in of_the_dead + others:
            path.touch()
        holder = subprocess.Popen(
            [sys.executable, "-c", f"import fcntl, time; f = open({str(locked)!r}); fcntl.flock(f, fcntl.LOCK_SH); print(flush=True); time.sleep(60)"],
            stdout=subprocess.PIPE)
        self.addCleanup(holder.stdout.close)
        self.addCleanup(holder.wait)
        self.addCleanup(holder.kill)
        holder.stdout.readline()
        file = shared_memory.SharedMemoryFile(5000, folder)
        self.addCleanup(file.close)
        self.assertEqual(sorted(folder.iterdir()), sorted([*others, file.path]))

    def test_the_file_is_private_and_has_all_its_pages(self) -> None:
        file = shared_memory.SharedMemoryFile(100_000)
        stat = file.path.stat()
        self.assertEqual((stat.st_mode & 0o777, stat.st_size), (0o600, 100_000))
        self.assertGreaterEqual(stat.st_blocks * 512, 100_000)
        self.assertRegex(file.path.name, f"^rollout-{os.getpid()}-[0-9a-f]{{16}}$")
        file.close()
        self.assertFalse(file.exists)

    def folder(self) -> Path:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return Path(folder.name)


if __name__ == "__main__":
    unittest.main()
