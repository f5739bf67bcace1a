"""Two workers with different settings: refused. Run by test_faults.py."""

from __future__ import annotations

import os

from tests.workers.equal import make

make("csbm gcn m=4 reset", num_subnets=4 + int(os.environ["RANK"])).fit()
