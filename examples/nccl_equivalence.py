"""The equivalence suite on GPUs: one process against 1, 2, … workers on NCCL, bit for bit.

Every case of the tests (models, numbers of subnets, optimiser states, samplers) is trained in one
process and then under torchrun, one worker to a GPU, up to as many GPUs as there are. Weights,
history, and the bytes counted against the closed formula are compared.

    python examples/nccl_equivalence.py
    python examples/nccl_equivalence.py --device cpu --workers 1 2    # the same over Gloo
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gist.launch import launch

ROOT = Path(__file__).resolve().parents[1]
SUITE = ROOT / "tests" / "workers" / "equal.py"


def compared(alone: dict[str, Any], got: dict[str, Any]) -> list[str]:
    """Cases whose weights or history are not those of one process."""
    keys = ("weights", "rounds", "best", "scores")
    return [name for name in alone if any(alone[name][key] != got[name][key] for key in keys)]


def main() -> None:
    """Runs the suite, and says what differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workers", type=int, nargs="+", help="default: 1 to the number of GPUs")
    parsed = parser.parse_args()
    if parsed.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is at hand; --device cpu runs the same suite over Gloo")
    os.environ["GIST_TEST_DEVICE"] = parsed.device
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    gpus = max(torch.cuda.device_count(), 1)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "alone.json"
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        subprocess.run([sys.executable, SUITE, reference], check=True, env=environment)
        alone = json.loads(reference.read_text())
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        for workers in parsed.workers or range(1, gpus + 1):
            path = Path(folder) / f"{workers}.json"
            if launch([str(SUITE), str(path)], workers=workers):
                raise SystemExit(f"{workers} workers failed")
            differ = compared(alone, json.loads(path.read_text()))
            failed |= bool(differ)
            print(
                f"{workers} workers on {parsed.device}: {len(alone) - len(differ)} of {len(alone)} "
                f"cases equal bit for bit{'; not ' + ', '.join(differ) if differ else ''}",
                flush=True,
            )
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
