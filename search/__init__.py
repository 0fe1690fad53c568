"""Search over vectors: Optuna proposes, Ray Tune evaluates, the study remembers."""

from search.pareto import FrontMember, ParetoFront
from search.problem import Constraint, Objective, SearchProblem
from search.space import GeneSpace

__all__ = ["Constraint", "FrontMember", "GeneSpace", "Objective", "ParetoFront", "SearchProblem"]
