"""Features that split as the dictionary grows: a layered graph over dictionaries of one model, and a map of them.

Axes: n tokens, F features of a dictionary, M points of the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.analysis.checkpoint import Arrays
from fastsae.analysis.cross import FeatureSums, add_products, cosine, entries, joined, load_joined, row_blocks
from fastsae.analysis.follows import Follows
from fastsae.analysis.parts import Parted
from fastsae.analysis.reading import pass_file, read_into
from fastsae.analysis.splits import Edges, Split, SplitConfig
from fastsae.analysis.stream import Read, Source, check_rank
from fastsae.codes import SparseCode
from fastsae.errors import FastSAEError, MissingDependencyError
from fastsae.files import write_json
from fastsae.harvest import check_options


def split(
    sources: Sequence[Source],
    tokenizer: Any,
    documents: Sequence[Any],
    config: SplitConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    show_progress: bool = True,
    **options: Any,
) -> Split:
    """Joins features of dictionaries of growing width on one module of one model, in one pass over the documents.

    An edge stands where the cosine of the activations, over the tokens on which one of both features fires, is above
    the threshold (Bricken et al. 2023). That is Σ f g / √(Σ f² · Σ g²) with sums over *all* tokens: where neither
    fires, f and g are 0 and add nothing.

    out: a folder for split.json; while the pass runs, split.pass.npz is kept there, once a minute and on Ctrl-C.
    resume: go on from such a file; the result is the same, bit for bit. A part of the text each by several processes:
    `read_split`.

    Raises FastSAEError: what `read` raises; fewer than two dictionaries, of different modules, or not from the
    narrowest to the widest; products that need more than config.memory; a file of an unfinished pass without resume,
    or of another pass.
    """
    found = read_split(
        sources, tokenizer, documents, config, out=out, resume=resume, show_progress=show_progress, **options
    ).result()
    if out is not None:
        found.save(Path(out) / "split.json")
        pass_file(out, "split").unlink(missing_ok=True)
    return found


def read_split(
    sources: Sequence[Source],
    tokenizer: Any,
    documents: Sequence[Any],
    config: SplitConfig | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    rank: int = 0,
    world: int = 1,
    show_progress: bool = True,
    **options: Any,
) -> Splitting:
    """The pass of `split` by one of several processes, over every world-th context; the sums, to merge.

    With out every rank keeps its sums there, also when it is done; `universality.read_match` shows how they are merged.
    Raises as `split`; a rank that is not from 0 to world − 1.
    """
    config = replace(config or SplitConfig(), **check_options(SplitConfig, options))
    check_rank(rank, world)
    if len(sources) < 2:
        raise FastSAEError(f"expected at least two dictionaries, got {len(sources)}")
    if any(source.model is not sources[0].model or source.hook != sources[0].hook for source in sources):
        raise FastSAEError("expected dictionaries of one module of one model, got several: compare those with match")
    splitting = Splitting([source.sae.cfg.d_sae for source in sources], config, sources[0].sae.device)
    read_into(
        splitting, sources, tokenizer, documents, config, "split", out=out, resume=resume, rank=rank, world=world,
        show_progress=show_progress,
    )  # fmt: skip
    return splitting


class Splitting(Parted):
    """The sums of one graph: `add` the codes of the same tokens by every dictionary, then `result`. `merge` takes in
    the sums of other tokens. of, parts: as of a Survey; missing() tells which ranks are not in."""

    def __init__(self, widths: Sequence[int], config: SplitConfig, device: torch.device | str = "cpu") -> None:
        if list(widths) != sorted(widths):
            raise FastSAEError(f"expected dictionaries from the narrowest to the widest, got widths {list(widths)}")
        pairs = list(zip(widths, widths[1:], strict=False))
        need = 8 * sum(a * b for a, b in pairs) / 2**30
        if need > config.memory:
            raise FastSAEError(
                f"widths {list(widths)} need {need:.3g} GiB of sums, memory allows {config.memory:g}: raise memory, or "
                "leave the widest dictionary out"
            )
        super().__init__()
        self.config, self.device = config, torch.device(device)
        self._sums = [FeatureSums(size, device) for size in widths]
        self._products = [torch.zeros(a, b, dtype=torch.float64, device=device) for a, b in pairs]

    def add(self, some: Read | Sequence[SparseCode]) -> None:
        """A Read of the dictionaries in their order, or the codes alone."""
        codes = some.codes if isinstance(some, Read) else some
        parts = [entries(code, self.device) for code in codes]
        for sums, part in zip(self._sums, parts, strict=True):
            sums.add(part)
        for out, a, b in zip(self._products, parts, parts[1:], strict=False):
            add_products(out, a, b)

    def arrays(self) -> Arrays:
        """The whole state, to be saved."""
        products = {f"products{i}": xy.cpu().numpy() for i, xy in enumerate(self._products)}
        sums = joined({f"sums{i}": sums for i, sums in enumerate(self._sums)})
        return products | sums | self._parted_arrays()

    def load(self, arrays: Arrays) -> None:
        """What `arrays` gave to a Splitting of the same widths."""
        for i, xy in enumerate(self._products):
            xy.copy_(torch.from_numpy(arrays[f"products{i}"]))
        load_joined({f"sums{i}": sums for i, sums in enumerate(self._sums)}, arrays)
        self._load_parted(arrays)

    def merge(self, other: Splitting) -> None:
        """Takes in the sums of other tokens.

        Raises FastSAEError for a graph of something else, or of a part of the text that is in already.
        """
        mine, theirs = ((s.config, [xy.shape for xy in s._products]) for s in (self, other))
        if mine != theirs:
            raise FastSAEError("graphs to merge must be of the same dictionaries with the same configuration")
        self._join(other, "graphs", empty=not self._sums[0].n)
        for sums, more in zip(self._sums, other._sums, strict=True):
            sums.merge(more)
        for xy, more in zip(self._products, other._products, strict=True):
            xy += more.to(xy.device)

    def result(self, partial: bool = False) -> Split:
        """The graph. Raises FastSAEError where ranks are missing, unless partial: of what is in."""
        if not partial:
            self._check_whole("the sums of a graph")
        edges = tuple(
            self._edges(*step) for step in zip(self._products, self._sums, self._sums[1:], strict=False)
        )  # fmt: skip
        n = self._sums[0].n
        density = tuple((sums.fires / max(n, 1)).cpu() for sums in self._sums)
        return Split(n, self.config.threshold, density, edges)

    def _edges(self, xy: Tensor, x: FeatureSums, y: FeatureSums) -> Edges:
        few, found = self.config.min_fires, []
        for rows in row_blocks(len(xy)):
            part = x.rows(rows)
            cosines = cosine(xy[rows], part, y)
            close = (cosines > self.config.threshold) & (part.fires >= few)[:, None] & (y.fires >= few)
            parents, children = close.nonzero(as_tuple=True)
            values = cosines[parents, children].cpu()
            parents, children = parents.cpu() + rows.start, children.cpu()
            order = torch.from_numpy(np.lexsort((-values.numpy(), parents.numpy())))
            found.append((parents[order], children[order], values[order].float()))
        return Edges(*(torch.cat(column) for column in zip(*found, strict=True)))


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """Features of several dictionaries in the plane. layer, feature: [M] int64, which dictionary and which feature.
    points: [M, 2] float32. clusters: [M] int64, −1 for what is in none."""

    layer: np.ndarray
    feature: np.ndarray
    points: np.ndarray
    clusters: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {name: getattr(self, name).tolist() for name in ("layer", "feature", "points", "clusters")}


def map_of(
    decoders: Sequence[Tensor],
    keep: Sequence[Tensor] | None = None,
    *,
    neighbors: int = 15,
    min_dist: float = 0.05,
    min_cluster: int = 5,
    seed: int = 0,
) -> FeatureMap:
    """UMAP (cosine metric) of the decoder rows of several dictionaries of one width D, and HDBSCAN clusters.

    decoders: [F, D] each. keep: masks [F] or numbers of the features to show of each, such as those that fire: rows of
    dead latents are where they were initialised. neighbors, min_dist: UMAP's. min_cluster: features in a cluster at
    least. The clusters are those of the map's plane, not of the D-dimensional rows: what is seen is what is clustered.
    The same seed gives the same map on the same machine; UMAP runs on one thread for it.

    Raises FastSAEError: rows of different widths, fewer features than 4; MissingDependencyError without umap-learn or
    scikit-learn. The first call in a process waits about 20 s for umap to compile itself.
    """
    if not decoders or any(rows.ndim != 2 or rows.shape[1] != decoders[0].shape[1] for rows in decoders):
        raise FastSAEError(f"expected decoders [F, D] of one width D, got {[list(rows.shape) for rows in decoders]}")
    numbers = [torch.arange(len(rows)) for rows in decoders]
    if keep is not None:
        numbers = [number[some.cpu()] for number, some in zip(numbers, keep, strict=True)]
    rows = torch.cat([rows.detach().float().cpu()[n] for rows, n in zip(decoders, numbers, strict=True)]).numpy()
    if len(rows) < 4:
        raise FastSAEError(f"expected at least 4 features to map, got {len(rows)}: read more text or keep more")
    threads = torch.get_num_threads()
    try:
        import umap
        from sklearn.cluster import HDBSCAN

        points = umap.UMAP(
            n_neighbors=min(neighbors, len(rows) - 1),
            min_dist=min_dist,
            metric="cosine",
            # The spectral start solves for more vectors than few rows have.
            init="spectral" if len(rows) > 50 else "random",
            random_state=seed,
            n_jobs=1,
        ).fit_transform(rows)
    except ImportError:
        raise MissingDependencyError("maps need umap-learn and scikit-learn: pip install 'fastsae[all]'") from None
    finally:
        torch.set_num_threads(threads)  # numba, on which umap runs, sets them to all there are
    points = np.asarray(points, dtype=np.float32)
    size = max(2, min(min_cluster, len(rows) // 2))
    unchanged: Any = True  # scikit-learn's own annotation allows the word "warn" alone
    clusters = HDBSCAN(min_cluster_size=size, copy=unchanged).fit_predict(points)
    layer = np.repeat(np.arange(len(numbers)), [len(n) for n in numbers])
    return FeatureMap(layer, torch.cat(numbers).numpy(), points, np.asarray(clusters, dtype=np.int64))


def draw_map(
    found: Split, decoders: Sequence[Tensor], out: Path, seed: int = 0, follows: Follows | None = None
) -> FeatureMap:
    """Writes out/map.json and out/map.png: the features that fire, coloured by density, clusters numbered.

    decoders: [F, D] of each dictionary of `found`. follows: which category each of their features follows best; then
    out/map-categories.png is coloured by it as well, and map.json tells it of every feature. Raises as map_of.
    """
    from fastsae import figures

    figures.require_matplotlib()
    drawn = map_of(decoders, [part > 0 for part in found.density], seed=seed)
    density = np.concatenate([part[part > 0].numpy() for part in found.density])
    written = {**drawn.to_dict(), "density": density.tolist()}
    if follows is not None:
        live = [part > 0 for part in found.density]
        best, r = (
            np.concatenate([part[mask].numpy() for part, mask in zip(column, live, strict=True)])
            for column in (follows.best, follows.r)
        )
        written |= {"categories": list(follows.names), "category": best.tolist(), "r": r.tolist()}
        figures.category_map(
            drawn.points, best, r, follows.names, out / "map-categories.png", layers=drawn.layer,
            clusters=drawn.clusters,
        )  # fmt: skip
    write_json(out / "map.json", written)
    label = "share of tokens on which the feature fires"
    figures.feature_map(
        drawn.points, density, label, out / "map.png", layers=drawn.layer, clusters=drawn.clusters, log=True
    )
    return drawn
