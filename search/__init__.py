"""Search over sparsity vectors: Optuna proposes, Ray Tune evaluates, the study remembers."""

from search.objectives import Constraint, Objective
from search.pareto import FrontMember, ParetoFront

__all__ = ["Constraint", "FrontMember", "Objective", "ParetoFront"]
