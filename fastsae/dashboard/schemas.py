"""What the server takes and gives, with the bounds of every input: the source of its OpenAPI description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastsae.errors import MissingDependencyError

try:
    from pydantic import BaseModel, ConfigDict, Field
except ImportError:
    raise MissingDependencyError("fastsae serve needs fastapi and uvicorn: pip install 'fastsae[all]'") from None

BODY_BYTES = 1 << 20  # of a request
TEXT_CHARACTERS, PROMPT_CHARACTERS, PROXY_CHARACTERS, SEARCH_CHARACTERS = 10_000, 4_000, 500, 200
PAGE = 1000  # rows of one answer
FEATURE = 2**31 - 1  # numbers of features that are read as such; which there are, the report says

FeatureNumber = Annotated[int, Field(ge=0, le=FEATURE)]


class _Asked(BaseModel):
    # An option that is spelt wrong would be left out in silence.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ErrorMessage(BaseModel):
    """What was wrong, in one line."""

    detail: str


class TextAsked(_Asked):
    """A text to look into."""

    text: str = Field(min_length=1, max_length=TEXT_CHARACTERS)


class EditAsked(_Asked):
    """What to do to a feature at every token. pin: set it to the value. add: add the value. ablate: set it to 0.

    The value is in units of the activation; where it is left out, it is multiple × the feature's maximum in the report.
    """

    feature: FeatureNumber
    mode: Literal["pin", "add", "ablate"] = "pin"
    value: float | None = Field(None, ge=-1e6, le=1e6)
    multiple: float = Field(1.0, ge=-100, le=100)


class SteerAsked(_Asked):
    """Features to edit, and texts to go on from. temperature 0 takes the likeliest token; an empty prompt begins with
    the begin-of-text token alone."""

    edits: list[EditAsked] = Field(min_length=1, max_length=16)
    prompts: list[Annotated[str, Field(max_length=PROMPT_CHARACTERS)]] = Field([""], min_length=1, max_length=4)
    tokens: int = Field(40, ge=1, le=200)
    samples: int = Field(2, ge=1, le=4)
    temperature: float = Field(1.0, ge=0, le=5)
    seed: int = Field(0, ge=0, le=2**31 - 1)


class ProxyAsked(_Asked):
    """A proxy by name: a script of Unicode (Arabic), base64, DNA, hex, regex:PATTERN, tokens:the,of or ids:5,17; the
    last three may be given a name: years=regex:[12]\\d{3}. tokens: how much text to read where the report does not know
    it."""

    name: str = Field(min_length=1, max_length=PROXY_CHARACTERS)
    tokens: int = Field(100_000, ge=1_000, le=5_000_000)


class CompareAsked(_Asked):
    """How much text to compare the two dictionaries on."""

    tokens: int = Field(100_000, ge=1_000, le=5_000_000)


class JobStatus(BaseModel):
    """A long call. done, total: in `unit`s; total is null while it is unknown. ahead: jobs before this one."""

    id: str
    kind: Literal["steer", "proxies", "compare"]
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    unit: str
    done: int
    total: int | None
    ahead: int
    seconds: float
    result: dict[str, Any] | None
    error: str | None


class Status(BaseModel):
    """Whether questions to the model can be asked. note: why not, or that this is another dictionary or model than the
    report's. about: model, hook, sizes."""

    live: bool
    note: str | None
    about: dict[str, Any]
    version: str


class TokenRead(BaseModel):
    """text: as a reader sees it. part: it begins a character that a later token completes. count: features that fire
    here. top: the strongest, [feature, activation]."""

    text: str
    id: int
    special: bool
    part: bool
    count: int
    top: list[tuple[int, float]]


class FeatureRead(BaseModel):
    """peak: largest activation in the text, at token `at`. maximum: in the report. values: [token, activation]."""

    feature: int
    peak: float
    at: int
    count: int
    maximum: float | None
    values: list[tuple[int, float]]


class Activations(BaseModel):
    """active: how many features fire somewhere in the text; features: the strongest of them."""

    tokens: list[TokenRead]
    active: int
    features: list[FeatureRead]


class Rows(BaseModel):
    """total: rows that fit the search; rows: some of them, from number offset on."""

    total: int
    offset: int
    rows: list[dict[str, Any]]


class Compared(Rows):
    """One row for every feature that was looked for; medians over all that are live."""

    tokens: int
    medians: dict[str, float | None]
