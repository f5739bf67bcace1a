"""The theory under independent subnet training: kernels, bounds, floors, and training to test them.

One hidden layer of rectified linear units, regression, full batches (Liao & Kyrillidis, arXiv
2112.02668; GIST, arXiv 2102.10424, section 4; AsyncDrop, arXiv 2210.16105, section 3.1). Where a
paper's statement does not hold as it is printed, the function concerned computes the corrected one
and says so.
"""

from gist.theory.assumptions import GraphReport, graph_report
from gist.theory.delay import delayed_gain, delayed_rates
from gist.theory.graph_kernels import (
    gist_gamma,
    gist_gap,
    gist_radius,
    gist_step,
    graph_problem,
    propagation_matrix,
    propagation_norm,
)
from gist.theory.kernels import Spectrum, activation_kernel, angles, finite_ntk, ntk
from gist.theory.lab import SCHEMES, VARIED, Contraction, Floor, contraction, default_lr, floors
from gist.theory.masked import (
    MaskedTraining,
    RoundTrace,
    merge_subnets,
    single_step,
    train_subnets,
)
from gist.theory.noise import (
    bound_variance,
    categorical_order,
    copy_variance,
    noise_floor,
    sampling_variance,
)
from gist.theory.problem import Network, Problem
from gist.theory.rates import loss_bound, mode_rates
from gist.theory.scheme import Scheme

__all__ = [
    "SCHEMES",
    "VARIED",
    "Contraction",
    "Floor",
    "GraphReport",
    "MaskedTraining",
    "Network",
    "Problem",
    "RoundTrace",
    "Scheme",
    "Spectrum",
    "activation_kernel",
    "angles",
    "bound_variance",
    "categorical_order",
    "contraction",
    "copy_variance",
    "default_lr",
    "delayed_gain",
    "delayed_rates",
    "finite_ntk",
    "floors",
    "gist_gamma",
    "gist_gap",
    "gist_radius",
    "gist_step",
    "graph_problem",
    "graph_report",
    "loss_bound",
    "merge_subnets",
    "mode_rates",
    "noise_floor",
    "ntk",
    "propagation_matrix",
    "propagation_norm",
    "sampling_variance",
    "single_step",
    "train_subnets",
]
