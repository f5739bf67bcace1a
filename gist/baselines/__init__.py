"""What subnet training is compared with, on the same data and budget."""

from gist.baselines.full import full_model_settings

__all__ = ["full_model_settings"]
