"use strict";
// Charts by Plotly, which is loaded when the first one is wanted, after the text is on the page.

fastsae.charts = (() => {
  const { h } = fastsae;
  let library = null;
  const plotly = () => (library ??= fastsae.script("assets/plotly-basic.min.js"));
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

  // What is drawn again when light becomes dark. A page that went is let go of here and by Plotly, which listens to the
  // window for each of its figures: else all of them, and the cards they show, would stay in memory.
  const drawn = new Map();
  const themed = (place, again) => drawn.set(place, again);
  addEventListener("themed", () => drawn.forEach((again) => again()));
  document.addEventListener("shown", () => {
    for (const place of [...drawn.keys()].filter((one) => !one.isConnected)) {
      drawn.delete(place);
      if (place.data) Plotly.purge(place);
    }
  }, true);

  /** A figure: draw() gives { traces, layout } and is asked again when light becomes dark. label: what it shows. */
  function chart(draw, { label, height = 240, click = null, figures = null }) {
    const place = h("div", { class: "chart", role: "img", "aria-label": label });
    place.style.height = `${height}px`;
    const again = async () => {
      await plotly();
      if (!place.isConnected) return;
      const { traces, layout } = draw();
      await Plotly.react(place, traces, dressed(layout), { displayModeBar: false, responsive: true });
    };
    place.addEventListener("draw", async () => {
      themed(place, again);
      await again();
      if (click && place.on) place.on("plotly_click", (event) => click(event.points[0]));
    }, { once: true });
    when(place, () => place.dispatchEvent(new Event("draw")));
    const children = [place];
    if (figures) {
      children.push(h("details", null, h("summary", null, "The figures"), fastsae.table(figures.head, figures.rows, { label })));
    }
    return h("figure", null, children);
  }

  /** Calls back when an element is near the screen. */
  function when(element, call) {
    const watcher = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      watcher.disconnect();
      call();
    }, { rootMargin: "300px" });
    watcher.observe(element);
  }

  function dressed(layout) {
    const axis = { gridcolor: color("line"), zerolinecolor: color("line"), linecolor: color("line"), automargin: true,
                   fixedrange: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", bargap: 0.06,
      font: { color: color("soft"), size: 12, family: "system-ui, sans-serif" },
      margin: { l: 44, r: 8, t: 8, b: 40 }, showlegend: false, hovermode: "closest",
      legend: { orientation: "h", y: 1.12, x: 0 },
      hoverlabel: { bgcolor: color("paper"), bordercolor: color("line"), font: { color: color("ink") } },
      ...layout,
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
    };
  }

  /** Bars of equal width from counts. */
  function bars(counts, low, width, options = {}) {
    const x = counts.map((_, i) => low + (i + 0.5) * width);
    const text = counts.map((n, i) => `${fastsae.count(n)} · ${fastsae.number(low + i * width)} to ${fastsae.number(low + (i + 1) * width)}`);
    return { type: "bar", x, y: counts, width, hovertext: text, hoverinfo: "text", marker: { color: color(options.color ?? "bar") },
             name: options.name ?? "" };
  }

  return { chart, bars, color, when, themed };
})();
