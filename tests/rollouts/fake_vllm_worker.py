"""Stands in for the vLLM process in tests of the process around it: same arguments, same messages, no model."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from gradvar.rollouts.engines.vllm_worker import die_with_parent

HOW = os.environ["FAKE_WORKER"]

if __name__ == "__main__":
    die_with_parent()
    job = json.loads(Path(sys.argv[1]).read_text())
    with os.fdopen(int(sys.argv[2]), "w") as messages:

        def send(message):
            messages.write(json.dumps(message) + "\n")
            messages.flush()

        for index, request in enumerate(job["requests"]):
            send({"progress": request["n"]})
            send({"request": index, "responses": [[[2, 3, 0], [-1.0, -0.1, -2.5]]] * request["n"]})
            if HOW == "killed":
                print("loading the model\nall is well so far", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if HOW == "torn":
                messages.write('{"request": 1, "resp')
                messages.flush()
                os._exit(3)
            if HOW == "error":
                send({"error": "ValueError: no room for the cache"})
                sys.exit(1)
            if HOW == "pointer":
                print("(EngineCore) ERROR: ValueError: No memory for blocks", flush=True)
                send({"error": "RuntimeError: Engine core initialization failed. See root cause above."})
                sys.exit(1)
            if HOW == "hangs":
                Path(os.environ["FAKE_PID"]).write_text(str(os.getpid()))
                time.sleep(600)
        send({"done": True})
        if HOW == "lingers":
            Path(os.environ["FAKE_PID"]).write_text(str(os.getpid()))
            time.sleep(600)
