"use strict";
// A feature's page: the card of Bricken et al. 2023.

fastsae.page("feature", async (main, argument, _query, current) => {
  const { h, card, count, fixed, signed, number, percent, link, load, charts } = fastsae;
  const f = /^\d{1,9}$/.test(argument ?? "") ? Number(argument) : NaN;
  const [it, overview] = await Promise.all([card(f), load("overview")]);
  if (!current()) return;
  main.append(
    h("nav", { class: "beside", "aria-label": "Features beside" },
      f > 0 && h("a", { href: `#/feature/${f - 1}`, rel: "prev" }, `← ${f - 1}`),
      f + 1 < overview.d_sae && h("a", { href: `#/feature/${f + 1}`, rel: "next" }, `${f + 1} →`)),
    h("h1", null, `Feature ${f}`),
    explanation() ?? "",  // append would write the word null
    h("ul", { class: "tags" },
      h("li", null, `fires on ${percent(it.density)} of tokens`), h("li", null, `maximum ${number(it.max)}`),
      h("li", null, `mean where it fires ${number(it.mean)}`),
      it.follows && it.fires ? h("li", null, `${it.follows[0]}: r ${fixed(it.follows[1])}`) : null,
      it.cluster !== null ? h("li", null, h("a", { href: `#/features?cluster=${it.cluster}` }, `cluster ${it.cluster}`)) : null,
      it.ultra_low ? h("li", { class: "warn" }, "ultra-low cluster") : null),
  );
  if (!it.fires) {
    main.append(h("p", { class: "note" }, `It never fired on the ${count(it.tokens)} tokens that were read.`),
      h("div", { class: "card" }, h("aside", null, aside())));
    return;
  }
  const reading = fastsae.windows(it.max);
  main.append(h("div", { class: "card" }, h("div", { class: "examples" },
    h("section", null,
      h("div", { class: "line" }, h("h2", null, "Strongest examples"),
        it.top.some((w) => w.effects) ? reading.toggle() : h("span", { class: "soft" }, "Ablation was not measured for this feature.")),
      reading.note,
      reading.list(it.top, "Strongest examples")),
    h("section", { class: "later" }, h("h2", null, "Over its range"),
      [...it.intervals].reverse().map((part) => part.windows.length ? [
        h("h3", null, `${number(part.low)} to ${number(part.high)}`),
        reading.list(part.windows, `Examples from ${number(part.low)} to ${number(part.high)}`)] : null)),
    h("section", { class: "later" }, h("h2", null, "Weakest examples"), reading.list(it.bottom, "Weakest examples")),
  ), h("aside", null, aside())));

  function explanation() {
    if (!it.explanation) return null;
    const { text, spearman, detection } = it.explanation;
    return h("p", { class: "lead" }, fastsae.explained(text), " ",
      h("span", { class: "soft" }, [spearman !== null && `simulation ρ ${fixed(spearman)}`, detection !== null && `detection ${fixed(detection)}`].filter(Boolean).join(" · ")));
  }

  function aside() {
    const { histogram, logits } = it;
    return [
      it.fires ? block("Activations", charts.chart(() => ({
        traces: [charts.bars(histogram.counts, 0, histogram.width)],
        layout: { yaxis: { type: "log", title: { text: "tokens" }, dtick: 1 }, xaxis: { title: { text: "activation" } } },
      }), { label: "Histogram of activations", height: 190, figures: {
        head: ["from", "to", "tokens"], rows: histogram.counts.map((n, i) => [number(i * histogram.width), number((i + 1) * histogram.width), count(n)]) } })) : null,
      logits && block("Logit weights", charts.chart(() => ({
        traces: [charts.bars(logits.counts, logits.low, (logits.high - logits.low) / logits.counts.length)],
        layout: { yaxis: { type: "log", title: { text: "vocabulary" }, dtick: 1 }, xaxis: { title: { text: "change of the logit per unit" } } },
      }), { label: "Histogram of logit weights", height: 190, figures: {
        head: ["from", "to", "tokens"], rows: logits.counts.map((n, i) => {
          const width = (logits.high - logits.low) / logits.counts.length;
          return [number(logits.low + i * width), number(logits.low + (i + 1) * width), count(n)];
        }) } })),
      logits && h("div", { class: "pair" },
        block("Makes likelier", tokens(logits.top)), block("Makes less likely", tokens(logits.bottom))),
      it.proxies.length ? block("Proxies", list(it.proxies.slice(0, 6), ([name, r]) => [h("bdi", null, name), ["r ", fixed(r)]])) : null,
      it.match && block("In the other run", list([it.match], (m) => [`feature ${m.feature}`, [
        `r ${fixed(m.pearson)}`, m.held_out !== null && `held out ${fixed(m.held_out)}`, m.logit_pearson !== null && `logits ${fixed(m.logit_pearson)}`,
        m.control !== null && `control ${fixed(m.control)}`].filter(Boolean).join(" · ")])),
      it.neurons && block("Nearest neurons, over all tokens", list(it.neurons, ([n, r]) => [`neuron ${n}`, ["r ", fixed(r)]])),
      it.similar && block("Similar decoder rows", list(it.similar, ([g, c]) => [link(g, `feature ${g}`), ["cos ", fixed(c)]])),
      it.cofiring?.length ? block("Fires together with", list(it.cofiring, ([g, n, j]) => [link(g, `feature ${g}`), `${count(n)} tokens · Jaccard ${fixed(j)}`])) : null,
      it.splitting && (it.splitting.parents.length || it.splitting.children.length) ? block("Splitting, cosine of activations",
        it.splitting.parents.length ? list(it.splitting.parents.slice(0, 8), ([g, r]) => [`parent ${g} of ${count(it.splitting.narrower)}`, ["cos ", fixed(r)]]) : null,
        it.splitting.children.length ? list(it.splitting.children.slice(0, 8), ([g, r]) => [`child ${g} of ${count(it.splitting.wider)}`, ["cos ", fixed(r)]]) : null) : null,
      it.notes?.length ? block("Left out or estimated", it.notes.map((note) => h("p", null, note))) : null,
    ];
  }

  function block(title, ...children) { return h("section", { class: "block" }, h("h2", null, title), children); }
  function list(rows, show) {
    return h("ul", { class: "facts" }, rows.map((row) => { const [left, right] = show(row); return h("li", null, h("span", null, left), h("span", { class: "soft" }, right)); }));
  }
  function tokens(rows) { return list(rows, ([text, value]) => [h("bdi", { class: "tok" }, fastsae.visible(text, true)), signed(value)]); }
});

