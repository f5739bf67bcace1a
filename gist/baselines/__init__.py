"""What subnet training is compared with, on the same data and budget."""

from gist.baselines.data_parallel import (
    DataParallelTrainer,
    SampleDataParallelTrainer,
    data_parallel_settings,
)
from gist.baselines.ensemble import EnsembleTrainer, ensemble_settings
from gist.baselines.full import full_model_settings
from gist.baselines.local_sgd import local_sgd_settings

__all__ = [
    "DataParallelTrainer",
    "EnsembleTrainer",
    "SampleDataParallelTrainer",
    "data_parallel_settings",
    "ensemble_settings",
    "full_model_settings",
    "local_sgd_settings",
]
