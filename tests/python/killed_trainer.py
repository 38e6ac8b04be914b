"""A trainer that has put its weights into a file of /dev/shm and stays there until it is killed: run by test_failures."""

from __future__ import annotations

import sys
import time

from support import in_another_container, other_weights

from rollout import Rollout
from rollout.weights.call import UpdateCall

send = UpdateCall.send


def send_and_stay(call: UpdateCall, **step: object) -> None:
    send(call, **step)
    if "shared_memory" in step:
        call.until("progress")
        print("midway", flush=True)
        time.sleep(600)


UpdateCall.send = send_and_stay
in_another_container().start()
Rollout(sys.argv[1]).push_weights(other_weights("qwen3"), transport="shared_memory")
