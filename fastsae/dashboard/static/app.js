"use strict";
// Starts everything: theme, search, live parts, the page in the address.

(() => {
  const { h, load, page, script, show } = fastsae;

  const root = document.documentElement;
  const remembered = (() => { try { return localStorage.getItem("fastsae-theme"); } catch { return null; } })();
  if (remembered === "light" || remembered === "dark") root.dataset.theme = remembered;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("fastsae-theme", root.dataset.theme); } catch { /* not kept: nothing is lost */ }
    dispatchEvent(new Event("themed"));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("themed")));

  document.getElementById("jump").addEventListener("submit", (event) => {
    event.preventDefault();
    const wanted = event.target.elements.q.value.trim();
    const number = /^(?:feature\s*)?#?(\d+)$/i.exec(wanted);
    location.hash = number ? `#/feature/${Number(number[1])}` : `#/features?q=${encodeURIComponent(wanted)}`;
  });

  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();  // the fragment is the route
    document.getElementById("main").focus();
  });

  page("live", (main) => {
    main.append(h("h1", null, "Live"),
      h("p", { class: "note" }, "Questions to the model need the model. This is a folder of files; start the server on it:"),
      h("pre", null, h("code", null, "fastsae serve report/")));
  });

  addEventListener("hashchange", show);
  const first = /^#\/feature\/(\d{1,9})$/.exec(location.hash);
  if (first) fastsae.card(Number(first[1])).catch(() => null);  // on its way while the live parts load
  const ready = fastsae.server ? script("assets/live.js").catch(() => null) : Promise.resolve();
  ready.then(() => load("overview")).then((overview) => {
    if (!overview.has.match && !fastsae.server) document.querySelector('nav a[href="#/compare"]').hidden = true;
    return show();
  }, (error) => {
    document.getElementById("main").append(h("p", { class: "note", role: "alert" }, error.message));
  });
})();
