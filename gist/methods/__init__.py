"""Subnet training of other families than graph networks: each method is a few choices."""

from gist.methods.ist import ISTTrainer
from gist.methods.loft import LoFTTrainer
from gist.methods.resist import ResISTTrainer
from gist.methods.samples import SampleTrainer
from gist.methods.tickets import FilterRanks, Ticket, find_ticket, ranking_distance

__all__ = [
    "FilterRanks",
    "ISTTrainer",
    "LoFTTrainer",
    "ResISTTrainer",
    "SampleTrainer",
    "Ticket",
    "find_ticket",
    "ranking_distance",
]
