"""`python -m tests.multiprocess.peers_harness PROCESSES SCENARIO FOLDER`; 0 processes: only this one, as one of them."""

import os
import signal
import sys
import time
from pathlib import Path

from conan_jax import distributed
from conan_jax.errors import ConanError, ConfigError, DataError
from conan_jax.launch.local import Local


def fail() -> None:
    raise ConfigError("the data is bad")


def scene(scenario: str, folder: Path) -> None:
    distributed.initialise(timeout_seconds=1 if scenario == "unreachable" else 60)
    distributed._GRACE_SECONDS, distributed._SHARED_SECONDS = 2.0, 2.0
    me = int(os.environ["CONAN_PROCESS_ID"])
    with distributed.Peers(folder / f"of-{me}" if scenario == "unshared" else folder) as peers:
        if scenario == "fails":
            peers.alone("fail", lambda: time.sleep(1) or fail())
        if scenario == "elsewhere":
            if peers.index == 1:
                raise DataError("a shard is damaged")
            time.sleep(60)
            print("was never ended", flush=True)
        began = time.monotonic()
        value = peers.alone("work", lambda: 7 if peers.index == 0 else None)
        peers.alone("slow", lambda: time.sleep(1.2))
        waited = 0 if peers.index == 0 else int(time.monotonic() - began)
        print(f"alone gave {value} after {waited}", flush=True)
        agree()


def agree() -> None:
    import jax
    from jax.sharding import AxisType

    mesh = jax.make_mesh((1, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    agreement = distributed.Agreement(mesh)
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    for step in range(1, 10):
        if step == 4 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if agreement.ask(bool(asked)):
            break
    print(f"stops before step {step}", flush=True)
    print(f"settled {distributed.Agreement(mesh).settle(bool(asked))}", flush=True)


def main(processes: str, scenario: str, folder: str) -> None:
    if processes != "0" and "CONAN_PROCESS_ID" not in os.environ:
        grace = 5.0 if scenario == "unshared" else 30.0
        sys.exit(Local([sys.executable, "-m", __spec__.name, *sys.argv[1:]], int(processes), grace_seconds=grace).run())
    try:
        scene(scenario, Path(folder))
    except ConanError as error:
        print(f"conan: {error}", flush=True)
        distributed.leave(error.exit_code)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(*sys.argv[1:])
