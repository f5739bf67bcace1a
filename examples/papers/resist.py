"""Accuracy of ResIST on CIFAR-10 against whole models and local SGD on one budget.

The ResIST paper (Dun et al., UAI 2022) trains a pre-activation ResNet-101; its accuracies on
CIFAR-10 stand beside. By default this is a small network on a part of the images.

    python examples/papers/resist.py
"""

from __future__ import annotations

from typing import Any

from table_rows import image_options, images, run, settings, show, start

from gist.experiment import Experiment

PAPER = {
    ("local-sgd", 2): 92.36,
    ("local-sgd", 4): 92.90,
    ("local-sgd", 8): 92.00,
    ("resist", 2): 91.95,
    ("resist", 4): 92.35,
    ("resist", 8): 91.45,
}
"""The paper's accuracy in percent on CIFAR-10, ResNet-101, by method and number of subnets."""


def main() -> None:
    """Prints the table."""
    parser = image_options(__doc__, "preact-resnet32")
    parser.add_argument("--methods", nargs="+", default=["local-sgd", "resist"])
    parsed = parser.parse_args()
    dataset, data_options = images(parsed)
    start(parsed)
    paper = {} if parsed.quick else PAPER
    rows = []
    data: Any = None
    for method, m in [("full", 1), *((k, m) for k in parsed.methods for m in parsed.subnets)]:
        experiment = Experiment(
            dataset=dataset,
            method=method,
            data_options=data_options,
            settings=settings(parsed, method, m, model=parsed.model, hidden=parsed.hidden),
        )
        data = experiment.load_data() if data is None else data
        row, _ = run(experiment, data, seeds=parsed.seeds, paper=paper.get((method, m)))
        rows.append(row)
    show(parsed, rows)


if __name__ == "__main__":
    main()
