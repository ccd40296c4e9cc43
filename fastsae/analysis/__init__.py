"""Reading features: what they fire on, what they do, and whether they are what they seem.

Functions that have a module's name (`quality`, `gaps`, `specificity`, `ablation`, …) are imported from that module.
"""

from fastsae.analysis.analyze import AnalyzeConfig, analyze
from fastsae.analysis.cards import Cards, Partner
from fastsae.analysis.evidence import evidence_of, explain_dictionary, live_features
from fastsae.analysis.examples import Evidence, Example
from fastsae.analysis.explain import ExplainConfig
from fastsae.analysis.labels import TokenBytes
from fastsae.analysis.passes import Watcher, survey_of_store, take_survey
from fastsae.analysis.proxies import Charset, Either, Function, Proxy, Regex, Script, TokenSet, proxies
from fastsae.analysis.quality import Geometry, Quality, UltraLow, geometry, ultra_low
from fastsae.analysis.specificity import Overlap
from fastsae.analysis.splitting import Split, SplitConfig, read_split, split
from fastsae.analysis.steering import SteerConfig, steer
from fastsae.analysis.store_report import analyze_store
from fastsae.analysis.stream import Read, Source, read, read_store
from fastsae.analysis.survey import Survey, SurveyConfig
from fastsae.analysis.text import Text
from fastsae.analysis.universality import Match, MatchConfig, match, read_match, shuffled

__all__ = [
    "AnalyzeConfig", "Cards", "Charset", "Either", "Evidence", "Example", "ExplainConfig", "Function", "Geometry",
    "Match", "MatchConfig", "Overlap", "Partner", "Proxy", "Quality", "Read", "Regex", "Script", "Source", "Split",
    "SplitConfig", "SteerConfig", "Survey", "SurveyConfig", "Text", "TokenBytes", "TokenSet", "UltraLow", "Watcher",
    "analyze", "analyze_store", "evidence_of", "explain_dictionary", "geometry", "live_features", "match", "proxies",
    "read", "read_match", "read_split", "read_store", "shuffled", "split", "steer", "survey_of_store", "take_survey",
    "ultra_low",
]  # fmt: skip
