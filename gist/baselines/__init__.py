"""What subnet training is compared with, on the same data and budget."""

from gist.baselines.data_parallel import DataParallelTrainer, data_parallel_settings
from gist.baselines.ensemble import EnsembleTrainer, ensemble_settings
from gist.baselines.full import full_model_settings
from gist.baselines.local_sgd import local_sgd_settings

__all__ = [
    "DataParallelTrainer",
    "EnsembleTrainer",
    "data_parallel_settings",
    "ensemble_settings",
    "full_model_settings",
    "local_sgd_settings",
]