/** Windows of text, shaded by activation or by ΔNLL, with the value of what is pointed at or moved to. */
fastsae.windows = (highest) => {
  const { h, number, signed, tip, bytes, visible } = fastsae;
  const notes = {
    activation: "The darker, the more active. Point at a word, or use Tab and the arrow keys, for its value.",
    effect: "What the feature does to each token’s loss: orange where the loss rises without it, blue where it falls.",
  };
  let shade = "activation";
  const shown = [], note = h("p", { class: "soft" }, notes.activation);

  function paint(span, activation, effect) {
    const share = shade === "activation" ? activation / highest : Math.min(1, Math.abs(effect ?? 0) / 2);
    span.className = !share ? "" : shade === "activation" ? "on" : effect > 0 ? "on" : "less";
    if (share) span.style.setProperty("--a", (0.12 + 0.5 * Math.min(1, share)).toFixed(2)); else span.style.removeProperty("--a");
  }

  /** Tokens that make one character together are one piece: { text, places }. */
  function pieces(w) {
    const found = [];
    let places = [];
    w.tokens.forEach((text, i) => {
      places.push(i);
      if (w.parts.has(i)) return;
      found.push({ text, places });
      places = [];
    });
    return found;
  }

  /** Most of the letters decide: a window begins anywhere, so its first letter, which dir=auto goes by, says little. */
  function direction(all) {
    const text = all.map((piece) => piece.text).join("").replace(bytes, "");
    const right = text.match(/[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/gu)?.length ?? 0;
    const letters = text.match(/\p{L}/gu)?.length ?? 0;
    return letters ? (2 * right > letters ? "rtl" : "ltr") : "auto";
  }

  function one(w) {
    const all = pieces(w);
    const line = h("p", { class: "window", dir: direction(all), tabindex: 0 });
    const spans = all.map(({ text, places }, n) => h("span", { "data-at": places.includes(w.at) }, visible(text, !n)));
    const entry = { all, spans, w, place: all.findIndex(({ places }) => places.includes(w.at)) };
    const said = (i) => {
      const effect = w.effects?.[i];
      return `${number(w.activations[i])}${effect === undefined ? "" : ` · ΔNLL ${signed(effect, 3)}`}`;
    };
    const tell = (n) => {
      const { places } = all[n];
      tip.over(spans[n], places.length === 1 ? said(places[0]) : places.map((i) => `part ${i - places[0] + 1}: ${said(i)}`).join(" | "));
      spans.forEach((span, i) => span.toggleAttribute("data-here", i === n));
    };
    const silent = () => { tip.hide(); spans.forEach((span) => span.removeAttribute("data-here")); };
    line.append(...spans);
    line.addEventListener("pointerover", (event) => { const n = spans.findIndex((span) => span.contains(event.target)); if (n >= 0) tell(n); });
    line.addEventListener("pointerleave", silent);
    line.addEventListener("focus", () => tell(entry.place));
    line.addEventListener("blur", silent);
    line.addEventListener("keydown", (event) => {
      const turned = getComputedStyle(line).direction === "rtl" ? -1 : 1;
      const step = { ArrowRight: turned, ArrowLeft: -turned }[event.key];
      if (event.key === "Escape") silent();
      if (!step) return;
      event.preventDefault();
      entry.place = Math.max(0, Math.min(spans.length - 1, entry.place + step));
      tell(entry.place);
    });
    shown.push(entry);
    repaint(entry);
    return h("li", null, h("span", { class: "value" }, number(w.activations[w.at])), line);
  }

  function repaint({ all, spans, w }) {
    const strongest = (values, places) => places.map((i) => values[i]).reduce((a, b) => Math.abs(b) > Math.abs(a) ? b : a);
    spans.forEach((span, n) => paint(span, strongest(w.activations, all[n].places), w.effects && strongest(w.effects, all[n].places)));
  }

  return {
    note,
    list: (windows, label) => h("ol", { class: "windows", "aria-label": label }, windows.map(one)),
    toggle() {
      const make = (name, text) => h("button", { type: "button", class: "small", "aria-pressed": String(name === shade), click: (event) => {
        shade = name;
        for (const other of event.target.parentElement.children) other.setAttribute("aria-pressed", String(other === event.target));
        shown.filter((entry) => entry.w.effects).forEach(repaint);
        note.textContent = notes[shade];
      } }, text);
      return h("div", { class: "choice", role: "group", "aria-label": "Shade the strongest examples by" },
        make("activation", "activation"), make("effect", "ΔNLL without it"));
    },
  };
};
