"use strict";
// The other run: is every feature there too, more than chance and neurons would have it?

fastsae.page("compare", async (main) => {
  const { h, columns, count, fixed, link, charts } = fastsae;
  const it = await columns("compare");
  main.append(h("h1", null, "In the other run"));
  if (!it) {
    main.append(h("p", { class: "note" }, "This report was made without a second dictionary. Give analyze another run (--other-sae)",
      fastsae.server ? [", or compare two under ", h("a", { href: "#/live/compare" }, "Live"), "."] : "."));
    return;
  }
  const live = it.pearson.filter((r) => r !== null);
  const m = it.medians;
  const rows = [
    ["features", m.pearson, m.held_out, m.logit_pearson, m.best_logit_pearson],
    ["features, one to one", m.assigned_pearson, m.assigned_held_out],
    ["neurons", m.neurons, m.neurons_held_out, m.neurons_logit_pearson, m.neurons_best_logit_pearson],
    [`control: ${it.control_kind ?? "a model with shuffled weights"}`, m.control, m.control_held_out, m.control_logit_pearson, m.control_best_logit_pearson],
  ].filter(([, r]) => (r ?? null) !== null).map(([name, ...all]) => [name, ...[0, 1, 2, 3].map((i) => (all[i] ?? null) === null ? "" : fixed(all[i]))]);
  main.append(
    h("p", { class: "lead" }, `For each of ${count(live.length)} features${it.sampled ? " (a sample)" : ""} that fire often enough, the feature of the other dictionary that follows it best over ${count(it.tokens)} tokens. Held out, it is chosen on one half of the documents and scored on the other; every other r, and what is most alike, is a maximum that is scored where it was chosen.`),
    h("div", { class: "two" },
    h("section", null, h("h2", null, "Medians"), fastsae.table(["", "r", "held out", "logit weights", "most alike in them"], rows, { label: "Medians" }),
      (m.decoder_cosine ?? null) !== null && h("p", { class: "soft" }, `Cosine of decoder rows: ${fixed(m.decoder_cosine)} with the match, ${fixed(m.best_decoder_cosine)} with the row most alike; it says something only where both dictionaries read one space.`)),
    h("section", null, h("h2", null, "How alike"), picture())),
    h("section", null, h("h2", null, "Feature by feature"), pairs()));

  function picture() {
    const width = 0.05, bins = 20;
    const shares = (values) => {
      const counts = new Array(bins).fill(0), real = (values ?? []).filter((r) => r !== null);
      for (const r of real) counts[Math.max(0, Math.min(bins - 1, Math.floor(r / width)))]++;
      return counts.map((n) => n / Math.max(real.length, 1));
    };
    const kinds = [["pearson", "features", "hot", "solid"], ["neurons", "neurons", "bar", "dash"], ["control", "control", "soft", "dot"]]
      .filter(([key]) => it[key]).map(([key, name, color, dash]) => ({ name, color, dash, y: shares(it[key]) }));
    return charts.chart(() => ({
      traces: kinds.map(({ name, color, dash, y }) => ({ type: "scatter", mode: "lines", name, x: y.map((_, i) => (i + 0.5) * width), y,
        line: { color: charts.color(color), width: 2.5, dash, shape: "hvh" }, hovertemplate: `${name}: %{y:.1%}<extra></extra>` })),
      layout: { showlegend: true, hovermode: "x", xaxis: { title: { text: "Pearson’s r with the best match" }, range: [0, 1] }, yaxis: { title: { text: "share" }, tickformat: ".0%" } },
    }), { label: "Distribution of the best match’s correlation, for features, neurons and control", height: 280,
          figures: { head: ["r from", ...kinds.map(({ name }) => name)], rows: Array.from({ length: bins }, (_, i) => [fixed(i * width), ...kinds.map(({ y }) => fastsae.percent(y[i]))]) } });
  }

  function pairs() {
    const order = it.feature.map((_, i) => i).filter((i) => it.pearson[i] !== null).sort((a, b) => it.pearson[b] - it.pearson[a]);
    const row = (i) => [link(it.feature[i]), String(it.best[i]), fixed(it.pearson[i]), fixed(it.held_out?.[i]), fixed(it.logit_pearson?.[i])];
    const head = ["feature", "there", "r", "held out", "logit weights"], some = 15;
    return [
      h("div", { class: "two" },
        h("div", null, h("h3", null, "Most alike"), fastsae.table(head, order.slice(0, some).map(row), { label: "Most alike" })),
        h("div", null, h("h3", null, "Least alike"), fastsae.table(head, order.slice(-some).reverse().map(row), { label: "Least alike" }))),
      h("p", null, h("a", { href: "#/features?sort=match" }, "All of them, by match")),
    ];
  }
});
