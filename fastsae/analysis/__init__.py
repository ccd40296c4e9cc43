"""Reading features: what they fire on, what they do, and whether they are what they seem."""

from fastsae.analysis.analyze import AnalyzeConfig, analyze
from fastsae.analysis.cards import Cards
from fastsae.analysis.passes import survey_of_store, take_survey
from fastsae.analysis.proxies import Proxy, proxies
from fastsae.analysis.splitting import read_split, split
from fastsae.analysis.stream import Source, read, read_store
from fastsae.analysis.survey import Survey, SurveyConfig
from fastsae.analysis.universality import match, read_match, shuffled

__all__ = [
    "AnalyzeConfig", "Cards", "Proxy", "Source", "Survey", "SurveyConfig", "analyze", "match", "proxies", "read",
    "read_match", "read_split", "read_store", "shuffled", "split", "survey_of_store", "take_survey",
]  # fmt: skip
