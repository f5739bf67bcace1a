"""The client's side of Flower: trains the narrow model that it was sent, on its own data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gist.config import GraphConfig, SampleConfig, TrainConfig, split_settings
from gist.csr import is_csr
from gist.errors import ConfigError, PartitionError
from gist.execution.program import Program
from gist.federated.client import clone, train_client
from gist.federated.flower.messages import Outcome, Work, fingerprint
from gist.federated.flower.records import flower, from_content, to_content
from gist.graph.data import GraphData
from gist.graph.objective import GraphObjective
from gist.partition.assignment import Assignment
from gist.partition.parts import Part, check_part
from gist.partition.spec import PartitionSpec, model_tensors
from gist.partition.subnet import build_subnet
from gist.partition.wiring import Wiring, partition_spec
from gist.samples.data import SampleData
from gist.samples.objective import SampleObjective
from gist.trainer import device_of
from gist.verify import small_model, verify_wiring

ClientData = SampleData | GraphData


def client_app(
    model_fn: Callable[[Any], nn.Module],
    data_fn: Callable[[Any], ClientData],
    *,
    wiring: Wiring | None = None,
    mods: Sequence[Any] = (),
    **settings: Any,
) -> Any:
    """The ``ClientApp`` of a client that trains what the server sends it.

    >>> app = client_app(make_model, own_data, batch_size=32)

    Args:
        model_fn: Makes the whole model, given Flower's ``Context``; its values do not matter. What
            is sent is trained where the model is; of one on the ``meta`` device, which takes no
            memory, on the CPU.
        data_fn: The client's own data, given the ``Context``, whose ``node_config`` says which
            client this is: samples, or a graph. Their training split is what is trained on.
        wiring: For a model whose wiring is not known.
        mods: Flower's modifiers of messages.
        **settings: The attributes of :class:`~gist.config.SampleConfig`, or of
            :class:`~gist.config.GraphConfig`.

    Raises:
        ConfigError: settings that cannot be used.
        MissingDependencyError: Flower is not installed.
    """
    split_settings(settings, SampleConfig, GraphConfig)
    app = flower("clientapp").ClientApp(mods=list(mods))
    message_of = flower("app").Message

    @app.train()  # type: ignore[untyped-decorator]
    def train(message: Any, context: Any) -> Any:
        outcome = answer(
            Work.unpack(from_content(message.content)),
            model_fn(context),
            data_fn(context),
            wiring=wiring,
            **settings,
        )
        return message_of(to_content(outcome.pack()), reply_to=message)

    return app


def answer(
    work: Work, model: nn.Module, data: ClientData, *, wiring: Wiring | None = None, **settings: Any
) -> Outcome:
    """Trains what a client was sent.

    Until a client has given a sound answer, its tasks verify the wiring of its model, as every run
    does.

    Args:
        work: What was sent.
        model: The whole model.
        data: The client's own.
        wiring: For a model whose wiring is not known.
        **settings: See :func:`client_app`.

    Raises:
        PartitionError: the model is not the server's, or does not fit the data.
        DataError: the message is damaged.
        ConfigError: settings that cannot be used.
    """
    spec, whole = partition_spec(model, wiring), model_tensors(model)
    if (own := fingerprint(spec, whole)) != work.model:
        raise PartitionError(
            f"{type(model).__name__} is another model than the server's",
            got=own,
            expected=work.model,
            remedy="give server_app and client_app one function that makes the model",
        )
    config = TrainConfig.from_settings({**work.settings, "seed": work.seed})
    device = device_of(model, config)
    objective = objective_of(data, device, steps=work.steps, **settings)
    if work.verify:
        small = small_model(model, spec, work.seed)
        objective.check(small)
        verify_wiring(model, *objective.sample_inputs(small), wiring=wiring, seed=work.seed)
    program = _program(work, model, spec, config, device)
    names = frozenset(work.trained)
    labels = _labels(objective.data)
    classes = _classes(labels) if work.masked_outputs else None
    start = time.perf_counter()
    losses = train_client(
        program,
        objective,
        {name: tensor if name in names else tensor.detach() for name, tensor in whole.items()},
        client=work.client,
        own=work.own,
        steps=work.steps,
        rate=work.rate,
        drawn_back=work.proximal,
        classes=classes,
    )
    seconds = time.perf_counter() - start
    back = names | {name for name, _ in program.module.named_buffers()}
    return Outcome(
        tensors=clone({n: t for n, t in program.parts()[0].items() if n in back}),
        samples=len(labels),
        losses=losses,
        passes=work.steps / objective.steps_per_epoch,
        seconds=seconds,
        classes=classes,
    )


def objective_of(
    data: ClientData, device: torch.device, *, steps: int, **settings: Any
) -> SampleObjective | GraphObjective:
    """Batches of data, their loss, and metrics.

    Raises:
        ConfigError: other data than samples and graphs, or settings that are not for them.
    """
    if isinstance(data, SampleData):
        return SampleObjective(
            data, device, _config(SampleConfig, settings), num_subnets=1, local_steps=steps
        )
    if isinstance(data, GraphData):
        graph = _config(GraphConfig, settings)
        if graph != GraphConfig(evaluation=graph.evaluation):
            raise ConfigError("a client's batch is its graph", got=graph, remedy="leave these out")
        return GraphObjective(data, device, evaluation=graph.evaluation)
    raise ConfigError(
        "these data cannot be trained on here",
        got=type(data).__name__,
        expected="a SampleData or a GraphData",
        remedy="SampleData.of((x, y), num_classes=...), GraphData.of(...)",
    )


def _config(kind: Any, settings: dict[str, Any]) -> Any:
    split_settings(settings, kind)
    return kind(**settings)


def _labels(data: Any) -> Tensor:
    """Labels of the training samples."""
    if isinstance(data, GraphData):
        return data.y[data.train_mask]
    labels: Tensor = data.labels(data.train)
    return labels


def _classes(labels: Tensor) -> Tensor:
    if labels.dim() != 1 or is_csr(labels):
        raise ConfigError(
            "outputs can be masked only where labels are class numbers",
            got=f"labels of shape {tuple(labels.shape)}",
            remedy="a strategy without masked_outputs",
        )
    present: Tensor = torch.unique(labels)
    return present


def _program(
    work: Work, model: nn.Module, spec: PartitionSpec, config: TrainConfig, device: torch.device
) -> Program:
    """The narrow model, with the entries that were sent."""
    if set(work.units) != set(spec.sizes):
        raise PartitionError(
            "units of other groups were sent", got=sorted(work.units), expected=sorted(spec.sizes)
        )
    assignment = Assignment(
        round=0, sizes=spec.sizes, held={group: (units,) for group, units in work.units.items()}
    )
    check_part(Part(assignment=assignment, tensors=work.tensors), spec, like=model_tensors(model))
    module = build_subnet(
        model,
        spec,
        assignment,
        0,
        width_correction=config.width_correction,
        filled=False,
        device=device,
    )
    program = Program(module, size=1, grouped=False, config=config)
    for name, own in program.tensors.items():
        own[0].copy_(work.tensors[name])
    return program
