"""Reading features: find those of a category, and test whether they are what they seem."""

from fastsae.analysis.analyze import AnalyzeConfig, analyze
from fastsae.analysis.collect import Collected, collect
from fastsae.analysis.proxies import Proxy, proxies

__all__ = ["AnalyzeConfig", "Collected", "Proxy", "analyze", "collect", "proxies"]
