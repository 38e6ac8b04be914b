"""Pushes by several processes, each with slices of the weights, against a real sidecar."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import unittest
from multiprocessing.connection import Listener
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from support import SidecarTests, eventually, golden_config, other_weights, start

import rollout
from rollout import ShardGroup
from rollout.weights.from_device import device_of
from rollout.weights.shards import OtherRankError
from rollout.weights.tensors import sources

TRAINER = Path(__file__).with_name("rank_trainer.py")


class Exchange:
    """All-gathers for processes; ends them all when one is gone, as a collective does."""

    def __init__(self, path: str, ranks: int) -> None:
        self.path = path
        self._listener = Listener(path, "AF_UNIX")
        threading.Thread(target=self._run, args=(ranks,), daemon=True).start()

    def _run(self, ranks: int) -> None:
        connections: dict = {}
        try:
            while len(connections) < ranks:
                connection = self._listener.accept()
                connections[connection.recv()] = connection
            while True:
                every = [connections[rank].recv() for rank in range(ranks)]
                for connection in connections.values():
                    connection.send(every)
        except (EOFError, OSError):
            for connection in connections.values():
                connection.close()

    def close(self) -> None:
        self._listener.close()


class ShardPushTests(SidecarTests):
    def ranks(self, ranks: int, versions: int, what: str) -> list[subprocess.Popen[str]]:
        exchange = Exchange(str(self.temporary_folder() / "exchange"), ranks)
        self.addCleanup(exchange.close)
        processes = []
        for rank in range(ranks):
            process = subprocess.Popen(
                [sys.executable, str(TRAINER), self.sidecar.address, exchange.path, str(rank), str(ranks), str(versions), what],
                stdout=subprocess.PIPE, text=True)
            self.addCleanup(process.wait)
            self.addCleanup(process.kill)
            self.addCleanup(process.stdout.close)
            processes.append(process)
        return processes

    def ends(self, processes: list[subprocess.Popen[str]]) -> list[list[str]]:
        return [process.communicate(timeout=60)[0].splitlines() for process in processes]

    def assert_serves_all(self) -> None:
        folder = rollout.checkpoint.save(self.temporary_folder(), other_weights("qwen3"), golden_config("qwen3"))
        with start(folder) as fresh, fresh.connect() as client:
            expected = {name: tensor.digest for name, tensor in client.describe().tensors.items()}
        self.assertEqual({name: tensor.digest for name, tensor in self.rollout.describe().tensors.items()}, expected)

    def test_ranks_push_their_slices_again_and_again(self) -> None:
        ends = self.ends(self.ranks(3, 3, "pushes"))
        self.assertEqual([[line.split()[:2] for line in lines] for lines in ends], [[["committed", str(v)] for v in (1, 2, 3)]] * 3)
        self.assertEqual(len({line.split()[2] for lines in ends for line in lines}), 1)
        self.assertEqual({line.split()[3] for line in ends[0]}, {"inline", "shared_memory"})
        self.assert_serves_all()

    def test_one_rank_is_a_push_and_a_rank_may_have_nothing(self) -> None:
        self.assertEqual([line.split()[:2] for line in self.ends(self.ranks(1, 1, "pushes"))[0]], [["committed", "1"]])
        ends = self.ends(self.ranks(4, 1, "has nothing"))
        self.assertEqual([lines[0].split()[:2] for lines in ends], [["committed", "2"]] * 4)
        self.assert_serves_all()

    def test_a_rank_whose_tensors_cannot_be_sent_fails_all_before_the_update_begins(self) -> None:
        ends = self.ends(self.ranks(2, 1, "refused"))
        self.assertRegex(ends[0][0], "OtherRankError None rank 1: TypeError: .*'model.embed_tokens.weight' holds int64")
        self.assertRegex(ends[1][0], "TypeError .*'model.embed_tokens.weight' holds int64")
        self.assert_serves_the_old_weights()

    def test_rows_that_no_rank_has_are_named_to_all(self) -> None:
        ends = self.ends(self.ranks(2, 1, "forgets"))
        self.assertRegex(ends[0][0], "WeightUpdateRejected .*embed_tokens.* are in no slice")
        self.assertRegex(ends[1][0], "OtherRankError .*rank 0: WeightUpdateRejected: .*embed_tokens.* are in no slice")
        self.assert_serves_the_old_weights()

    def test_a_killed_rank_ends_the_push_on_all(self) -> None:
        for what in ("stops", "stops in place"):
            with self.subTest(what):
                processes = self.ranks(3, 1, what)
                self.assertEqual(processes[2].stdout.readline(), "midway\n")
                processes[2].kill()
                for lines in self.ends(processes[:2]):
                    self.assertNotIn("committed", lines[0])
                eventually(lambda: not self.rollout.status().updating, "the update's seat is given back")
                status = self.rollout.status()
                self.assertEqual((status.version, status.state), (0, "running" if what == "stops" else "poisoned"))
        ends = self.ends(self.ranks(2, 1, "pushes"))
        self.assertEqual([lines[0].split()[:2] for lines in ends], [["committed", "1"]] * 2)
        self.assert_serves_all()


class PlacementTests(unittest.TestCase):
    """What each rank sends of PyTorch's DTensors, which are only looked at and need no torch here."""

    def dtensor(self, array, mesh, at, placements):
        local = array
        for dimension, placement in enumerate(placements):
            if type(placement).__name__ == "Shard":
                most = -(-len(local) // mesh[dimension])
                local = local[at[dimension] * most : (at[dimension] + 1) * most]
        device_mesh = SimpleNamespace(get_coordinate=lambda: at, size=lambda dimension: mesh[dimension])
        return SimpleNamespace(placements=placements, to_local=lambda: local, shape=array.shape, device_mesh=device_mesh)

    def test_over_all_ranks_every_row_is_sent_once(self) -> None:
        draw = random.Random(5)
        Shard, Replicate = type("Shard", (), {"dim": 0}), type("Replicate", (), {})
        for _ in range(200):
            mesh = [draw.randint(1, 4) for _ in range(draw.randint(1, 3))]
            placements = [draw.choice([Shard, Replicate])() for _ in mesh]
            array = np.arange(draw.randint(1, 9) * 2, dtype=np.float32).reshape(-1, 2)
            sent = np.zeros(len(array), int)
            for at in np.ndindex(*mesh):
                for source in sources({"w": self.dtensor(array, mesh, at, placements)}, None, may_be_empty=True):
                    rows = source.sent_shape[0]
                    out = bytearray(source.bytes)
                    source.copy_rows(0, rows, memoryview(out))
                    self.assertEqual(bytes(out), array[source.first_row : source.first_row + rows].tobytes())
                    self.assertEqual(source.shape, array.shape)
                    sent[source.first_row : source.first_row + rows] += 1
            self.assertEqual(sent.tolist(), [1] * len(array))

    def test_a_rank_with_nothing_is_on_no_device(self) -> None:
        self.assertEqual(device_of([]), (None, "there are no tensors to send"))

    def test_other_placements_are_refused(self) -> None:
        array = np.zeros((4, 4), np.float32)
        for name, dim in (("Shard", 1), ("Partial", None), ("_StridedShard", 0)):
            placement = type(name, (), {"dim": dim, "__str__": lambda self, name=name, dim=dim: f"{name}({dim})"})()
            with self.assertRaisesRegex(TypeError, rf"'w' is placed as {name}\({dim}\): slices of the first dimension can be pushed"):
                sources({"w": self.dtensor(array, [2], [0], [placement]) if name != "Shard" else SimpleNamespace(
                    placements=[placement], to_local=lambda: array[:, :2], shape=array.shape,
                    device_mesh=SimpleNamespace(get_coordinate=lambda: [0], size=lambda _: 2))}, None)

    def test_an_action_that_fails_on_one_rank_fails_on_all(self) -> None:
        ranks = [ShardGroup(rank, 2, lambda own: [("a", None), own] if own[1] else [own, (None, "ValueError: no")]) for rank in (0, 1)]
        with self.assertRaisesRegex(OtherRankError, "rank 1: ValueError: no"):
            ranks[0].all(lambda: "a")
        with self.assertRaisesRegex(ZeroDivisionError, "division"):
            ranks[1].all(lambda: 1 // 0)
        with self.assertRaisesRegex(ValueError, "rank=2 of ranks=2"):
            ShardGroup(2, 2, list)
