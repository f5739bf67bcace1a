"""A client."""

from digits.task import make_model, own_data
from gist.federated.flower import client_app

app = client_app(make_model, own_data, batch_size=32)
