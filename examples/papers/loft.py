"""Tickets of LoFT on CIFAR-10: filters ranked after training in subnets, pruned, and fine-tuned.

The LoFT paper (Wang et al., AISTATS 2023) prunes a PreActResNet-34 by 80% and 50%; its accuracies
after fine-tuning stand beside. Tickets of the whole model, trained on the same budget and
fine-tuned as long, are what they are compared with; tickets that are rewound to their first values
and trained anew show what the chosen filters are worth.

    python examples/papers/loft.py
"""

from __future__ import annotations

from typing import Any

import torch

from gist import LoFTTrainer, find_ticket, partition_spec, wire_filters
from gist.experiment import Experiment
from runs import options, run, settings, show, start

PAPER = {
    (1, 0.0): 93.51,
    (2, 0.8): 93.25,
    (2, 0.5): 93.43,
    (4, 0.8): 93.89,
    (4, 0.5): 94.02,
}
"""The paper's accuracy in percent on CIFAR-10, by number of subnets and share pruned."""


def main() -> None:
    """Prints the table."""
    parser = options(__doc__)
    parser.add_argument("--model", default="preact-resnet20")
    parser.add_argument("--hidden", type=int, default=16, help="width of the first stage")
    parser.add_argument("--subnets", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--train-size", type=int, default=50_000, help="training images")
    parser.add_argument("--pruned", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--finetune-epochs", type=float, help="a quarter of the budget by default")
    parsed = parser.parse_args()
    dataset = "cifar10"
    options_: dict[str, Any] = {}
    if parsed.quick:
        dataset, parsed.hidden, parsed.subnets, parsed.seeds = "digits-images", 8, [2], 1
        parsed.epochs, parsed.pruned = parsed.epochs or 4.0, [0.5]
    elif parsed.train_size < 45_000:
        options_ = {"train_size": parsed.train_size}
    start(parsed)
    rows = []
    data: Any = None
    for method, m in [("full", 1), *(("loft", m) for m in parsed.subnets)]:
        experiment = Experiment(
            dataset=dataset,
            method=method,
            data_options=options_,
            settings=settings(parsed, method, m, model=parsed.model, hidden=parsed.hidden),
        )
        data = experiment.load_data() if data is None else data
        row, trainers = run(experiment, data, seeds=parsed.seeds, paper=PAPER.get((m, 0.0)))
        rows.append(row)
        budget = trainers[0].history[-1].epochs
        tuning = parsed.finetune_epochs or budget / 4
        for share in parsed.pruned:
            for way, epochs in (("fine-tuned", tuning), ("rewound", budget)):
                found = [
                    _of_ticket(experiment, trainer, data, share, way, epochs, seed)
                    for seed, trainer in enumerate(trainers)
                ]
                rows.append(
                    {
                        **row,
                        "method": f"{method}, {share:.0%} pruned, {way}",
                        "test_metric": 100 * sum(r.test_metric for r in found) / len(found),
                        "test_std": 100 * _deviation([r.test_metric for r in found]),
                        "last_test_metric": 100
                        * sum(r.last_test_metric for r in found)
                        / len(found),
                        "seconds": sorted(r.seconds for r in found)[len(found) // 2],
                        "bytes_per_round": 0,
                        "paper": PAPER.get((m, share)) if way == "fine-tuned" else None,
                    }
                )
    show(parsed, rows)


def _of_ticket(
    experiment: Experiment,
    trainer: Any,
    data: Any,
    share: float,
    way: str,
    epochs: float,
    seed: int,
) -> Any:
    """Result of training the smaller model that pruning leaves, from where it is or anew."""
    filters = partition_spec(trainer.model, wire_filters)
    source = trainer.model
    if way == "rewound":
        model_settings, _ = experiment.family.split_model_settings(experiment.resolved())
        source = experiment.family.build_model(data, seed=seed, **model_settings)
    small = find_ticket(trainer.model, filters, pruned=share).cut(source)
    torch.manual_seed(seed)
    config = trainer.config
    return LoFTTrainer(
        small,
        data,
        num_subnets=1,
        epochs=epochs,
        optimizer=config.optimizer,
        lr=config.lr if way == "rewound" else config.lr / 10,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        optimizer_state="carry",
        local_steps=config.local_steps,
        batch_size=trainer.sample_config.batch_size,
        progress=False,
        seed=seed,
    ).fit()


def _deviation(values: list[float]) -> float:
    return float(torch.tensor(values).std()) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
