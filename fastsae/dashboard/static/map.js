"use strict";
// The map of all features. A canvas of its own: Plotly's points are SVG elements, too many at tens of thousands.

fastsae.map = () => {
  const { h, columns, charts, tip } = fastsae;
  // Okabe and Ito's colours, which stay apart for everybody; clusters beyond eight share them and lie apart anyway.
  const hues = ["#e69f00", "#56b4e9", "#009e73", "#d0b000", "#0072b2", "#d55e00", "#cc79a7", "#7a6fd0"];
  const twelve = [...hues, "#8c5a2b", "#00a5a5", "#8a8a00", "#e7298a"];  // categories are told apart by colour alone
  const ramp = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];  // viridis
  const LEAST = 0.2;  // r below which a feature is said to follow no category
  const canvas = h("canvas", { class: "map", tabindex: 0, role: "application", "aria-label": "Map of features; arrow keys move between them, Enter opens one" });
  const about = h("p", { class: "soft" });
  const by = h("select", { id: "map-colour" }, ["cluster", "density", "category"].map((name) => h("option", { value: name }, name)));
  const place = h("figure", null, h("div", { class: "controls" }, h("div", null, h("label", { for: "map-colour" }, "colour by"), by)),
    canvas, about, h("p", { class: "clusters" }));
  let it, mine, view, low, high, chosen = -1;

  charts.when(place, async () => {
    it = await columns("map");
    mine = it.layer.map((layer) => layer === it.here);
    const logs = (it.density ?? []).filter((d) => d > 0).map(Math.log10);
    low = logs.reduce((a, b) => Math.min(a, b), Infinity); high = logs.reduce((a, b) => Math.max(a, b), -Infinity);
    const known = { density: logs.length > 0, category: (it.category ?? []).some((p) => p !== null) };
    for (const option of [...by.options]) if (known[option.value] === false) option.remove();
    by.addEventListener("change", () => { legend(); draw(); });
    reset();
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey) return;  // the page goes on scrolling where the map passes under the pointer; a pinch sends Ctrl
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 200), event.offsetX, event.offsetY);
    }, { passive: false });
    drag();
    canvas.addEventListener("keydown", key);
    canvas.addEventListener("blur", () => tip.hide());
    canvas.addEventListener("focus", () => { if (chosen >= 0) tell(); });
    new ResizeObserver(() => { if (canvas.isConnected) draw(); }).observe(canvas);
    charts.themed(canvas, draw);
    legend();
    draw();
  });

  /** The colour of a density, between the lowest and the highest on a logarithmic scale. */
  function shade(log) {
    const t = Math.max(0, Math.min(1, (log - low) / Math.max(high - low, 1e-9))) * (ramp.length - 1), k = Math.min(Math.floor(t), ramp.length - 2);
    return `rgb(${ramp[k].map((from, n) => Math.round(from + (t - k) * (ramp[k + 1][n] - from))).join()})`;
  }

  /** A point's colour, null for grey. */
  function hue(i) {
    if (by.value === "density") return it.density[i] > 0 ? shade(Math.log10(it.density[i])) : null;
    if (by.value === "category") return it.category[i] !== null && it.r[i] >= LEAST ? twelve[it.category[i] % twelve.length] : null;
    return it.cluster[i] < 0 ? null : hues[it.cluster[i] % hues.length];
  }

  function reset() {
    let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
    for (let i = 0; i < it.x.length; i++) {
      x0 = Math.min(x0, it.x[i]); x1 = Math.max(x1, it.x[i]); y0 = Math.min(y0, it.y[i]); y1 = Math.max(y1, it.y[i]);
    }
    const w = canvas.clientWidth, height = canvas.clientHeight;
    const scale = 0.94 * Math.min(w / Math.max(x1 - x0, 1e-9), height / Math.max(y1 - y0, 1e-9));
    view = { scale, x: w / 2 - scale * (x0 + x1) / 2, y: height / 2 - scale * (y0 + y1) / 2, first: scale };
  }

  const sx = (i) => it.x[i] * view.scale + view.x, sy = (i) => it.y[i] * view.scale + view.y;

  function draw() {
    const ratio = devicePixelRatio || 1, w = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = w * ratio; canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const size = Math.max(1.6, Math.min(7, (it.x.length > 5000 ? 1.8 : 5) * Math.sqrt(view.scale / view.first)));
    const grey = charts.color("soft");
    for (let i = 0; i < it.x.length; i++) {
      const x = sx(i), y = sy(i);
      if (x < -9 || y < -9 || x > w + 9 || y > height + 9) continue;
      const of = hue(i);
      pen.globalAlpha = mine[i] ? (of === null ? 0.45 : 0.9) : 0.25;
      pen.fillStyle = of ?? grey;
      if (it.x.length > 5000) pen.fillRect(x - size / 2, y - size / 2, size, size);
      else { pen.beginPath(); pen.arc(x, y, size / 2, 0, 7); pen.fill(); }
    }
    pen.globalAlpha = 1;
    if (chosen >= 0) {
      pen.strokeStyle = charts.color("ink"); pen.lineWidth = 2;
      pen.beginPath(); pen.arc(sx(chosen), sy(chosen), 8, 0, 7); pen.stroke();
    }
  }

  function zoom(times, x, y) {
    const scale = Math.max(view.first / 2, Math.min(view.first * 200, view.scale * times));
    times = scale / view.scale;
    view = { ...view, scale, x: x - times * (x - view.x), y: y - times * (y - view.y) };
    draw();
  }

  function drag() {
    const held = new Map();
    let moved = 0;
    canvas.addEventListener("pointerdown", (event) => { held.set(event.pointerId, event); moved = 0; canvas.setPointerCapture(event.pointerId); });
    canvas.addEventListener("pointermove", (event) => {
      const before = held.get(event.pointerId);
      if (!before) { choose(nearest(event.offsetX, event.offsetY, 12)); return; }
      const others = [...held.values()].filter((one) => one.pointerId !== event.pointerId);
      if (others.length) {  // two fingers
        const [o] = others, away = (e) => Math.hypot(e.offsetX - o.offsetX, e.offsetY - o.offsetY);
        zoom(away(event) / Math.max(away(before), 1), o.offsetX, o.offsetY);
        moved = 99;
      } else {
        view.x += event.offsetX - before.offsetX; view.y += event.offsetY - before.offsetY;
        moved += Math.abs(event.offsetX - before.offsetX) + Math.abs(event.offsetY - before.offsetY);
        if (moved > 4) draw();
      }
      held.set(event.pointerId, event);
    });
    canvas.addEventListener("pointerup", (event) => {
      held.delete(event.pointerId);
      if (moved > 4) return;
      const near = nearest(event.offsetX, event.offsetY, 16);
      if (near >= 0 && (event.pointerType === "mouse" || near === chosen)) open(near); else choose(near);
    });
    canvas.addEventListener("pointercancel", (event) => held.delete(event.pointerId));
    canvas.addEventListener("pointerleave", () => tip.hide());
  }

  function nearest(x, y, reach) {
    let best = -1, least = reach * reach;
    for (let i = 0; i < it.x.length; i++) {
      const d = (sx(i) - x) ** 2 + (sy(i) - y) ** 2;
      if (mine[i] && d < least) { least = d; best = i; }
    }
    return best;
  }

  function choose(i) {
    if (i === chosen) return;
    chosen = i;
    if (i < 0) tip.hide(); else tell();
    canvas.style.cursor = i < 0 ? "grab" : "pointer";
    draw();
  }

  function tell() {
    const box = canvas.getBoundingClientRect();
    tip.at(`feature ${it.feature[chosen]}${said(chosen)}`, box.left + sx(chosen), box.top + sy(chosen) - 6);
  }

  function said(i) {
    if (by.value === "density") return it.density[i] === null ? "" : ` · on ${fastsae.percent(it.density[i])} of tokens`;
    if (by.value === "category") return it.category[i] === null ? "" : ` · ${it.categories[it.category[i]]}, r ${fastsae.fixed(it.r[i])}`;
    return it.cluster[i] < 0 ? "" : ` · ${named(it.cluster[i])}`;
  }

  const named = (c) => it.names[c] ? `${it.names[c]} (cluster ${c})` : `cluster ${c}`;
  const open = (i) => { location.hash = `#/feature/${it.feature[i]}`; };

  function key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const w = canvas.clientWidth / 2, height = canvas.clientHeight / 2;
    if (event.key in steps) choose(towards(...steps[event.key]));
    else if (event.key === "+" || event.key === "=") zoom(1.5, chosen < 0 ? w : sx(chosen), chosen < 0 ? height : sy(chosen));
    else if (event.key === "-") zoom(1 / 1.5, chosen < 0 ? w : sx(chosen), chosen < 0 ? height : sy(chosen));
    else if (event.key === "0") { reset(); draw(); }
    else if (event.key === "Enter" && chosen >= 0) open(chosen);
    else return;
    event.preventDefault();
    if (chosen >= 0) tell();
  }

  /** The closest feature in a direction; the one in the middle to begin with. */
  function towards(dx, dy) {
    if (chosen < 0) return nearest(canvas.clientWidth / 2, canvas.clientHeight / 2, Infinity);
    let best = chosen, least = Infinity;
    for (let i = 0; i < it.x.length; i++) {
      const x = sx(i) - sx(chosen), y = sy(i) - sy(chosen), along = x * dx + y * dy, across = Math.abs(x * dy - y * dx);
      if (!mine[i] || along <= 0.5 || across > 2 * along) continue;
      const d = along + 2 * across;
      if (d < least) { least = d; best = i; }
    }
    return best;
  }

  function swatch(colour) {
    const made = h("span", { class: "swatch", "aria-hidden": "true" });
    made.style.background = colour;
    return made;
  }

  function legend() {
    const many = fastsae.count(mine.filter(Boolean).length);
    const others = mine.every(Boolean) ? "." : "; features of the other widths are drawn fainter.";
    if (by.value === "density") {
      about.textContent = `${many} features by the share of tokens on which they fire, on a logarithmic scale${others}`;
      place.querySelector(".clusters").replaceChildren(...[0, 0.25, 0.5, 0.75, 1].flatMap((t) => {
        const log = low + t * (high - low);
        return [h("span", { class: "tag" }, swatch(shade(log)), fastsae.percent(10 ** log)), " "];
      }));
    } else if (by.value === "category") {
      about.textContent = `${many} features by the category that each follows best, chosen on one half of the documents; grey: r below ${LEAST} on the other half${others}`;
      const sizes = new Map();
      it.category.forEach((p, i) => { if (mine[i] && hue(i) !== null) sizes.set(p, (sizes.get(p) ?? 0) + 1); });
      place.querySelector(".clusters").replaceChildren(...[...sizes].sort((a, b) => b[1] - a[1]).flatMap(([p, n]) =>
        [h("a", { class: "tag", href: `#/features?proxy=${encodeURIComponent(it.categories[p])}` }, swatch(twelve[p % twelve.length]), `${it.categories[p]}: ${fastsae.count(n)}`), " "]));
    } else clusters();
  }

  function clusters() {
    const sizes = new Map();
    it.cluster.forEach((c, i) => { if (c >= 0 && mine[i]) sizes.set(c, (sizes.get(c) ?? 0) + 1); });
    const largest = [...sizes].sort((a, b) => b[1] - a[1]).slice(0, 24);
    about.textContent = `${fastsae.count(mine.filter(Boolean).length)} features, ${fastsae.count(sizes.size)} clusters`
      + (mine.every(Boolean) ? "." : "; features of the other widths are drawn fainter.");
    place.querySelector(".clusters").replaceChildren(...largest.flatMap(([c, n]) =>
      [h("a", { class: "tag", href: `#/features?cluster=${c}` }, swatch(hues[c % hues.length]), `${named(c)}: ${fastsae.count(n)}`), " "]),
      sizes.size > largest.length ? h("span", { class: "soft" }, `and ${fastsae.count(sizes.size - largest.length)} smaller ones`) : "");
  }

  return place;
};
