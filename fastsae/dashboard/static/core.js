"use strict";
// The parts every page uses: data that come as scripts, elements without innerHTML, numbers, routes, the value tip.

const fastsae = (() => {
  const values = new Map(), waiting = new Map();
  const CARDS = 12;  // files of cards that are kept: each takes some megabytes, and a dictionary has hundreds

  /** Called by the data files. */
  function put(name, value) {
    values.set(name, value);
    waiting.get(name)?.resolve(value);
    waiting.delete(name);
  }

  /** The value of data/NAME.js. A script and no fetch: a page opened from a disk may not fetch. */
  function load(name) {
    if (values.has(name)) return Promise.resolve(values.get(name));
    if (!waiting.has(name)) {
      const entry = {};
      entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
      waiting.set(name, entry);
      const fail = (error) => { if (waiting.get(name) === entry) waiting.delete(name); entry.reject(error); };
      // A file that was cut short does not parse: it has run without a call of put.
      script(`data/${name}.js`).then(() => fail(new Error(`data/${name}.js is damaged: copy the report's folder again, or make it again.`)), fail);
    }
    return waiting.get(name).promise;
  }

  /** Columns that were cut into files NAME-0, NAME-1, …, as one; null where there are none. Kept after the first call. */
  async function columns(name) {
    if (values.has(name)) return values.get(name);
    const count = (await load("overview")).about.parts[name];
    if (!count) return null;
    const parts = await Promise.all(Array.from({ length: count }, (_, i) => load(`${name}-${i}`)));
    const whole = { ...parts[0] };
    for (const [key, column] of Object.entries(whole)) {
      if (Array.isArray(column)) whole[key] = [].concat(...parts.map((part) => part[key] ?? []));
    }
    parts.forEach((_, i) => values.delete(`${name}-${i}`));
    values.set(name, whole);
    return whole;
  }

  /** A feature's card, unpacked. */
  async function card(f) {
    const { about, d_sae } = await load("overview");
    if (!Number.isInteger(f) || f < 0 || f >= d_sae) throw new Error(`Features are numbers from 0 to ${d_sae - 1}.`);
    let low = 0, high = about.cards.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (about.cards[middle] <= f) low = middle; else high = middle - 1;
    }
    const name = `cards-${low}`, { tokens, width, cards } = await load(name);
    const packed = cards[f - about.cards[low]], open = (window_) => unpack(window_, tokens, width);
    if (packed?.feature !== f) throw new Error(`data/${name}.js does not hold feature ${f}: it is of another report. Copy the report's folder again.`);
    keep(name);
    return {
      ...packed,
      top: packed.top.map(open), bottom: packed.bottom.map(open),
      intervals: packed.intervals.map((part) => ({ ...part, windows: part.windows.map(open) })),
    };
  }

  /** Of the files of cards the last few: a Map keeps the order in which its entries came. */
  function keep(name) {
    const value = values.get(name);
    if (values.delete(name)) values.set(name, value);
    for (const old of [...values.keys()].filter((key) => key.startsWith("cards-")).slice(0, -CARDS)) values.delete(old);
  }

  const digits = Array.from({ length: 92 }, (_, i) => String.fromCharCode(0x23 + i)).filter((c) => c !== "\\");
  const worth = new Map(digits.map((c, i) => [c, i]));

  /** A window as site.py packs it: tokens as numbers of base 91 in the file's list, of values only what is not 0. */
  function unpack([text, at, places, activations, where, effects], known, width) {
    const tokens = [], parts = new Set();  // parts: tokens of the character of the token after them
    for (let i = 0; i < text.length; i += width) {
      let n = 0;
      for (let k = i; k < i + width; k++) n = n * digits.length + worth.get(text[k]);
      const part = known[n].endsWith("\x80");
      if (part) parts.add(tokens.length);
      tokens.push(part ? known[n].slice(0, -1) : known[n]);
    }
    const dense = (p, v) => { const found = new Array(tokens.length).fill(0); p.forEach((i, n) => { found[i] = v[n]; }); return found; };
    return { tokens, parts, at, activations: dense(places, activations),
             effects: where ? dense(where, effects) : null };
  }

  function script(address) {
    return new Promise((resolve, reject) => {
      const tag = document.createElement("script");
      tag.src = address;
      tag.onload = () => { tag.remove(); resolve(); };
      tag.onerror = () => { tag.remove(); reject(new Error(`${address} is missing: the report was not copied whole. Copy its folder again.`)); };
      document.head.append(tag);
    });
  }

  /** An element. Children that are strings become text; attributes that are functions become listeners. */
  function h(tag, attributes, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes ?? {})) {
      if (value === null || value === undefined || value === false) continue;
      if (typeof value === "function") element.addEventListener(name, value);
      else element.setAttribute(name, value === true ? "" : String(value));
    }
    element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
    return element;
  }

  // --- numbers ------------------------------------------------------------------------------------------------------

  const missing = "–";
  const count = (n) => (n ?? null) === null ? missing : n.toLocaleString("en");
  const fixed = (x, digits = 2) => (x ?? null) === null ? missing : x.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");
  const signed = (x, digits = 2) => (x ?? null) === null ? missing : (x > 0 ? "+" : "") + fixed(x, digits);
  function percent(share) {
    if ((share ?? null) === null) return missing;
    if (share === 0) return "0";
    const digits = share >= 0.1 ? 0 : share >= 0.01 ? 1 : share >= 0.001 ? 2 : share >= 0.0001 ? 3 : share >= 0.00001 ? 4 : 5;
    return `${(100 * share).toFixed(digits)} %`;
  }
  function number(x) {
    if ((x ?? null) === null) return missing;
    const size = Math.abs(x);
    return fixed(x, size >= 100 ? 0 : size >= 10 ? 1 : size >= 0.01 || size === 0 ? 2 : 4);
  }

  // --- routes -------------------------------------------------------------------------------------------------------

  const pages = new Map();
  let turn = 0;

  /** render(main, argument, query) draws the page of #/NAME/argument?query; what it returns is called when it goes. */
  function page(name, render) { pages.set(name, render); }

  let leave = null;

  async function show() {
    const mine = ++turn;
    const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
    const [name, argument] = path.split("/");
    const render = pages.get(name || "overview");
    leave?.();
    leave = null;
    tip.hide();
    for (const link of document.querySelectorAll("nav a")) {
      const here = link.getAttribute("href") === `#/${name === "feature" ? "features" : name}`;
      if (here) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
    }
    const main = h("div");
    try {
      if (!render) throw new Error("There is no such page.");
      const left = await render(main, argument, new URLSearchParams(query ?? ""), () => mine === turn);
      if (mine !== turn) { left?.(); return; }
      leave = left ?? null;
    } catch (error) {
      if (mine !== turn) return;
      main.replaceChildren(h("h1", null, "Nothing to see here"), h("p", { class: "note", role: "alert" }, error.message));
    }
    const place = document.getElementById("main");
    place.replaceChildren(main);
    document.title = main.querySelector("h1")?.textContent ?? "Features";
    if (started) place.focus({ preventScroll: true });
    if (started) window.scrollTo(0, 0);
    started = true;
    main.dispatchEvent(new CustomEvent("shown"));  // last: a page may want its focus and its place back
  }
  let started = false;

  // --- the value of what is pointed at or focused ---------------------------------------------------------------------

  const tip = (() => {
    let box = null;
    function at(text, x, y) {
      if (!box) { box = h("div", { id: "tip", role: "status" }); document.body.append(box); }
      box.textContent = text;
      box.hidden = false;
      const { width, height } = box.getBoundingClientRect();
      box.style.left = `${Math.max(4, Math.min(x - width / 2, innerWidth - width - 4))}px`;
      box.style.top = `${y - height - 8 < 4 ? y + 24 : y - height - 8}px`;
    }
    return {
      at,
      over(element, text) { const r = element.getBoundingClientRect(); at(text, r.left + r.width / 2, r.top); },
      hide() { if (box) box.hidden = true; },
    };
  })();

  const bytes = /((?:‹[0-9A-F]{2}›)+)/;

  /** A token's text: a mark that stands alone on a dotted circle; bytes that make no character small and apart, for they
   *  are written in Latin letters, which must not turn the text around them. */
  function visible(text, alone) {
    return (alone && /^\p{M}/u.test(text) ? "◌" + text : text).split(bytes)
      .map((part, i) => i % 2 ? h("span", { dir: "ltr", class: "byte" }, part) : part).filter((part) => part !== "");
  }

  /** An explanation. What it quotes is kept apart: else a list of Arabic tokens would run from right to left. */
  const explained = (text) => h("bdi", { class: "said" }, text.split(/(`[^`]*`)/).map((part, i) => i % 2 ? h("bdi", null, part) : part));

  /** attributes: label; words: the column, from 0, that holds sentences. */
  const table = (head, rows, attributes) => h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": attributes?.label ?? "Table" },
    h("table", null,
      head && h("thead", null, h("tr", null, head.map((cell, i) => h(cell === "" ? "td" : "th", cell === "" ? null : { scope: "col", class: i === attributes?.words ? "words" : null }, cell)))),
      h("tbody", null, rows.map((row) => h("tr", null, row.map((cell, i) => h(i ? "td" : "th", { scope: i ? null : "row", class: i === attributes?.words ? "words" : null }, cell)))))));

  const link = (f, text) => h("a", { href: `#/feature/${f}` }, text ?? String(f));

  return { put, load, columns, card, script, h, count, fixed, signed, percent, number, page, show, tip, table, link, bytes, visible, explained };
})();
