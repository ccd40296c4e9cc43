"use strict";
// The first page: how often features fire, what the dictionary is worth, where to begin, map, splitting.

fastsae.page("overview", async (main) => {
  const { h, count, fixed, percent, table, link, load, charts } = fastsae;
  const it = await load("overview");
  const live = it.d_sae - it.dead;
  main.append(
    h("h1", null, `${count(it.d_sae)} features`, it.hook ? [" of ", h("code", null, it.hook)] : null),
    h("p", { class: "lead" }, `Read on ${count(it.tokens)} tokens of ${count(it.documents)} documents`,
      it.of_store ? " of a store, on which the dictionary may have been trained. " : " that no part was trained on. ",
      `${count(live)} features fired at least once`, it.dead ? `, ${count(it.dead)} never did.` : "."),
    h("p", null, h("a", { class: "button", href: "#/features" }, "All features"), " ",
      h("a", { class: "button", href: `#/feature/${Math.floor(Math.random() * it.d_sae)}` }, "One at random"),
      it.about.report ? [" ", h("a", { class: "button", href: "report.html" }, "The categories in detail")] : ""),
  );
  main.append(
    two(
      it.categories.length && section("Where to begin",
        "The feature that follows each category best, chosen on one half of the documents and scored on the other.",
        table(["category", "feature", "Pearson’s r", "neuron’s r", "specific", "base rate"], it.categories.map((row) => [
          row.name, link(row.feature), fixed(row.pearson), fixed(row.neuron_pearson), percent(row.specificity), percent(row.base_rate),
        ]), { label: "Best feature of every category" }), tooRare(it.left_out ?? [])),
      section("How often features fire", densityNote(it.density), density(it.density))),
    it.has.map ? section("Map",
      "Decoder rows in the plane (UMAP): what lies together points the same way. Clusters are HDBSCAN’s of this plane, grey is in none. " +
      "Drag or arrow keys to move, + and −, a pinch, or the wheel with Ctrl to zoom, click or Enter to open.", fastsae.map()) : "",
    it.has.split ? section("Splitting",
      "Features of narrower and wider dictionaries that fire together: what one feature holds in a small dictionary, several share in a large one.",
      fastsae.splitting()) : "",
    two(
      it.quality && section("Quality", "The paper’s figures are of a larger model: something to compare with.",
        table(it.quality.head, it.quality.rows, { label: "Quality" })),
      it.goals.length && section("Goals", null,
        table(["", "goal", "here", ""], it.goals.map((row) => [row.name, row.goal, row.value, row.met ? "met" : "missed"]), { label: "Goals" }))));

  function two(...parts) { return h("div", { class: "two" }, parts.filter(Boolean)); }

  function section(title, note, ...children) {
    return h("section", null, h("h2", null, title), note && h("p", { class: "soft" }, note), children);
  }

  function tooRare(rows) {
    const names = rows.map(({ name, tokens: [a, b] }) => `${name} (${count(a)} and ${count(b)} tokens)`).join(", ");
    return names && h("p", { class: "soft" }, `Too rare in one half of the text to be looked at: ${names}.`);
  }

  function densityNote({ ultra_low, why }) {
    const apart = ultra_low.reduce((a, b) => a + b, 0);
    if (apart) return `${count(apart)} features form an ultra-low cluster, drawn apart: rare, and not like the others in their weights.`;
    return why ? `No ultra-low cluster (${why}).` : "Share of tokens on which each feature is active.";
  }

  function density({ edges, healthy, ultra_low }) {
    const from = (i) => percent(10 ** edges[i]);
    const bar = (counts, name, color) => ({
      type: "bar", name, x: counts.map((_, i) => (edges[i] + edges[i + 1]) / 2), y: counts, width: 0.25,
      hovertext: counts.map((n, i) => `${count(n)} features on ${from(i)} to ${from(i + 1)} of tokens`), hoverinfo: "text",
      marker: { color: charts.color(color) }, textposition: "none",
    });
    const apart = ultra_low.some((n) => n);
    // Not Plotly's <sup>: it makes style attributes, which the page forbids.
    const raised = (exponent) => String(exponent).replace(/./g, (c) => c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]);
    const whole = edges.filter((edge) => Number.isInteger(edge));
    return charts.chart(() => ({
      traces: [bar(healthy, "healthy", "bar"), ...(apart ? [bar(ultra_low, "ultra-low", "hot")] : [])],
      layout: {
        barmode: "stack", showlegend: apart,
        xaxis: { title: { text: "share of tokens on which a feature fires" }, tickvals: whole, ticktext: whole.map((edge) => edge ? `10${raised(edge)}` : "1") },
        yaxis: { title: { text: "features" } },
      },
    }), {
      label: "Histogram of feature densities", height: 280,
      figures: {
        head: ["from", "to", "healthy", "ultra-low"],
        rows: healthy.map((n, i) => [from(i), from(i + 1), count(n), count(ultra_low[i])]).filter((row) => row[2] !== "0" || row[3] !== "0"),
      },
    });
  }
});

