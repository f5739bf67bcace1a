"""What a plan promises is what a run takes: measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from gist import GISTTrainer, load_dataset
from gist.costs.estimate import estimate_costs
from gist.graph.outline import GraphShape
from gist.nn import GCN, GraphSAGE

nodes, degree, features, width, layers, kind, executor = json.loads(sys.argv[1])
settings = dict(num_subnets=4, rounds=2, local_steps=2, executor=executor, evaluation="full")
data = load_dataset(
    "csbm", num_nodes=nodes, num_features=features, num_classes=10, average_degree=degree,
    degree_exponent=None,
)
Model = {"gcn": GCN, "sage": GraphSAGE}[kind]
with torch.device("meta"):
    outline = Model(features, width, 10, layers)
planned = estimate_costs(outline, GraphShape.of(data), **settings).peak_memory_bytes
model = Model(features, width, 10, layers)
# A limit close to the plan: freed memory is then given back instead of kept for reuse.
trainer = GISTTrainer(model, data, progress=False, memory_limit=int(1.25 * planned), **settings)
print(json.dumps([planned, trainer.fit().peak_memory_bytes]))
"""


@pytest.mark.parametrize("executor", [pytest.param("serial", marks=pytest.mark.slow), "stacked"])
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((300, 10, 50, 4_096, 3, "sage"), id="wide"),
        pytest.param((60_000, 10, 64, 256, 2, "gcn"), id="many nodes", marks=pytest.mark.slow),
        pytest.param((5_000, 10, 50, 1_024, 6, "sage"), id="deep", marks=pytest.mark.slow),
    ],
)
def test_the_measured_peak_stays_within_15_percent_above_the_plan(shape, executor):
    argument = json.dumps([*shape, executor])
    command = [sys.executable, "-c", RUN, argument]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    planned, measured = json.loads(done.stdout.splitlines()[-1])
    assert measured <= 1.15 * planned, (measured, planned)
    assert planned <= 1.6 * measured, "a plan that promises too much says nothing"


ON_SAMPLES = """
import json, sys
import torch
torch.set_num_threads(1)
from gist import SampleData, estimate_costs
from gist.methods import ISTTrainer, LoFTTrainer, ResISTTrainer
from gist.nn import MLP, PreActResNet
from gist.samples.outline import SampleShape

method, batch_size, eval_batch_size = json.loads(sys.argv[1])
settings = dict(num_subnets=2, rounds=2, local_steps=2, executor="serial", batch_size=batch_size)
settings |= dict(eval_batch_size=eval_batch_size)
Trainer = {"ist": ISTTrainer, "resist": ResISTTrainer, "loft": LoFTTrainer}[method]
generator, count = torch.Generator().manual_seed(0), 2000
y = torch.randint(10, (count,), generator=generator)
if method == "ist":
    build, x = lambda: MLP(256, 4096, 10, 3), torch.rand(count, 256, generator=generator)
else:
    build = lambda: PreActResNet((2, 3), (16, 32), block="basic")
    x = torch.randint(256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
data = SampleData.of((x, y))
with torch.device("meta"):
    outline = build()
wiring, config, samples = Trainer.choose(settings)
shape = SampleShape.of(data)
costs = estimate_costs(outline, shape, wiring=wiring, config=config, **vars(samples))
limit = int(1.25 * costs.peak_memory_bytes)
trainer = Trainer(build(), data, progress=False, memory_limit=limit, **settings)
print(json.dumps([costs.peak_memory_bytes, trainer.fit().peak_memory_bytes, costs.peak_phase]))
"""


@pytest.mark.parametrize(
    ("run", "phase"),
    [
        pytest.param(("ist", 1000, 1000), "verification", marks=pytest.mark.slow),
        pytest.param(("resist", 500, 100), "training", marks=pytest.mark.slow),
        pytest.param(("resist", 64, 1600), "evaluation"),
        pytest.param(("loft", 600, 1000), "training", marks=pytest.mark.slow),
    ],
)
def test_a_run_on_samples_stays_within_its_plan(run, phase):
    """Convolutions lay out anew what they read and write: that is in it."""
    command = [sys.executable, "-c", ON_SAMPLES, json.dumps(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    planned, measured, peak_phase = json.loads(done.stdout.splitlines()[-1])
    assert peak_phase == phase
    assert measured <= 1.02 * planned, (measured, planned)
    assert planned <= 1.3 * measured
