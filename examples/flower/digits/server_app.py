"""The server."""

from digits.task import make_model
from gist import load_dataset
from gist.federated.flower import evaluate_on, server_app

app = server_app(make_model, evaluate_fn=evaluate_on(load_dataset("digits-images")))
