"""A GraphSAGE wider than any one device trains whole: rounds, losses, memory, disk.

The graph is generated, with the features and classes of Amazon2M (100 and 47), small enough for a
few real rounds to be over in minutes. What a subnet holds of the model is 1/m² of its hidden
weights, so memory is set by where the whole model lives. GIST's authors ran out of it for 32,768
units in three layers with m = 2 and 4 (Wolfe et al., arXiv 2102.10424, table 3).

    python examples/ultra_wide.py --width 32768 --subnets 8
    python examples/ultra_wide.py --width 32768 --subnets 4
    python examples/ultra_wide.py --width 16384 --layers 4 --subnets 8
    python examples/ultra_wide.py --width 65536 --subnets 16 --store disk --out runs/ultra

A store on disk takes the model's size there, and what memory is left serves as its cache.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from gist import GISTTrainer, RoundRecord, load_dataset
from gist.execution.tensorfile import FileLayout
from gist.nn import GraphSAGE
from gist.partition.spec import model_tensors

GIB = 2**30

RATE = 0.4
"""Learning rate of one unit: what Adam does to a sum grows with the number of its terms."""


def main() -> None:
    """Trains for a few rounds and prints what they cost."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--width", type=int, default=32768, help="units of every hidden layer")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--subnets", type=int, default=8, help="m")
    parser.add_argument("--store", default="memory", choices=["memory", "disk"])
    parser.add_argument("--out", type=Path, help="directory of the run; a temporary one by default")
    parser.add_argument("--nodes", type=int, default=2000)
    parser.add_argument("--clusters", type=int, help="cut the graph into so many; default: do not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--lr", type=float, help=f"default: {RATE} / units that a subnet holds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parsed = parser.parse_args()
    torch.set_num_threads(parsed.threads)

    with ExitStack() as stack:
        out = parsed.out
        if out is None and parsed.store == "disk":
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ultra-wide-")))
        train(parsed, out)


def train(parsed: argparse.Namespace, out: Path | None) -> None:
    """Builds the model where it is to live, trains, and prints."""
    data = load_dataset("csbm", num_nodes=parsed.nodes, num_features=100, num_classes=47, seed=0)
    start = time.perf_counter()
    torch.manual_seed(0)
    with torch.device("meta" if parsed.store == "disk" else "cpu"):
        model = GraphSAGE(
            data.num_features, parsed.width, data.num_classes, parsed.layers, dropout=0.2
        )
    size = FileLayout.of(model_tensors(model)).nbytes
    count = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"GraphSAGE, {parsed.width:,} wide, {parsed.layers} layers: {count:,} parameters, "
        f"{size / GIB:.1f} GiB in {parsed.store}; m = {parsed.subnets}",
        flush=True,
    )
    trainer = GISTTrainer(
        model,
        data,
        num_subnets=parsed.subnets,
        local_steps=parsed.local_steps,
        rounds=parsed.rounds,
        lr=RATE * parsed.subnets / parsed.width if parsed.lr is None else parsed.lr,
        schedule="constant",
        executor="serial",  # one subnet at a time takes the least memory
        clusters=parsed.clusters,
        evaluation="layerwise",
        eval_every=parsed.rounds,
        store=parsed.store,
        keep_best=False,  # a second copy of the model, otherwise
        out=out,
        callbacks=report,
        progress=False,
    )
    print(f"built and checked in {time.perf_counter() - start:.1f} s", flush=True)
    result = trainer.fit()
    print(
        f"test accuracy {100 * result.last_test_metric:.1f}%; {result.seconds:.1f} s training, of "
        f"these {result.repartition_seconds:.1f} s re-partition; {result.eval_seconds:.1f} s "
        f"evaluation; {max(result.parameters_per_subnet):,} parameters in a subnet; "
        f"peak memory {result.peak_memory_bytes / GIB:.2f} GiB"
    )


def report(trainer: GISTTrainer, record: RoundRecord) -> None:
    """Prints a round."""
    print(
        f"round {record.round + 1}: training loss {record.train_loss:.4f}, "
        f"{record.seconds:.1f} s so far, re-partition {record.repartition_seconds:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
