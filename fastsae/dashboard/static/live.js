"use strict";
// The live parts, which `fastsae serve` has and a folder of files has not. All text goes in as text, never as HTML.

(() => {
  const { h, load, columns, number, fixed, percent, count, link, page, tip, visible } = fastsae;
  document.head.append(h("link", { rel: "stylesheet", href: "assets/live.css" }));

  const TABS = [["", "Read a text"], ["steer", "Steer"], ["proxy", "Score a proxy"], ["compare", "Compare"]];
  const kept = { text: "", read: null, reads: 0, chosen: null, edits: [], prompt: "", proxy: "", options: {}, jobs: {} };  // between visits

  async function ask(path, body, method = body === undefined ? "GET" : "POST") {
    let answer;
    try {
      answer = await fetch(`api/${path}`, {
        method, body: body === undefined ? undefined : JSON.stringify(body),
        headers: body === undefined ? {} : { "content-type": "application/json" },
      });
    } catch {
      throw new Error("The server does not answer: has it been ended?");
    }
    const found = await answer.json().catch(() => ({}));
    if (!answer.ok) throw Object.assign(new Error(found.detail ?? `The server answers ${answer.status}.`), { status: answer.status });
    return found;
  }

  const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

  /** How a job is. An answer that fails to come is asked for again: the job goes on meanwhile. */
  async function look(id, missed) {
    for (let wait = 500; ; wait *= 2) {
      try {
        return await ask(`jobs/${id}`);
      } catch (error) {
        if (error.status < 500 || wait > 4000) throw error;  // a refusal is an answer
        missed();
        await sleep(wait);
      }
    }
  }

  /** Cancels a job, also one whose number is still on its way here. */
  function cancel(entry) {
    if (entry && !entry.job) entry.asked.then(({ id }) => ask(`jobs/${id}`, undefined, "DELETE")).catch(() => null);
  }

  const alert = (error) => h("p", { class: "note", role: "alert" }, error.message);

  /** What the list says of features, by number: asked once. */
  const known = () => columns("rows").catch(() => null);
  function about(rows, proxies, f) {
    if (!rows) return "";
    return rows.explanation[f] || (rows.score[f] > 0.3 ? `${proxies[rows.proxy[f]] ?? ""} r ${fixed(rows.score[f])}` : "") || (rows.token[f] ? `→ ${rows.token[f]}` : "");
  }

  /** A job's progress with its button to cancel, then what show(result) makes of it. Goes on after the page was left. */
  async function follow(box, kind, show, current) {
    const entry = kept.jobs[kind], mine = () => current() && kept.jobs[kind] === entry;
    if (!entry) return;
    const bar = h("progress", { max: 1, "aria-label": "Progress" });
    const words = h("span", { class: "soft", role: "status" });
    const stop = h("button", { type: "button", class: "small", click: () => { stop.disabled = true; cancel(entry); } }, "Cancel");
    box.replaceChildren(h("div", { class: "progress" }, bar, words, stop));
    let id = null;
    try {
      ({ id } = await entry.asked);
      for (;;) {
        const job = entry.job ?? await look(id, () => { words.textContent = "The server does not answer; asking again …"; });
        if (!mine()) return;
        if (job.state === "waiting") {
          words.textContent = job.ahead ? `waits for ${job.ahead} other${job.ahead > 1 ? "s" : ""}` : "waits";
        } else if (job.state === "running") {
          if (job.total) bar.value = Math.min(1, job.done / job.total); else bar.removeAttribute("value");
          words.textContent = `${count(job.done)}${job.total ? ` of ${count(job.total)}` : ""} ${job.unit}`;
        } else {
          entry.job = job;
          const shown = job.state === "done" ? [await show(job.result)].flat()
            : [h("p", { class: "note", role: "status" }, job.state === "cancelled" ? "Cancelled." : job.error)];
          if (mine()) box.replaceChildren(...shown);
          return;
        }
        await sleep(250);
      }
    } catch (error) {
      if (!mine()) return;
      box.replaceChildren(alert(error));
      if (id === null || error.status) delete kept.jobs[kind];  // refused, or forgotten by the server
      else box.append(h("button", { type: "button", class: "small", click: () => follow(box, kind, show, current) }, "Ask again"));
    }
  }

  /** Asks for a job in the place of the one before, and follows it. Ends when the server has answered. */
  function start(box, kind, path, body, show, current) {
    cancel(kept.jobs[kind]);
    const entry = kept.jobs[kind] = { asked: ask(path, body) };
    follow(box, kind, show, current);
    return entry.asked.catch(() => null);  // which follow tells
  }

  /** A form that is sent once at a time, by its button or by keys. */
  function form(send, ...children) {
    let pending = false;
    const made = h("form", { submit: async (event) => {
      event.preventDefault();
      if (pending) return;
      pending = button.disabled = true;
      try { await send(); } finally { pending = button.disabled = false; }
    } }, children);
    const button = made.querySelector(".primary");
    return made;
  }

  // The second click of a double click asks for nothing: it would cancel what the first has asked for.
  const go = (text) => h("button", { class: "primary", click: (event) => { if (event.detail > 1) event.preventDefault(); } }, text);

  /** Tokens that make one character together are one piece: { text, places }. */
  function pieces(tokens) {
    const found = [];
    let places = [];
    tokens.forEach((token, i) => {
      places.push(i);
      if (token.part && i + 1 < tokens.length) return;
      found.push({ text: token.text, places });
      places = [];
    });
    return found;
  }

  // --- read a text --------------------------------------------------------------------------------------------------

  async function reading(box, current) {
    const text = h("textarea", { maxlength: 10000, dir: "auto", "aria-label": "Text to read", placeholder: "Type or paste a text, in any script" });
    text.value = kept.text;
    const found = h("div", { "aria-live": "polite" });
    const button = go("Which features fire?");
    box.append(form(async () => {
      kept.text = text.value;
      const mine = ++kept.reads;  // who left and came back may ask again while an answer is on its way
      try {
        const read = await ask("activations", { text: text.value });
        if (mine !== kept.reads) return;
        kept.read = read;
        kept.chosen = read.features[0]?.feature ?? null;
        await kept.draw();
      } catch (error) {
        if (mine === kept.reads) found.replaceChildren(alert(error));
      }
    }, text, button), found);
    text.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) button.form.requestSubmit(); });

    async function show() {
      const { tokens, features, active } = kept.read;
      const [rows, overview] = await Promise.all([known(), load("overview")]);
      if (!current()) return;
      const line = h("p", { class: "window reading", dir: "auto", tabindex: 0, "aria-label": "The text, shaded by the chosen feature. Arrow keys move." });
      const all = pieces(tokens);
      const spans = all.map(({ text, places }, n) => h("span", { class: tokens[places[0]].special ? "special" : null }, visible(text, !n)));
      line.append(...spans);
      const beside = h("aside");
      const heads = new Map();
      let place = 0;

      const chosen = () => features.find((row) => row.feature === kept.chosen);
      function paint() {
        const it = chosen(), values = new Map(it?.values ?? []);
        const highest = Math.max(it?.maximum ?? 0, it?.peak ?? 0) || 1;
        spans.forEach((span, n) => {
          const value = Math.max(...all[n].places.map((t) => values.get(t) ?? 0));
          span.classList.toggle("on", value > 0);
          if (value > 0) span.style.setProperty("--a", (0.12 + 0.5 * value / highest).toFixed(2)); else span.style.removeProperty("--a");
        });
        for (const [f, row] of heads) { row.toggleAttribute("data-chosen", f === kept.chosen); row.querySelector("button").setAttribute("aria-pressed", String(f === kept.chosen)); }
      }
      function choose(f) { kept.chosen = f; paint(); }
      function tell(n) {
        place = n;
        spans.forEach((span, i) => span.toggleAttribute("data-here", i === n));
        const values = new Map(chosen()?.values ?? []), { places } = all[n];
        const said = places.map((t) => number(values.get(t) ?? 0));
        tip.over(spans[n], kept.chosen === null ? "nothing fires" : `feature ${kept.chosen}: ${said.length === 1 ? said[0] : said.map((v, i) => `part ${i + 1} ${v}`).join(", ")}`);
      }
      function open(n) {
        const { text, places } = all[n];
        beside.replaceChildren(h("h2", null, "On ", h("bdi", { class: "tok" }, text)), ...places.flatMap((t) => [
          h("p", { class: "soft" }, `token ${t}, id ${tokens[t].id}${places.length > 1 ? ", a part of it" : ""}: ${count(tokens[t].count)} features fire`),
          h("ul", { class: "facts" }, tokens[t].top.map(([f, value]) => h("li", null, h("span", null, link(f, `feature ${f}`), " ", h("bdi", { class: "soft" }, about(rows, overview.proxies, f))), h("span", null, number(value)))))]));
      }
      const under = (event) => spans.findIndex((span) => span.contains(event.target));
      line.addEventListener("pointerover", (event) => { const n = under(event); if (n >= 0) tell(n); });
      line.addEventListener("pointerleave", () => tip.hide());
      line.addEventListener("click", (event) => { const n = under(event); if (n >= 0) open(n); });
      line.addEventListener("focus", () => { tell(place); open(place); });
      line.addEventListener("blur", () => { tip.hide(); spans.forEach((span) => span.removeAttribute("data-here")); });
      line.addEventListener("keydown", (event) => {
        const turned = getComputedStyle(line).direction === "rtl" ? -1 : 1;
        const step = { ArrowRight: turned, ArrowLeft: -turned }[event.key];
        if (event.key === "Escape") tip.hide();
        if (!step) return;
        event.preventDefault();
        tell(Math.max(0, Math.min(spans.length - 1, place + step)));
        open(place);
      });

      const body = features.map((it) => {
        const row = h("tr", null,
          h("th", { scope: "row" }, link(it.feature)),
          h("td", null, h("button", { type: "button", class: "small", "aria-pressed": "false", "aria-label": `Shade feature ${it.feature}`, click: () => choose(it.feature) }, "shade")),
          h("td", null, number(it.peak)), h("td", null, it.maximum ? percent(it.peak / it.maximum) : "–"), h("td", null, count(it.count)),
          h("td", null, h("bdi", { class: "tok" }, all.find(({ places }) => places.includes(it.at)).text)),
          h("td", { class: "words" }, h("bdi", null, about(rows, overview.proxies, it.feature))));
        heads.set(it.feature, row);
        return row;
      });
      found.replaceChildren(
        h("section", null, h("div", { class: "found" }, h("div", null, line,
          h("p", { class: "soft" }, "Shaded by the chosen feature. Point at a token for its value, choose it for all features that fire on it.")), beside)),
        h("section", null, h("h2", null, `${count(active)} features fire, ${features.length < active ? `the strongest ${features.length} of them` : "strongest first"}`),
          h("div", { class: "wide", tabindex: 0, role: "region", "aria-label": "Features that fire" }, h("table", null,
            h("thead", null, h("tr", null, ["feature", "", "peak", "of its maximum", "tokens", "on", "known as"].map((name) => h(name ? "th" : "td", name && { scope: "col", class: name === "known as" ? "words" : null }, name)))),
            h("tbody", null, body)))));
      paint();
      place = Math.max(0, all.findIndex(({ places }) => places.includes(features[0]?.at ?? 0)));
      open(place);
    }
    kept.draw = show;  // of the page that is there when an answer comes
    if (kept.read) await show();
  }

  // --- steer --------------------------------------------------------------------------------------------------------

  const fresh = (feature) => ({ feature, mode: "pin", unit: "multiple", multiple: 2, value: 1 });

  async function steering(box, current, query) {
    for (const f of (query.get("features") ?? "").split(",").filter((word) => /^\d{1,9}$/.test(word)).map(Number)) {
      kept.edits = kept.edits.filter((edit) => Number.isInteger(edit.feature));  // a row that waited for a number
      if (!kept.edits.some((edit) => edit.feature === f)) kept.edits.push(fresh(f));
    }
    if (!kept.edits.length) kept.edits.push(fresh(null));
    const list = h("ul", { class: "edits", "aria-label": "Features to edit" });
    const result = h("div");
    const field = (edit, name, options) => {
      const input = h("input", { type: "number", required: true, ...options, input: () => { edit[name] = input.valueAsNumber; } });
      if (Number.isFinite(edit[name])) input.value = edit[name];
      return input;
    };
    const chosen = (edit, name, all, options) => {
      const select = h("select", { ...options, change: () => { edit[name] = select.value; } },
        all.map(([value, text]) => h("option", { value, selected: edit[name] === value }, text)));
      return select;
    };
    function draw() {
      list.replaceChildren(...kept.edits.map((edit, i) => {
        const times = field(edit, "multiple", { step: "any", min: -100, max: 100, "aria-label": "how many times its maximum" });
        const value = field(edit, "value", { step: "any", min: -1e6, max: 1e6, "aria-label": "activation" });
        const unit = chosen(edit, "unit", [["multiple", "times its maximum"], ["value", "as an activation"]], { "aria-label": "in" });
        const mode = chosen(edit, "mode", [["pin", "set to"], ["add", "add"], ["ablate", "switch off"]]);
        function fit() {  // what is hidden is disabled, or it would hold up the form
          const off = edit.mode === "ablate";
          for (const [it, hidden] of [[times, off || edit.unit !== "multiple"], [value, off || edit.unit !== "value"], [unit, off]]) it.hidden = it.disabled = hidden;
        }
        for (const select of [mode, unit]) select.addEventListener("change", fit);
        fit();
        return h("li", null, h("label", null, "feature", field(edit, "feature", { min: 0, step: 1, max: 2147483647 })), h("label", null, "action", mode),
          h("span", { class: "amount" }, times, value, unit),
          kept.edits.length > 1 && h("button", { type: "button", class: "small", click: () => { kept.edits.splice(i, 1); draw(); } }, "remove"));
      }));
    }
    draw();
    const prompt = h("textarea", { maxlength: 4000, dir: "auto", "aria-label": "Text to go on from", placeholder: "Text to go on from; nothing for a new text" });
    prompt.value = kept.prompt;
    const options = { tokens: 40, samples: 2, temperature: 1, seed: 0, ...kept.options };
    box.append(form(() => {
      kept.prompt = prompt.value;
      kept.options = options;
      const edits = kept.edits.map(({ feature, mode, unit, [unit]: amount }) => mode === "ablate" ? { feature, mode } : { feature, mode, [unit]: amount });
      return start(result, "steer", "steer", { edits, prompts: [prompt.value], ...options }, show, current);
    }, list,
    h("p", null, h("button", { type: "button", class: "small", click: () => { kept.edits.push(fresh(null)); draw(); list.lastChild.querySelector("input").focus(); } }, "another feature")),
    prompt,
    h("div", { class: "controls" },
      h("label", null, "tokens", field(options, "tokens", { min: 1, max: 200 })), h("label", null, "texts", field(options, "samples", { min: 1, max: 4 })),
      h("label", null, "temperature", field(options, "temperature", { min: 0, max: 5, step: "any" })), h("label", null, "seed", field(options, "seed", { min: 0, max: 2147483647 })),
      go("Write"))), result);

    function show({ edits, prompts }) {
      const said = edits.map((edit) => `${edit.feature} ${edit.mode === "ablate" ? "off" : `${edit.mode === "add" ? "plus" : "at"} ${number(edit.value)}`}`).join(", ");
      return prompts.map((it) => h("section", { class: "texts" }, [["As it is", it.plain], [`Feature ${said}`, it.steered]].map(([title, texts]) =>
        h("div", null, h("h2", null, title), texts.map((one) => [
          h("p", { class: "written", dir: "auto" }, h("b", null, it.prompt), h("bdi", null, one.text)), h("p", { class: "soft" }, `${fixed(one.nll)} nats a token to the untouched model`)])))));
    }
    follow(result, "steer", show, current);
  }

  // --- proxies ------------------------------------------------------------------------------------------------------

  async function scoring(box, current) {
    const overview = await load("overview");
    const name = h("input", { required: true, maxlength: 500, size: 28, list: "known-proxies", spellcheck: "false", autocomplete: "off" });
    name.value = kept.proxy;
    const tokens = h("input", { type: "number", min: 1000, max: 5000000, step: 1000, value: 100000, required: true });
    const result = h("div");
    box.append(
      h("p", { class: "soft" }, "A script (Arabic), base64, DNA or hex; regex:[12]\\d{3} for a pattern, tokens:the,of for tokens, years=regex:… to give it a name."),
      form(() => { kept.proxy = name.value; return start(result, "proxy", "proxies", { name: name.value, tokens: tokens.valueAsNumber }, show, current); },
        h("datalist", { id: "known-proxies" }, overview.proxies.map((value) => h("option", { value }))),
        h("div", { class: "controls" }, h("label", null, "proxy", name), h("label", null, "tokens of text", tokens), go("Score every feature"))), result);

    async function show(it) {
      (fastsae.scores ??= new Map()).set(it.name, it.pearson);  // the list of features shows them and sorts by them
      const rows = await known();
      const best = it.features[0];
      return [
        h("section", null, h("h2", null, h("bdi", null, it.name), `: ${count(it.members)} of ${count(it.tokens)} tokens`),
          h("p", { class: "soft" }, it.source === "report" ? "From the report's own pass over the text." : "From a new pass over text.",
            " Chosen by Pearson's r on half of the documents, scored on the others."),
          it.neuron && h("p", null, `The best neuron is ${it.neuron.neuron}, r ${fixed(it.neuron.pearson)}; the best feature has ${fixed(best.pearson)}.`),
          fastsae.table(["feature", "r", "r that chose", "specificity", "lift", "recall", "known as"], it.features.map((row) => [
            link(row.feature), fixed(row.pearson), fixed(row.chosen), percent(row.specificity), row.lift === null ? "–" : `× ${number(row.lift)}`, percent(row.recall),
            h("bdi", null, about(rows, overview.proxies, row.feature))]), { label: "Scores", words: 6 }),
          h("p", null, h("a", { href: `#/features?sort=${encodeURIComponent(`proxy:${it.name}`)}` }, "All features by this score"))),
      ];
    }
    follow(result, "proxy", show, current);
  }

  // --- compare ------------------------------------------------------------------------------------------------------

  async function comparing(box, current, _query, status) {
    if (status.about.other === null) {
      box.append(h("p", { class: "note" }, "The server knows no other dictionary: start it with --other-sae. What the report knows is under ", h("a", { href: "#/compare" }, "Compare"), "."));
      return;
    }
    const tokens = h("input", { type: "number", min: 1000, max: 5000000, step: 1000, value: 100000, required: true });
    const result = h("div");
    box.append(form(() => start(result, "compare", "compare", { tokens: tokens.valueAsNumber }, show, current),
      h("p", { class: "soft" }, `Looks for each of ${count(status.about.d_sae)} features among the ${count(status.about.other)} of the other dictionary.`),
      h("div", { class: "controls" }, h("label", null, "tokens of text", tokens), go("Compare"))), result);

    async function show({ tokens: read, medians }) {
      const found = await ask("compare?sort=pearson&limit=100");
      return h("section", null, h("h2", null, `Median r ${fixed(medians.pearson)} on ${count(read)} tokens`),
        h("p", { class: "soft" }, `Held out ${fixed(medians.held_out)}, one to one ${fixed(medians.assigned_held_out)} held out, neurons ${fixed(medians.neurons)}. The ${count(found.rows.length)} most alike of ${count(found.total)}:`),
        fastsae.table(["feature", "its match", "r", "held out", "logits", "tokens"], found.rows.map((row) => [
          link(row.feature), row.best === null ? "–" : String(row.best), fixed(row.pearson), fixed(row.held_out), fixed(row.logit_pearson), count(row.fires)]), { label: "Matches" }));
    }
    follow(result, "compare", show, current);
  }

  // --- the page -----------------------------------------------------------------------------------------------------

  page("live", async (main, argument, query, current) => {
    const status = await ask("status");
    main.classList.add("live");
    main.append(h("h1", null, "Live"));
    if (status.note) main.append(h("p", { class: "note", role: "status" }, status.note));  // why not, or a warning
    if (!status.live && argument !== "proxy") return undefined;
    const tab = TABS.some(([name]) => name === (argument ?? "")) ? argument ?? "" : "";
    if (status.live) main.append(h("p", { class: "soft" }, `${status.about.model || "The model"}, ${status.about.hook}, ${count(status.about.d_sae)} features`));
    main.append(
      h("nav", { class: "tabs", "aria-label": "Live questions" }, TABS.map(([name, text]) =>
        h("a", { href: `#/live${name ? `/${name}` : ""}`, "aria-current": name === tab ? "page" : null }, text))));
    const box = h("div");
    main.append(box);
    await { "": reading, steer: steering, proxy: scoring, compare: comparing }[tab](box, current, query, status);
    return undefined;
  });

  // A feature's page leads to its edits, where there is a model. "shown" does not bubble, but is seen on its way down.
  let model = null;
  document.addEventListener("shown", async (event) => {
    const here = /^#\/feature\/(\d{1,9})$/.exec(location.hash);
    const title = here && event.target.querySelector("h1");
    if (!title || Number(here[1]) >= (await fastsae.load("overview")).d_sae) return;
    model ??= ask("status").catch(() => null);
    if ((await model)?.live) title.after(h("p", null, h("a", { href: `#/live/steer?features=${Number(here[1])}` }, "Pin it or switch it off")));
  }, true);
})();
