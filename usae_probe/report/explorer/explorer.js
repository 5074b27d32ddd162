"use strict";
// The table of latents, their cards, and the gallery. All text goes in as text: nothing of the data is read as HTML.
(() => {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const page = read("page-settings"), columns = read("page-latents");
  const $ = (id) => document.getElementById(id);
  const sites = page.class_sites, n = columns.latent.length;
  const pairs = Object.keys(columns).filter((name) => name.startsWith("phi[")).map((name) => name.slice(4, -1));
  const withCard = new Set(page.cards);
  const SVG = "http://www.w3.org/2000/svg";

  // --- small helpers ---

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "text") element.textContent = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }
  function draw(tag, attributes = {}, ...children) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "text") element.textContent = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }
  const known = (value) => typeof value === "number" && Number.isFinite(value);
  const minus = (text) => text.replace("-", "−");
  function short(value, digits = 2) {  // as the terminal spells it: no leading zero, a real minus
    if (!known(value)) return "–";
    const text = value.toFixed(digits);
    const plain = /^-?0\.?0*$/.test(text) ? text.replace("-", "") : text;
    return minus(plain.replace(/^(-?)0\./, "$1."));
  }
  function number(value) {
    if (!known(value)) return "–";
    if (Number.isInteger(value)) return minus(value.toLocaleString("en-US"));
    const size = Math.abs(value);
    return minus(size >= 1000 ? Math.round(value).toLocaleString("en-US") : size >= 1e-3 ? value.toPrecision(3) : value.toExponential(1));
  }
  function percent(rate) {
    if (!known(rate)) return "–";
    const value = 100 * rate;
    return value === 0 ? "0" : value < 0.05 ? "<.1" : value < 9.95 ? short(value, 1) : value.toFixed(0);
  }
  const colour = (name) => (name === "#000000" ? "currentColor" : name);
  const model = (site) => site.split("/")[0];
  const names = new Set(sites.map(model)).size === sites.length ? sites.map(model) : sites;
  const at = (name, latent) => (columns[name] ? columns[name][latent] : null);
  const least = (values) => { const there = values.filter(known); return there.length ? Math.min(...there) : null; };

  // --- what the table shows of each latent ---

  const derived = {
    phi: columns.latent.map((_, i) => least(pairs.flatMap((pair) => [at(`phi[${pair}]`, i), at(`phi_place[${pair}]`, i)]))),
    correlation: columns.latent.map((_, i) => least(pairs.map((pair) => at(`correlation[${pair}]`, i)))),
    auroc: columns.latent.map((_, i) => least(sites.map((site) => at(`auroc[${site}]`, i)))),
  };
  const several = sites.length > 1;
  const labelled = (columns.follows || []).some((label) => label);
  const spelled = (i) => String(at("follows", i) ?? "").replace("=", " = ");
  const shown = [
    { key: "latent", head: "latent", values: columns.latent, text: (i) => String(columns.latent[i]), up: true },
    { key: "class", head: "class", values: columns.category, text: (i) => columns.category[i], left: true, up: true },
    { key: "energy", head: "energy", values: columns.total_energy, text: (i) => number(columns.total_energy[i]) },
    ...(several ? [
      { key: "entropy", head: "FE", values: columns.entropy, text: (i) => short(columns.entropy[i]) },
      { key: "phi", head: "φ", values: derived.phi, text: (i) => short(derived.phi[i]) },
      { key: "correlation", head: "r", values: derived.correlation, text: (i) => short(derived.correlation[i]), minor: true },
    ] : []),
    ...sites.map((site, j) => ({
      key: `rate-${j}`, head: `${names[j]} %`, title: `share of rows of ${site} that fire it`, minor: true,
      values: columns[`rate[${site}]`], text: (i) => percent(columns[`rate[${site}]`][i]),
    })),
    ...(labelled ? [
      { key: "label", head: "label", values: columns.follows, text: spelled, left: true, up: true, faint: (i) => derived.auroc[i] < (page.auroc ?? 0) },
      { key: "auroc", head: "AUROC", values: derived.auroc, text: (i) => short(derived.auroc[i]), minor: true },
    ] : []),
    { key: "card", head: "images", values: columns.latent.map((latent) => (withCard.has(latent) ? 1 : 0)), text: (i) => (withCard.has(columns.latent[i]) ? "●" : ""), minor: true },
  ];
  const haystack = columns.latent.map((latent, i) => `${columns.category[i]} ${spelled(i)} ${at("follows", i) ?? ""}${columns.split[i] ? " split" : ""}${columns.positional[i] ? " positional" : ""}`.toLowerCase());

  // --- filter, sort, and the rows in sight ---

  const view = { order: [], sort: "energy", down: true, at: 0, height: 32 };
  const list = $("rows"), body = $("body");

  function matches(i, wanted) {
    if (wanted.classes.size && !wanted.classes.has(columns.category[i])) return false;
    if (wanted.card && !withCard.has(columns.latent[i])) return false;
    if (!wanted.bounds.every(([least, values]) => known(values[i]) && values[i] >= least)) return false;
    return wanted.tokens.every((token) => (/^#?\d+$/.test(token) && columns.latent[i] === +token.replace("#", "")) || haystack[i].includes(token));
  }
  function wantedNow() {
    const bounds = Object.entries({ "least-energy": columns.total_energy, "least-phi": derived.phi, "least-entropy": columns.entropy });
    return {
      classes: new Set([...document.querySelectorAll("#classes input:checked")].map((box) => box.value)),
      card: $("with-card").checked,
      bounds: bounds.filter(([id]) => $(id) && $(id).value !== "").map(([id, values]) => [+$(id).value, values]),
      tokens: $("search").value.toLowerCase().split(/\s+/).filter((token) => token && token !== "="),
    };
  }
  function refresh() {
    const wanted = wantedNow();
    const order = [];
    for (let i = 0; i < n; i++) if (matches(i, wanted)) order.push(i);
    const { values } = shown.find((column) => column.key === view.sort), sign = view.down ? -1 : 1;
    const empty = (value) => value === null || value === undefined || value === "";
    order.sort((a, b) => {
      const x = values[a], y = values[b];
      if (empty(x) || empty(y)) return empty(x) - empty(y) || a - b;  // what is not known comes last
      if (x === y) return a - b;
      return typeof x === "string" || typeof y === "string" ? sign * String(x).localeCompare(String(y)) : sign * (x - y);
    });
    view.order = order;
    view.at = 0;
    list.scrollTop = 0;
    $("count").textContent = `${order.length.toLocaleString("en-US")} of ${n.toLocaleString("en-US")} latents`;
    for (const column of shown) {
      const cell = $(`head-${column.key}`), own = column.key === view.sort;
      cell.setAttribute("aria-sort", own ? (view.down ? "descending" : "ascending") : "none");
      cell.querySelector("span").textContent = own ? (view.down ? " ▾" : " ▴") : "";
    }
    rows();
  }
  function rows() {
    const fit = Math.ceil(list.clientHeight / view.height) + 8;
    const first = Math.max(0, Math.min(Math.floor(list.scrollTop / view.height) - 4, view.order.length - fit));
    const last = Math.min(view.order.length, first + fit);
    const space = (height) => make("tr", { class: "space", "aria-hidden": "true" }, make("td", { colspan: shown.length, style: `height:${height}px` }));
    const parts = [space(first * view.height)];
    for (let place = first; place < last; place++) parts.push(row(view.order[place], place));
    parts.push(space((view.order.length - last) * view.height));
    body.replaceChildren(...parts);
    $("table").setAttribute("aria-rowcount", view.order.length + 1);
  }
  function row(i, place) {
    const line = make("tr", {
      class: "row", "aria-rowindex": place + 2, "aria-selected": String(place === view.at), "data-latent": columns.latent[i],
      onclick: () => { view.at = place; open(columns.latent[i]); },
    });
    for (const column of shown) {
      const cell = make("td", { class: `${column.left ? "text" : ""} ${column.minor ? "minor" : ""}`.trim(), "data-key": column.key });
      if (column.key === "class") cell.append(make("i", { class: "dot", style: `background:${page.classes[columns.category[i]]}` }));
      cell.append(column.text(i));
      if (column.faint?.(i)) cell.classList.add("faint");
      line.append(cell);
    }
    return line;
  }
  function move(by) {
    if (!view.order.length) return;
    view.at = Math.min(Math.max(view.at + by, 0), view.order.length - 1);
    const top = view.at * view.height, head = $("head").offsetHeight;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + view.height > list.scrollTop + list.clientHeight - head) list.scrollTop = top + view.height - list.clientHeight + head;
    rows();
  }
  function sortBy(key) {
    const column = shown.find((each) => each.key === key);
    view.down = view.sort === key ? !view.down : !column.up;
    view.sort = key;
    refresh();
  }

  // --- plots ---

  function activations(latent, site, card) {
    const { low, high, all, fires } = card.sites[site].histogram;
    const marks = card.pictures.filter((picture) => picture.scores[site] && known(picture.scores[site].score)).map((picture) => [picture.scores[site].score, picture.sites.includes(site), picture.mode]);
    const right = Math.max(high, ...marks.map(([score]) => score)), left = Math.min(low, ...marks.map(([score]) => score));
    const x = (value) => 4 + (292 * (value - left)) / Math.max(right - left, 1e-9), width = (292 * (high - low)) / all.length / Math.max(right - left, 1e-9);
    const most = Math.log1p(Math.max(...all, 1)), y = (count) => 78 - (62 * Math.log1p(count)) / most;
    const total = all.reduce((a, b) => a + b, 0), firing = fires.reduce((a, b) => a + b, 0);
    const plot = draw("svg", { class: "plot", viewBox: "0 0 300 94", role: "img", "aria-label": `Natural activations of latent ${latent} in ${site}: ${total} ${card.unit} from ${short(low, 1)} to ${short(high, 1)} standard deviations about their mean; ${firing} fire it` });
    all.forEach((count, k) => {
      const box = { x: x(low + ((high - low) * k) / all.length), width: Math.max(width - 0.6, 0.4) };
      if (count) plot.append(draw("rect", { ...box, y: y(count), height: 78 - y(count), fill: "var(--others)" }));
      if (fires[k]) plot.append(draw("rect", { ...box, y: y(fires[k]), height: 78 - y(fires[k]), fill: colour(page.colours[site]) }));
    });
    for (const [score, own, mode] of marks) {
      plot.append(draw("line", { x1: x(score), x2: x(score), y1: 10, y2: 78, stroke: "var(--ink)", "stroke-dasharray": own ? "none" : "2 2" }, draw("title", { text: `${mode} picture: ${short(score, 1)} σ` })));
    }
    plot.append(draw("line", { class: "axis", x1: 0, x2: 300, y1: 78.5, y2: 78.5 }));
    ticks(left, right).forEach((value) => plot.append(draw("text", { x: x(value), y: 90, "text-anchor": "middle", text: `${minus(String(value))}` })));
    const lines = marks.length ? "; lines: CAM pictures, solid: made here" : "";
    return [plot, make("p", { class: "note", text: `${number(total)} ${card.unit} (log), by σ; coloured: the ${number(firing)} that fire it${lines}` })];
  }
  function ticks(low, high) {
    const rough = (high - low) / 5, power = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough);
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + 1e-9; value += step) found.push(+value.toFixed(6));
    return found;
  }
  function curves(latent, picture, card) {
    const lines = Object.entries(picture.curves).filter(([, points]) => points.length);
    if (!lines.length) return null;
    const strongest = Object.keys(picture.curves).map((site) => card.sites[site] && card.sites[site].strongest).filter(known);
    const values = [...lines.flatMap(([, points]) => points.map(([, value]) => value)), ...strongest];
    const low = Math.min(...values, 0), high = Math.max(...values), steps = Math.max(...lines.flatMap(([, points]) => points.map(([step]) => step)), 1);
    const x = (step) => 22 + (272 * step) / steps, y = (value) => 100 - (92 * (value - low)) / Math.max(high - low, 1e-9);
    const plot = draw("svg", { class: "plot", viewBox: "0 0 300 106", role: "img", "aria-label": `Activation while the ${picture.mode} picture of latent ${latent} was made, in ${lines.map(([site, points]) => `${site}: from ${short(points[0][1], 1)} to ${short(points[points.length - 1][1], 1)} σ`).join("; ")}` });
    ticks(low, high).forEach((value) => plot.append(draw("line", { class: "axis", x1: 22, x2: 294, y1: y(value), y2: y(value) }), draw("text", { x: 18, y: y(value) + 3, "text-anchor": "end", text: minus(String(value)) })));
    for (const [site, points] of lines) {
      const ink = colour(page.colours[site]);
      plot.append(draw("path", { d: points.map(([step, value], k) => `${k ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join(""), fill: "none", stroke: ink, "stroke-width": 1.6 }));
      const top = card.sites[site] && card.sites[site].strongest;
      if (known(top)) plot.append(draw("line", { x1: 22, x2: 294, y1: y(top), y2: y(top), stroke: ink, "stroke-dasharray": "4 3" }));
    }
    return make("div", {}, plot, make("p", { class: "note", text: `σ over steps 0–${steps}, ${lines.map(([site]) => names[sites.indexOf(site)] ?? site).join(" and ")} in their colours; dashed: strongest image` }));
  }

  // --- the card ---

  const dialog = $("card");
  const cards = new Map();
  function cardOf(latent) {
    if (!withCard.has(latent)) return null;
    if (!cards.has(latent)) {
      const block = $(`data-${latent}`);
      if (!block) return null;
      if (cards.size > 60) cards.clear();
      cards.set(latent, JSON.parse(block.textContent));
    }
    return cards.get(latent);
  }
  function picture(entry, alt) {
    return make("img", { src: entry.src, alt, decoding: "async", onload: (event) => { if (event.target.naturalWidth <= 64) event.target.classList.add("small"); } });
  }
  const strip = (entries, build) => make("div", { class: "strip" }, ...entries.map((entry) => build(entry)));
  const captioned = (entry) => make("figure", {}, picture(entry, `${entry.alt}, ${entry.text}`), make("figcaption", { text: entry.text }));
  const heated = (entry) => make("figure", { class: "hot" }, picture(entry, `where: ${entry.alt}`), make("img", { src: entry.heat, alt: "" }));

  function numbers(headings, lines) {
    return make("table", { class: "numbers" },
      headings.length ? make("thead", {}, make("tr", {}, ...headings.map((text) => make("th", { scope: "col", text })))) : null,
      make("tbody", {}, ...lines.map(([name, ...cells]) => make("tr", {}, make("th", { scope: "row", text: name }), ...cells.map((text) => make("td", { text }))))));
  }
  function siteBlock(i, site, card) {
    const block = make("div", { class: "site" }, make("h3", { text: site, style: `border-color:${colour(page.colours[site])}` }));
    const of = card && card.sites[site];
    if (of) {
      const lists = [["fires it most", of.top, captioned], ["where", of.top.filter((entry) => entry.heat), heated], ["fires it only here", of.only, captioned], ["across its activation", of.across, captioned]];
      if (!of.top.length) block.append(make("p", { class: "note", text: of.across.length ? "No image fires it here." : "No images." }));
      for (const [title, entries, build] of lists) {
        if (entries.length) block.append(make("h4", { text: title }), strip(entries, build));
      }
      block.append(make("h4", { text: "natural activations" }), ...activations(columns.latent[i], site, card));
      for (const made of card.pictures.filter((each) => each.mode !== "joint" && each.sites[0] === site)) block.append(...camBlock(i, made, card));
    }
    const value = (name, spell) => spell(at(`${name}[${site}]`, i));
    const lines = [["fires in", `${value("fires", number)} rows, ${value("rate", percent)} %`], ["mean z, when it fires or not", value("mean", number)], ["largest z", value("maximum", number)], ["energy", value("energy", number)], ["share of ‖W_dec‖", value("decoder_norm", short)]];
    if (labelled && known(at(`auroc[${site}]`, i))) {
      lines.push([`AUROC of ${spelled(i)}`, value("auroc", short)], ["of the images that fire it, have the label", value("purity", (v) => (known(v) ? `${percent(v)} %` : "–"))], ["best label here", String(at(`best[${site}]`, i) ?? "–").replace("=", " = ")]);
    }
    block.append(make("h4", { text: "numbers, held out" }), numbers([], lines));
    return block;
  }
  function camBlock(i, made, card) {
    const where = made.mode === "joint" ? "all models together" : made.sites[0];
    const strength = known(made.ratio) ? `${short(made.ratio, 1)}× the strongest image` : "";
    const figure = make("figure", { class: made.failed ? "failed" : null },
      picture(made, `CAM picture of latent ${columns.latent[i]}, ${made.mode}, made in ${where}${made.failed ? ", failed" : ""}; ${strength}`),
      make("figcaption", { text: `${made.failed ? "failed: " : ""}${strength}` }));
    const scores = Object.entries(made.scores).map(([site, score]) => [
      `${names[sites.indexOf(site)] ?? site}${made.sites.includes(site) ? " (made here)" : ""}`,
      score.above_all ? `above all ${number(score.n)}` : known(score.percentile) ? `${score.percentile > 99.949 && score.percentile < 100 ? ">99.9" : short(score.percentile, 1)} %` : "–",
      short(score.score, 1), known(score.transfer) ? `${percent(score.transfer)} %` : "–", score.selected ? "yes" : "no"]);
    const table = numbers(["seen by", `of ${card.unit}`, "σ", "above controls", "selected"], scores);
    return [make("h4", { text: `CAM, ${made.mode}` }), make("div", { class: "cam" }, figure, curves(columns.latent[i], made, card)), make("div", { class: "wide" }, table)];
  }
  function pairBlock(i) {
    const names = { phi: "φ", cofires: "rows in which both fire", jaccard: "Jaccard", lift: "lift", correlation: "r of the codes", q: "q" };
    const lines = Object.entries(names).map(([name, head]) => [head, ...pairs.map((pair) => {
      const value = at(`${name}[${pair}]`, i);
      if (name === "phi" && known(value)) return `${short(value)} [${short(at(`phi_low[${pair}]`, i))}, ${short(at(`phi_high[${pair}]`, i))}]`;
      return name === "jaccard" || name === "correlation" ? short(value) : number(value);
    })]);
    return make("div", { class: "pair" }, make("h4", { text: "fires on the same images?" }), make("div", { class: "wide" }, numbers(["", ...pairs.map((pair) => pair.replace("|", " and "))], lines)));
  }
  function build(latent) {
    const i = columns.latent.indexOf(latent), card = cardOf(latent);
    const place = view.order.indexOf(i);
    const step = (by, text, label) => make("button", { type: "button", text, "aria-label": label, title: label, onclick: () => walk(by), disabled: place < 0 || place + by < 0 || place + by >= view.order.length });
    const head = make("div", { class: "card-head" }, make("h2", { id: "card-title", text: `Latent ${latent}`, tabindex: "-1", autofocus: true }));
    if (i >= 0) {
      head.append(make("span", { class: "tag" }, make("i", { class: "dot", style: `display:inline-block;width:.65em;height:.65em;border-radius:50%;margin-right:.4em;background:${page.classes[columns.category[i]]}` }), columns.category[i]));
      for (const mark of ["split", "positional"]) if (columns[mark][i]) head.append(make("span", { class: "tag", text: mark }));
      if (labelled && spelled(i) && (page.auroc === null || derived.auroc[i] >= page.auroc)) head.append(make("span", { class: "tag", text: `${spelled(i)} (AUROC ${short(derived.auroc[i])})` }));
      if (several) head.append(make("span", { class: "tag", text: `φ ${short(derived.phi[i])}` }), make("span", { class: "tag", text: `FE ${short(columns.entropy[i])}` }));
    }
    head.append(make("span", { class: "spread" }, step(-1, "↑", "Previous (k)"), step(1, "↓", "Next (j)"), make("a", { href: `#latent-${latent}`, text: "link", title: "Permalink", class: "tag" }), make("button", { type: "button", text: "✕", "aria-label": "Close (Esc)", title: "Close (Esc)", onclick: close })));
    const inside = make("div", { class: "card-body" });
    if (i < 0) inside.append(make("p", { text: `There is no latent ${latent} in this run: they are numbered 0 to ${n - 1}.` }));
    else {
      if (card && card.verdict) inside.append(make("p", { text: card.verdict }));
      if (!card) inside.append(make("p", { class: "note", text: columns.category[i] === "dead" ? "It never fires: there is nothing to show." : `This page holds images of ${withCard.size} latents, not of this one: \`usae-probe report RUN_DIR --cards N\` embeds more, \`usae-probe cam RUN_DIR --latents ${latent}\` draws it.` }));
      inside.append(make("div", { class: "sites" }, ...sites.map((site) => siteBlock(i, site, card))));
      const joint = card ? card.pictures.filter((each) => each.mode === "joint") : [];
      for (const made of joint) inside.append(make("div", { class: "sites" }, make("div", { class: "site" }, ...camBlock(i, made, card))));
      if (pairs.length) inside.append(pairBlock(i));
    }
    dialog.replaceChildren(head, inside);
  }
  function show(latent) {
    build(latent);
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    const place = view.order.indexOf(columns.latent.indexOf(latent));
    if (place >= 0) { view.at = place; move(0); }
  }
  function open(latent) {
    if (location.hash === `#latent-${latent}`) show(latent);
    else location.hash = `latent-${latent}`;
  }
  function close() { if (dialog.open) dialog.close(); }
  function walk(by) {
    const place = Math.min(Math.max(view.at + by, 0), view.order.length - 1);
    if (view.order.length && place !== view.at) open(columns.latent[view.order[place]]);
  }
  function follow() {
    const found = /^#latent-(\d+)$/.exec(location.hash);
    if (found) show(+found[1]);
    else close();
  }
  dialog.addEventListener("close", () => { if (/^#latent-/.test(location.hash)) history.replaceState(null, "", location.pathname + location.search + "#latents"); });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) close(); });

  // --- the gallery ---

  function gallery() {
    if (!page.cards.length) { $("to-gallery").hidden = true; return; }
    $("gallery").hidden = false;
    const fill = (entries, watcher) => {
      for (const entry of entries.filter((each) => each.isIntersecting)) {
        watcher.unobserve(entry.target);
        const latent = +entry.target.dataset.latent, card = cardOf(latent);
        const own = (site) => card.pictures.find((made) => made.mode !== "joint" && made.sites[0] === site && !made.failed);
        const images = sites.slice(0, 4).map((site) => card.sites[site].top[0]).filter(Boolean).map((each) => picture(each, each.alt));
        const made = sites.slice(0, 4).map(own).filter(Boolean).map((each) => picture(each, `CAM picture of latent ${latent} in ${each.sites[0]}`));
        entry.target.querySelector("div").replaceChildren(...images, ...made);
      }
    };
    const watcher = new IntersectionObserver(fill, { rootMargin: "300px" });
    const first = 12, tile = (latent) => {
      const i = columns.latent.indexOf(latent), follows = labelled && derived.auroc[i] >= (page.auroc ?? 0) ? spelled(i).replaceAll(" ", "\u00a0") : "";
      const facts = [columns.category[i], several && known(derived.phi[i]) ? `φ ${short(derived.phi[i])}` : "", follows].filter(Boolean).join(" · ");
      const made = make("button", { type: "button", class: "concept", "data-latent": latent, onclick: () => open(latent) }, make("div", {}), make("b", { text: `${latent}` }), make("span", { text: facts }));
      $("tiles").append(made);
      watcher.observe(made);
    };
    page.cards.slice(0, first).forEach(tile);
    if (page.cards.length > first) {
      $("more").textContent = `Show all ${page.cards.length}`;
      $("more").hidden = false;
      $("more").addEventListener("click", () => { $("more").hidden = true; page.cards.slice(first).forEach(tile); });
    }
  }

  // --- keys, events, theme ---

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "checkbox";
    if (event.key === "Escape" && typing) { event.target.blur(); return; }
    if (event.key === "Enter" && event.target === $("search")) { event.preventDefault(); list.focus(); if (view.order.length) open(columns.latent[view.order[view.at]]); return; }
    if (typing) return;
    if (event.key === "/") { event.preventDefault(); close(); $("search").focus(); $("search").select(); }
    else if (event.key === "j" || event.key === "k") { event.preventDefault(); const by = event.key === "j" ? 1 : -1; if (dialog.open) walk(by); else { if (document.activeElement !== list) list.focus(); move(by); } }
    else if (event.key === "Enter" && !dialog.open && (event.target === list || event.target === document.body) && view.order.length) { event.preventDefault(); open(columns.latent[view.order[view.at]]); }
  });
  for (const figure of document.querySelectorAll("figure[tabindex]")) {
    const toggle = () => figure.classList.toggle("large");
    figure.addEventListener("click", toggle);
    figure.addEventListener("keydown", (event) => { if (event.key === "Enter") toggle(); });
  }
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("input", () => refresh());
  $("filters").addEventListener("reset", () => setTimeout(() => refresh()));
  let due = false;
  list.addEventListener("scroll", () => { if (!due) { due = true; requestAnimationFrame(() => { due = false; rows(); }); } }, { passive: true });
  window.addEventListener("hashchange", follow);
  window.addEventListener("resize", rows);
  const store = (value) => { try { if (value === undefined) return localStorage.getItem("usae-probe-theme"); localStorage.setItem("usae-probe-theme", value); } catch { /* a file may have no storage */ } return null; };
  const theme = (name) => { if (name) document.documentElement.dataset.theme = name; };
  theme(store());
  $("theme").addEventListener("click", () => {
    const dark = (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    theme(dark ? "light" : "dark");
    store(dark ? "light" : "dark");
  });

  for (const [name, hue] of Object.entries(page.classes)) {
    const count = columns.category.filter((each) => each === name).length;
    if (count) $("classes").append(make("label", { class: "chip" }, make("input", { type: "checkbox", value: name }), make("i", { style: `background:${hue}` }), `${name} ${count.toLocaleString("en-US")}`));
  }
  if (!several) for (const id of ["least-phi", "least-entropy"]) $(id).closest("label").remove();
  for (const column of shown) {
    const button = make("button", { type: "button", title: column.title ?? null, onclick: () => sortBy(column.key) }, column.head, make("span", { "aria-hidden": "true" }));
    $("head").append(make("th", { id: `head-${column.key}`, scope: "col", class: `${column.left ? "text" : ""} ${column.minor ? "minor" : ""}`.trim() }, button));
  }
  refresh();
  performance.mark("latents");  // from here on the table can be used
  const ready = () => { gallery(); follow(); };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", ready); else ready();
})();