/** The splitting graph, a family at a time: all that can be reached from one feature of the narrowest dictionary. */
fastsae.splitting = () => {
  const { h, columns, charts, number } = fastsae;
  const most = 60;  // of a dictionary: more cannot be told apart
  const place = h("div", { class: "splitting" }, h("p", { class: "soft" }, "…"));
  charts.when(place, async () => {
    const graph = await columns("splitting");
    const below = graph.steps.map((step) => {
      const children = new Map();
      step.parents.forEach((p, i) => {
        if (!children.has(p)) children.set(p, []);
        children.get(p).push([step.children[i], step.cosines[i]]);
      });
      return children;
    });
    const roots = [...(below[0] ?? new Map())].map(([f]) => [f, family(f)]).sort((a, b) => b[1].size - a[1].size).slice(0, 200);
    if (!roots.length) { place.replaceChildren(h("p", { class: "soft" }, "No two features are close enough.")); return; }
    const choice = h("select", { id: "family" }, roots.map(([f, { size }]) => h("option", { value: f }, `feature ${f}: ${size} descendants`)));
    const picture = h("div");
    choice.addEventListener("change", () => draw(Number(choice.value)));
    place.replaceChildren(h("label", { for: "family" }, `Of the dictionary of ${fastsae.count(graph.widths[0])} `), choice, picture);
    draw(roots[0][0]);

    function family(root) {
      const layers = [[root]], edges = [];
      below.forEach((children, l) => {
        const next = new Set();
        for (const parent of layers[l]) for (const [child, cosine] of children.get(parent) ?? []) {
          if (next.size >= most && !next.has(child)) continue;
          next.add(child);
          edges.push([l, parent, child, cosine]);
        }
        layers.push([...next]);
      });
      return { layers, edges, size: layers.slice(1).reduce((n, layer) => n + layer.length, 0) };
    }

    function draw(root) {
      const { layers, edges } = family(root);
      const at = layers.map((layer) => new Map(layer.map((f, i) => [f, (i + 0.5) / layer.length])));
      const x = [], y = [];
      for (const [l, parent, child] of edges) { x.push(at[l].get(parent), at[l + 1].get(child), null); y.push(l, l + 1, null); }
      const nodes = layers.flatMap((layer, l) => layer.map((f) => ({ f, l, x: at[l].get(f) })));
      picture.replaceChildren(charts.chart(() => ({
        traces: [
          { type: "scatter", mode: "lines", x, y, hoverinfo: "skip", line: { color: charts.color("line"), width: 2 } },
          { type: "scatter", mode: nodes.length < 40 ? "markers+text" : "markers", x: nodes.map((n) => n.x), y: nodes.map((n) => n.l),
            text: nodes.map((n) => String(n.f)), textposition: "bottom center", customdata: nodes.map((n) => [n.f, n.l]),
            hovertext: nodes.map((n) => `feature ${n.f} of ${fastsae.count(graph.widths[n.l])}`), hoverinfo: "text",
            marker: { size: 12, color: nodes.map((n) => charts.color(n.l === graph.layer ? "hot" : "bar")) } },
        ],
        layout: {
          xaxis: { visible: false, range: [-0.05, 1.05] },
          yaxis: { autorange: "reversed", tickvals: graph.widths.map((_, l) => l), ticktext: graph.widths.map(fastsae.count), zeroline: false,
                   title: { text: "features in the dictionary" } },
        },
      }), {
        label: `Descendants of feature ${root}`, height: 120 + 90 * layers.length,
        click: ({ customdata }) => { if (customdata?.[1] === graph.layer) location.hash = `#/feature/${customdata[0]}`; },
        figures: { head: ["parent", "of", "child", "of", "cosine"], rows: edges.map(([l, p, c, r]) => [
          l === graph.layer ? fastsae.link(p) : String(p), fastsae.count(graph.widths[l]),
          l + 1 === graph.layer ? fastsae.link(c) : String(c), fastsae.count(graph.widths[l + 1]), number(r)]) },
      }));
    }
  });
  return place;
};
