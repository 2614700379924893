"""Causal tracing (ROME, section 2): which layer's states carry a fact, and which to edit.

`choose_facts` finds facts that the model knows, `trace` measures, `average` gives means with intervals, `propose` names
layers, `draw` draws.
"""

from fastmemit.tracing.averages import Average, average
from fastmemit.tracing.facts import GROUPS, Chosen, TracedFact, choose_facts, encode_fact
from fastmemit.tracing.figure import draw
from fastmemit.tracing.noise import subject_noise
from fastmemit.tracing.proposal import Proposal, propose
from fastmemit.tracing.schema import Located, located
from fastmemit.tracing.settings import KINDS, TraceSettings
from fastmemit.tracing.sites import restored_module
from fastmemit.tracing.trace import NonFiniteProbability, Trace, count_states, trace

__all__ = [
    "GROUPS",
    "KINDS",
    "Average",
    "Chosen",
    "Located",
    "NonFiniteProbability",
    "Proposal",
    "Trace",
    "TraceSettings",
    "TracedFact",
    "average",
    "choose_facts",
    "count_states",
    "draw",
    "encode_fact",
    "located",
    "propose",
    "restored_module",
    "subject_noise",
    "trace",
]
