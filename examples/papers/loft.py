"""Tickets of LoFT on CIFAR-10: filters ranked after training in subnets, pruned, and fine-tuned.

The LoFT paper (Wang et al., AISTATS 2023) prunes a PreActResNet-34 by 80% and 50%; its accuracies
after fine-tuning stand beside. Whole models and local SGD train on the same budget; tickets of the
whole model, fine-tuned as long, are what those of LoFT are compared with; tickets that are rewound
to their first values and trained anew show what the chosen filters are worth.

    python examples/papers/loft.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from table_rows import image_options, images, of_runs, run, say, settings, show, start

from gist import FilterRanks, LoFTTrainer, find_ticket, partition_spec, wire_filters
from gist.experiment import Experiment
from gist.plots import distance_heatmap, save_figure

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
    parser = image_options(__doc__, "preact-resnet20")
    parser.add_argument("--methods", nargs="+", default=["local-sgd", "loft"])
    parser.add_argument("--pruned", type=float, nargs="+", default=[0.5, 0.8])
    parser.add_argument("--finetune-epochs", type=float, help="a quarter of the budget by default")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw how rankings settled")
    parsed = parser.parse_args()
    dataset, data_options = images(parsed)
    if parsed.quick:
        parsed.pruned = [0.5]
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
        row, trainers = run(
            experiment,
            data,
            seeds=parsed.seeds,
            paper=paper.get((m, 0.0)),
            watch=None if method == "local-sgd" else FilterRanks,
        )
        rows.append(row)
        if method == "local-sgd":
            continue
        budget = trainers[0].history[-1].epochs
        tuning = parsed.finetune_epochs or budget / 4
        for share in parsed.pruned:
            for way, epochs in (("fine-tuned", tuning), ("rewound", budget)):
                found = [
                    _of_ticket(experiment, trainer, data, share, way, epochs, seed)
                    for seed, trainer in enumerate(trainers)
                ]
                row = {
                    **row,
                    "method": f"{method}, {share:.0%} pruned, {way}",
                    **of_runs([vars(result) for result in found]),
                    "bytes_per_round": 0,
                    "paper": paper.get((m, share)) if way == "fine-tuned" else None,
                }
                say(row)
                rows.append(row)
    if parsed.plot is not None:
        (ranks,) = trainers[0].config.callbacks
        distances = {group: ranks.distances(group) for group in ranks.rankings}
        save_figure(distance_heatmap(distances, ranks.epochs), parsed.plot)
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


if __name__ == "__main__":
    main()
