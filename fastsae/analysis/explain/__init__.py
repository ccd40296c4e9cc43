"""Automated interpretability: explain features from examples, and score the explanations on text they have not seen."""

from fastsae.analysis.explain.accounting import Accounting, Ledger
from fastsae.analysis.explain.compare import Summary, compare
from fastsae.analysis.explain.config import ExplainConfig, explainer_of
from fastsae.analysis.explain.explainers import Explainer, Explanation, OfflineExplainer
from fastsae.analysis.explain.pattern import Pattern
from fastsae.analysis.explain.run import ExplainResult, cache_in, explain, explain_features
from fastsae.analysis.explain.search import SearchConfig, find_pattern

__all__ = [
    "Accounting",
    "ExplainConfig",
    "ExplainResult",
    "Explainer",
    "Explanation",
    "Ledger",
    "OfflineExplainer",
    "Pattern",
    "SearchConfig",
    "Summary",
    "cache_in",
    "compare",
    "explain",
    "explain_features",
    "explainer_of",
    "find_pattern",
]
