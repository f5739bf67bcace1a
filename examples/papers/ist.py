"""Accuracy of IST on MNIST or another data set of samples, against whole models on one budget.

The IST paper (Yuan et al., VLDB 2022) has fully connected networks of 2 layers, 4,096 wide, and of
3 layers, 8,192 wide, on Google Speech Commands; its final accuracies at 8 workers stand beside
where these are the data.

    python examples/papers/ist.py
"""

from __future__ import annotations

from typing import Any

from table_rows import options, run, settings, show, start

from gist.experiment import Experiment

PAPER = {
    (2, "data-parallel", 8): 79.38,
    (2, "local-sgd", 8): 79.98,
    (2, "ist", 8): 81.53,
    (3, "data-parallel", 8): 79.50,
    (3, "local-sgd", 8): 79.92,
    (3, "ist", 8): 83.27,
}
"""Table of the paper, Google Speech Commands: accuracy in percent by layers, method and workers."""


def main() -> None:
    """Prints the table."""
    parser = options(__doc__)
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--subnets", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--networks", nargs="+", default=["2x4096", "3x8192"], help="LAYERSxWIDTH of each network"
    )
    parser.add_argument("--methods", nargs="+", default=["data-parallel", "local-sgd", "ist"])
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.dataset, parsed.seeds, parsed.subnets = "digits-images", 1, [2]
        parsed.networks, parsed.epochs = ["2x64", "3x64"], parsed.epochs or 8.0
    start(parsed)
    paper = PAPER if parsed.dataset == "speech-commands" else {}
    rows = []
    data: Any = None
    for network in parsed.networks:
        layers, width = map(int, network.split("x"))
        runs = [("full", 1), *((method, m) for method in parsed.methods for m in parsed.subnets)]
        for method, m in runs:
            experiment = Experiment(
                dataset=parsed.dataset,
                method=method,
                settings=settings(parsed, method, m, layers=layers, hidden=width),
            )
            data = experiment.load_data() if data is None else data
            row, _ = run(experiment, data, seeds=parsed.seeds, paper=paper.get((layers, method, m)))
            rows.append({**row, "model": network})
    show(parsed, rows)


if __name__ == "__main__":
    main()
