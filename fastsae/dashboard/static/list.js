"use strict";
// All features in a list that is searched and sorted here. Only the rows in view are elements, so its length is free.

fastsae.page("features", async (main, _argument, query) => {
  const { h, columns, count, fixed, number, percent, load } = fastsae;
  const [it, { proxies, has }] = await Promise.all([columns("rows"), load("overview")]);
  const F = it.feature.length, height = 44;
  const texts = it.feature.map((f, i) => `${f} ${it.token[i]} ${proxies[it.proxy[i]] ?? ""} ${it.explanation[i]}`.toLowerCase());
  const orders = {
    feature: { label: "number", of: it.feature, down: false },
    density: { label: "density", of: it.density, down: true },
    max: { label: "maximum", of: it.max, down: true },
    score: { label: "proxy score", of: it.score, down: true },
    ...(has.explanations && { explained: { label: "explanation score", of: it.explained, down: true } }),
    ...(has.match && { match: { label: "match in the other run", of: it.match, down: true } }),
    ...(has.logits && { logit: { label: "logit weight", of: it.logit, down: true }, token: { label: "logit token", of: it.token, down: false } }),
  };

  const state = {
    q: query.get("q") ?? "", proxy: query.get("proxy") ?? "", cluster: query.get("cluster") ?? "",
    sort: Object.hasOwn(orders, query.get("sort")) ? query.get("sort") : "score", down: query.get("down") !== null ? query.get("down") === "1" : true,
  };
  let rows = [], focus = 0;

  const search = h("input", { type: "search", id: "q", value: state.q, maxlength: 200, placeholder: "number, word, token, category", autocomplete: "off" });
  const sort = h("select", { id: "sort" }, Object.entries(orders).map(([name, { label }]) => h("option", { value: name, selected: name === state.sort }, label)));
  const way = h("button", { type: "button", class: "small" });
  const only = h("select", { id: "proxy" }, h("option", { value: "" }, "all"), proxies.map((name) => h("option", { value: name, selected: name === state.proxy }, name)));
  const found = h("p", { class: "soft", role: "status" });
  const body = h("div", { class: "rows", role: "list", "aria-label": "Features" });
  const head = h("div", { class: "heads", role: "group", "aria-label": "Sort by" }, [
    ["feature", "number", "f"], [has.explanations ? "explained" : null, has.explanations ? "explanation" : "", "what"], has.logits && ["token", "makes likelier", "token"],
    ["score", "proxy, r", "proxy"], ["density", "density", "num"], ["max", "maximum", "num wide-only"], has.match && ["match", "match", "num wide-only"],
  ].filter(Boolean).map(([name, text, style]) => name
    ? h("button", { type: "button", class: style, "data-sort": name, click: () => {
        state.down = state.sort === name ? !state.down : orders[name].down; state.sort = sort.value = name; update(); } }, text)
    : h("span", { class: style }, text)));
  if (!has.logits) main.classList.add("no-token");
  if (!has.match) main.classList.add("no-match");
  const frame = h("div", { class: "scroller", tabindex: 0, role: "region", "aria-label": "Features; arrow keys move, Enter opens" }, body);
  main.append(
    h("h1", null, "Features"),
    h("div", { class: "controls" },
      h("div", { class: "find" }, h("label", { for: "q" }, "Search"), search),
      h("div", null, h("label", { for: "sort" }, "Sort by"), sort, way),
      proxies.length ? h("div", null, h("label", { for: "proxy" }, "Closest to"), only) : null,
      state.cluster && h("a", { class: "tag", href: "#/features" }, `cluster ${state.cluster} ✕`)),
    found, head, frame);

  search.addEventListener("input", () => { state.q = search.value; update(); });
  sort.addEventListener("change", () => { state.sort = sort.value; state.down = orders[state.sort].down; update(); });
  only.addEventListener("change", () => { state.proxy = only.value; update(); });
  way.addEventListener("click", () => { state.down = !state.down; update(); });
  frame.addEventListener("scroll", draw, { passive: true });
  frame.addEventListener("keydown", key);
  main.addEventListener("shown", draw);
  const resized = new ResizeObserver(draw);
  resized.observe(frame);
  update(false);
  return () => resized.disconnect();

  function update(remember = true) {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean), proxy = proxies.indexOf(state.proxy);
    const cluster = state.cluster === "" ? null : Number(state.cluster);
    rows = [];
    for (let i = 0; i < F; i++) {
      if (proxy >= 0 && it.proxy[i] !== proxy) continue;
      if (cluster !== null && it.cluster[i] !== cluster) continue;
      if (words.every((word) => texts[i].includes(word))) rows.push(i);
    }
    order(rows);
    for (const button of head.querySelectorAll("button")) {
      const mine = button.dataset.sort === state.sort;
      button.setAttribute("aria-pressed", String(mine));
      button.dataset.way = mine ? (state.down ? "↓" : "↑") : "";
    }
    way.textContent = state.down ? "↓ high first" : "↑ low first";
    found.textContent = rows.length === F ? `${count(F)} features` : `${count(rows.length)} of ${count(F)} features`;
    body.style.height = `${rows.length * height}px`;
    if (remember) {
      frame.scrollTop = 0; focus = 0;
      const said = new URLSearchParams(Object.entries({ ...state, down: state.down ? 1 : 0 }).filter(([, value]) => value !== ""));
      history.replaceState(null, "", `#/features?${said}`);
    }
    draw();
  }

  /** What has no value comes last whichever way. A feature whose number is asked for comes first. */
  function order(chosen) {
    const { of } = orders[state.sort], sign = state.down ? -1 : 1, text = state.sort === "token";
    const asked = /^\d+$/.test(state.q.trim()) ? Number(state.q) : -1;
    const compare = text ? new Intl.Collator().compare : (a, b) => a - b;
    const empty = (value) => value === null || value === "";
    chosen.sort((a, b) => (b === asked) - (a === asked) || empty(of[a]) - empty(of[b])
      || (empty(of[a]) ? 0 : sign * compare(of[a], of[b])) || a - b);
  }

  function draw() {
    const first = Math.max(0, Math.floor(frame.scrollTop / height) - 8);
    const last = Math.min(rows.length, Math.ceil((frame.scrollTop + frame.clientHeight) / height) + 8);
    body.replaceChildren(...Array.from({ length: Math.max(last - first, 0) }, (_, n) => row(first + n)));
  }

  function row(place) {
    const i = rows[place], f = it.feature[i];
    const said = it.explanation[i];
    const line = h("div", { role: "listitem", class: `row${place === focus ? " focused" : ""}`, "aria-setsize": rows.length, "aria-posinset": place + 1 },
      h("a", { href: `#/feature/${f}`, tabindex: -1 },
        h("span", { class: "f" }, String(f)),
        h("span", { class: "what" },
          said ? fastsae.explained(said) : h("span", { class: "soft" }, it.max[i] ? (has.explanations ? "–" : "") : "never fired"),
          it.explained[i] !== null && h("span", { class: "soft" }, ` ${fixed(it.explained[i])}`),
          it.ultra_low[i] ? h("span", { class: "tag" }, "ultra-low") : null),
        has.logits && h("span", { class: "token" }, h("bdi", { class: "tok" }, fastsae.visible(it.token[i], true))),
        h("span", { class: "proxy" }, it.proxy[i] < 0 ? "" : [proxies[it.proxy[i]], " ", h("b", null, fixed(it.score[i]))]),
        h("span", { class: "num" }, percent(it.density[i])),
        h("span", { class: "num wide-only" }, number(it.max[i])),
        has.match && h("span", { class: "num wide-only" }, fixed(it.match[i]))));
    line.style.top = `${place * height}px`;
    return line;
  }

  function key(event) {
    const page = Math.max(1, Math.floor(frame.clientHeight / height) - 1);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -F, End: F };
    if (event.key === "Enter" && rows.length && event.target === frame) { location.hash = `#/feature/${it.feature[rows[focus]]}`; return; }
    if (!(event.key in steps)) return;
    event.preventDefault();
    focus = Math.max(0, Math.min(rows.length - 1, focus + steps[event.key]));
    if (focus * height < frame.scrollTop) frame.scrollTop = focus * height;
    if ((focus + 1) * height > frame.scrollTop + frame.clientHeight) frame.scrollTop = (focus + 1) * height - frame.clientHeight;
    draw();
  }
});
