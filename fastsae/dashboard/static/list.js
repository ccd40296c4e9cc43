"use strict";
// All features in a list that is searched and sorted here. Only the rows in view are elements, so its length is free.

fastsae.page("features", async (main, _argument, query, current) => {
  const { h, columns, count, fixed, number, percent, load } = fastsae;
  const back = history.state?.list ?? null;  // where the reader was, when this entry of the history was left
  const [it, { proxies, has }] = await Promise.all([columns("rows"), load("overview"), scored(query.get("sort"))]);
  const F = it.feature.length, height = 44;
  const texts = it.feature.map((_, i) => `${it.token[i]} ${proxies[it.proxy[i]] ?? ""} ${it.explanation[i]}`.toLowerCase());
  const scores = new Map([...fastsae.scores ?? []].filter(([, r]) => r.length === F).map(([name, r]) => [`proxy:${name}`, { name, r }]));
  const orders = {
    feature: { label: "number", of: it.feature, down: false },
    density: { label: "density", of: it.density, down: true },
    max: { label: "maximum", of: it.max, down: true },
    score: { label: "proxy score", of: it.score, down: true },
    ...(has.explanations && { explained: { label: "explanation score", of: it.explained, down: true } }),
    ...(has.match && { match: { label: "match in the other run, held out", of: it.match, down: true } }),
    ...(has.logits && { logit: { label: "logit weight", of: it.logit, down: true }, token: { label: "logit token", of: it.token, down: false } }),
    ...Object.fromEntries([...scores].map(([key, { name, r }]) => [key, { label: `${cut(name, 32)}, r`, of: r, down: true }])),
  };

  const wanted = query.get("sort") ?? "", forgotten = wanted.startsWith("proxy:") && !scores.has(wanted) && wanted.slice(6);
  const state = {
    q: query.get("q") ?? "", proxy: query.get("proxy") ?? "", cluster: query.get("cluster") ?? "",
    sort: Object.hasOwn(orders, wanted) ? wanted : "score", down: query.get("down") !== null ? query.get("down") === "1" : true,
  };
  let rows = [], focus = back?.focus ?? 0, range = "", pause = 0;

  const search = h("input", { type: "search", id: "q", value: state.q, maxlength: 200, placeholder: "number, word, token, category", autocomplete: "off" });
  const sort = h("select", { id: "sort" }, Object.entries(orders).map(([name, { label }]) => h("option", { value: name, selected: name === state.sort }, label)));
  const way = h("button", { type: "button", class: "small" });
  const only = h("select", { id: "proxy" }, h("option", { value: "" }, "all"), proxies.map((name) => h("option", { value: name, selected: name === state.proxy }, name)));
  const found = h("p", { class: "soft", role: "status" });
  const body = h("div", { class: "rows" });
  const head = h("div", { class: "heads", role: "group", "aria-label": "Sort by" }, [
    ["feature", "number", "f"], [has.explanations ? "explained" : null, has.explanations ? "explanation" : "", "what"], has.logits && ["token", "makes likelier", "token"],
    ["score", "proxy, r", "proxy"], ["density", "density", "num"], ["max", "maximum", "num wide-only"], has.match && ["match", "match", "num wide-only"],
  ].filter(Boolean).map(([name, text, style]) => name
    ? h("button", { type: "button", class: style, "data-sort": name, click: () => {
        const to = column(name);
        state.down = state.sort === to ? !state.down : orders[to].down; state.sort = sort.value = to; update(); } }, text)
    : h("span", { class: style }, text)));
  if (!has.logits) main.classList.add("no-token");
  if (!has.match) main.classList.add("no-match");
  const nothing = h("p", { class: "note", hidden: true },
    "No feature: searched are numbers, explanations, the token that each makes likelier and its category, not examples.");
  const frame = h("div", { class: "scroller", tabindex: 0, role: "listbox", "aria-label": "Features; arrow keys move, Enter opens" }, body);
  main.append(
    h("h1", null, "Features"),
    h("div", { class: "controls" },
      h("div", { class: "find" }, h("label", { for: "q" }, "Search"), search),
      h("div", null, h("label", { for: "sort" }, "Sort by"), sort, way),
      proxies.length ? h("div", null, h("label", { for: "proxy" }, "Closest to"), only) : null,
      state.cluster && h("a", { class: "tag", href: "#/features" }, `cluster ${state.cluster} ✕`)),
    !forgotten ? "" : h("p", { class: "note" }, "There are no scores of ", h("bdi", null, cut(forgotten, 60)), " here any more: ask for them again under ", h("a", { href: "#/live/proxy" }, "Live"), "."),
    found, head, frame, nothing);

  search.addEventListener("input", () => { state.q = search.value; update(); });
  sort.addEventListener("change", () => { state.sort = sort.value; state.down = orders[state.sort].down; update(); });
  only.addEventListener("change", () => { state.proxy = only.value; update(); });
  way.addEventListener("click", () => { state.down = !state.down; update(); });
  frame.addEventListener("scroll", () => {
    draw();
    clearTimeout(pause);
    pause = setTimeout(remember, 100);  // browsers refuse more than some hundred changes of the history in half a minute
  }, { passive: true });
  frame.addEventListener("keydown", key);
  frame.addEventListener("click", remember);
  main.addEventListener("shown", () => {
    if (back) {
      frame.scrollTop = back.top;
      window.scrollTo(0, back.page);
      if (back.keys) frame.focus({ preventScroll: true });
    }
    draw();
  });
  const resized = new ResizeObserver(draw);
  resized.observe(frame);
  update(false);
  return () => { clearTimeout(pause); resized.disconnect(); };

  function cut(text, length) { return text.length > length ? `${text.slice(0, length - 1)}…` : text; }

  /** The scores of a proxy that the address names: asked for under Live, and since a reload only the server has them. */
  async function scored(sort) {
    const name = sort?.startsWith("proxy:") ? sort.slice("proxy:".length) : "";
    if (!name || !fastsae.server || fastsae.scores?.has(name)) return;
    const answer = await fetch(`api/proxies?${new URLSearchParams({ name })}`).catch(() => null);
    if (answer?.ok) (fastsae.scores ??= new Map()).set(name, (await answer.json()).pearson);
  }

  /** Where the reader is, with this entry of the history: not with the next one, whose page may still be on its way. */
  function remember() {
    if (current()) history.replaceState({ list: { top: frame.scrollTop, focus, page: scrollY, keys: document.activeElement === frame } }, "");
  }

  /** What the head "proxy, r" sorts by: the score that is shown under it. */
  function column(name) { return name === "score" && scores.has(state.sort) ? state.sort : name; }

  /** Every word must occur, in the token, the category or the explanation; a number alone finds its feature too. The
   *  API's search has the same rule. */
  function update(changed = true) {
    if (changed && !current()) return;  // the next page is on its way
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean), proxy = proxies.indexOf(state.proxy), asked = alone();
    const cluster = state.cluster === "" ? null : Number(state.cluster);
    rows = [];
    for (let i = 0; i < F; i++) {
      if (proxy >= 0 && it.proxy[i] !== proxy) continue;
      if (cluster !== null && it.cluster[i] !== cluster) continue;
      if (it.feature[i] === asked || words.every((word) => texts[i].includes(word))) rows.push(i);
    }
    order(rows);
    focus = Math.min(focus, Math.max(rows.length - 1, 0));
    for (const button of head.querySelectorAll("button")) {
      const mine = column(button.dataset.sort) === state.sort;
      button.setAttribute("aria-pressed", String(mine));
      button.dataset.way = mine ? (state.down ? "↓" : "↑") : "";
    }
    way.textContent = state.down ? "↓ high first" : "↑ low first";
    found.textContent = (rows.length === F ? `${count(F)} features` : `${count(rows.length)} of ${count(F)} features`)
      + (scores.has(state.sort) ? `; r with ${cut(scores.get(state.sort).name, 60)}, on all text that was read for it` : "");
    nothing.hidden = rows.length > 0;
    body.style.height = `${rows.length * height}px`;
    range = "";
    if (changed) {
      frame.scrollTop = 0; focus = 0;
      const said = new URLSearchParams(Object.entries({ ...state, down: state.down ? 1 : 0 }).filter(([, value]) => value !== ""));
      history.replaceState(null, "", `#/features?${said}`);
    }
    draw();
  }

  /** What has no value comes last whichever way. A feature whose number is asked for comes first. */
  function order(chosen) {
    const { of } = orders[state.sort], sign = state.down ? -1 : 1, text = state.sort === "token", asked = alone();
    const compare = text ? new Intl.Collator().compare : (a, b) => a - b;
    const empty = (value) => value === null || value === "";
    chosen.sort((a, b) => (b === asked) - (a === asked) || empty(of[a]) - empty(of[b])
      || (empty(of[a]) ? 0 : sign * compare(of[a], of[b])) || a - b);
  }

  /** The number of a feature that is asked for and nothing else, or -1. */
  function alone() { return /^\d+$/.test(state.q.trim()) ? Number(state.q) : -1; }

  function draw() {
    const first = Math.max(0, Math.floor(frame.scrollTop / height) - 8);
    const last = Math.min(rows.length, Math.ceil((frame.scrollTop + frame.clientHeight) / height) + 8);
    // Rows that stay are left alone: a screen reader may be in the middle of one.
    if (range !== `${first}-${last}`) body.replaceChildren(...Array.from({ length: Math.max(last - first, 0) }, (_, n) => row(first + n)));
    range = `${first}-${last}`;
    const id = rows.length ? `row-${it.feature[rows[focus]]}` : null;
    for (const line of body.children) {
      const here = line.firstChild.id === id;
      line.classList.toggle("focused", here);
      if (here) line.firstChild.setAttribute("aria-selected", "true"); else line.firstChild.removeAttribute("aria-selected");
    }
    if (focus >= first && focus < last) frame.setAttribute("aria-activedescendant", id); else frame.removeAttribute("aria-activedescendant");
  }

  function row(place) {
    const i = rows[place], f = it.feature[i];
    const said = it.explanation[i];
    const line = h("div", { class: "row" },
      h("a", { href: `#/feature/${f}`, tabindex: -1, role: "option", id: `row-${f}`, "aria-setsize": rows.length, "aria-posinset": place + 1 },
        h("span", { class: "f" }, String(f)),
        h("span", { class: "what" },
          said ? fastsae.explained(said) : h("span", { class: "soft" }, it.max[i] ? (has.explanations ? "–" : "") : "never fired"),
          it.explained[i] !== null && h("span", { class: "soft" }, ` ${fixed(it.explained[i])}`),
          it.ultra_low[i] ? h("span", { class: "tag" }, "ultra-low") : null),
        has.logits && h("span", { class: "token" }, h("bdi", { class: "tok" }, fastsae.visible(it.token[i], true))),
        h("span", { class: "proxy" }, category(i)),
        h("span", { class: "num" }, percent(it.density[i])),
        h("span", { class: "num wide-only" }, number(it.max[i])),
        has.match && h("span", { class: "num wide-only" }, fixed(it.match[i]))));
    line.style.top = `${place * height}px`;
    return line;
  }

  function category(i) {
    const { name, r } = scores.get(state.sort) ?? { name: proxies[it.proxy[i]], r: it.score };
    return (name ?? "") === "" ? "" : [h("bdi", null, cut(name, 60)), " ", h("b", null, fixed(r[i]))];
  }

  function key(event) {
    const page = Math.max(1, Math.floor(frame.clientHeight / height) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -F, End: F };
    if (event.key === "Enter" && rows.length && event.target === frame) { remember(); location.hash = `#/feature/${it.feature[rows[focus]]}`; return; }
    if (!(event.key in steps)) return;
    event.preventDefault();
    focus = Math.max(0, Math.min(rows.length - 1, focus + steps[event.key]));
    if (focus * height < frame.scrollTop) frame.scrollTop = focus * height;
    if ((focus + 1) * height > frame.scrollTop + frame.clientHeight) frame.scrollTop = (focus + 1) * height - frame.clientHeight;
    draw();
  }
});
