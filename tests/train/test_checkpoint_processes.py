"""Two processes write one checkpoint, verify it together, and hear of each other's failures."""

import json
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_two_processes_agree(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.train.checkpoint_processes"]
    logs = [(tmp_path / f"{rank}.log").open("w+") for rank in range(2)]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path), str(port)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
                 for rank, log in enumerate(logs)]
    try:
        codes = [process.wait(240) for process in processes]
    finally:
        for process, log in zip(processes, logs):
            process.kill()
            process.wait()
            log.close()
    assert codes == [0, 0], "\n".join((tmp_path / f"{rank}.log").read_text()[-2000:] for rank in range(2))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert second.pop("alone") is True
    assert first == second, "no process goes on alone"
    assert first["after wait"] == 6 and first["all is well"] == f"resume {tmp_path / 'toy'} at step 6"
    assert "step 6" in first["damaged"] and "does not have the sha256" in first["damaged"] and "/d/" in first["damaged"]
    assert first["fallback"] == f"resume {tmp_path / 'toy'} at step 4, the damaged step 6 set aside"
    assert "saving step 6" in first["failed"] and "No space left" in first["failed"] and "older steps (4) are intact" in first["failed"]
    assert first["left"] == f"resume {tmp_path / 'toy'} at step 4"
    assert sorted(path.name for path in (tmp_path / "toy" / "checkpoints").iterdir()) == ["4", "6", "6.damaged"]
