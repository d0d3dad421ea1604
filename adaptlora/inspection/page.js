"use strict";
(() => {
  const root = document.documentElement;
  const record = (message) => {
    root.dataset.error = message;
    const problem = document.getElementById("problem");
    problem.hidden = false;
    problem.textContent = `This page could not be drawn completely: ${message}`;
  };
  addEventListener("error", (event) => record(event.message));
  addEventListener("securitypolicyviolation", (event) => record(`${event.violatedDirective} forbids ${event.blockedURI}`));

  // Names come from files of anybody's: they become text nodes and attributes, never markup.
  const data = JSON.parse(document.getElementById("data").textContent);
  const { labels, modules, adapters } = data;
  const two = labels.length === 2;
  const SIDES = ["first", "second"];
  const state = { module: 0, sort: null, descending: false, filter: "", logarithmic: false };

  const build = (create) => (tag, attributes = {}, ...children) => {
    const node = create(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name.startsWith("--")) node.style.setProperty(name, value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  };
  const el = build((tag) => document.createElement(tag));
  const draw = build((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));

  const DASH = "–";
  const whole = (value) => (value === null ? DASH : value.toLocaleString("en"));
  const short = (value) => {
    if (value === null) return DASH;
    const size = Math.abs(value);
    return value !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(3)));
  };
  const percent = (value) => (value === null ? DASH : `${(100 * value).toFixed(1)} %`);
  const signed = (value) => (value === null ? DASH : value > 0 ? `+${value}` : String(value).replace("-", "−"));
  const change = ({ ranks }) => (ranks.includes(null) ? null : ranks[1] - ranks[0]);
  // Not Math.max(...values): the values of hundreds of modules are more than a call has room for.
  const largest = (values, least) => values.reduce((most, value) => (value > most ? value : most), least);
  const smallest = (values) => values.reduce((least, value) => (value < least ? value : least), Infinity);
  const limit = (value, low, high) => Math.min(high, Math.max(low, value));

  function describe(module) {
    const parts = labels.map((label, side) => {
      if (module.ranks[side] === null) return `not in ${label}`;
      return `${two ? `${label}: ` : ""}rank ${module.ranks[side]}, ‖ΔW‖ ${short(module.norm[side])}`;
    });
    if (module.both) parts.push(`cosine ${short(module.both.cosine)}, overlap ${percent(module.both.out)}`);
    return `${module.name}: ${parts.join("; ")}`;
  }

  // Summaries

  function facts(card, title, rows, notes) {
    const list = el("dl");
    for (const [name, value] of rows) list.append(el("dt", {}, name), el("dd", {}, value));
    return el("div", { class: `card ${card}` }, el("h3", {}, title), list, ...notes.map((note) => el("p", { class: "note" }, note)));
  }

  function summaries() {
    const cards = adapters.map((adapter, side) => facts(two ? SIDES[side] : "", adapter.label, adapter.facts, adapter.notes));
    if (two) cards.push(facts("", "Side by side", data.together.facts, data.together.notes));
    return el("section", { class: "cards", "aria-label": "Summary" }, ...cards);
  }

  // Heat maps: tables of which one cell takes the focus, and arrow keys the next

  function heatMap({ caption, value, text, top, diverging }) {
    const readout = el("p", { class: "readout", "aria-live": "polite" });
    const rows = data.grid.map((row, y) => {
      const cells = row.map((index, x) => {
        const found = index === null ? null : value(modules[index]);
        if (found === null) return el("td", { role: "gridcell", "aria-label": `${data.kinds[y]}, layer ${data.layers[x]}: none` });
        const share = Math.abs(found) / top;
        const tone = diverging ? (found < 0 ? "less" : "more") : "";
        const show = () => { readout.textContent = describe(modules[index]); };
        const label = `${data.kinds[y]}, layer ${data.layers[x]}: ${text(found)}`;
        return el("td", {
          role: "gridcell", class: `${tone} ${share > 0.72 ? "deep" : ""} ${share > 0.53 ? "half" : ""}`, "data-module": index, "aria-label": label,
          "aria-selected": "false", tabindex: -1, "--share": share.toFixed(3),
          onmouseenter: show, onfocus: show, onclick: () => select(index),
        }, text(found));
      });
      return el("tr", { role: "row" }, el("th", { scope: "row", role: "rowheader" }, data.kinds[y]), ...cells);
    });
    const heads = data.layers.map((layer) => el("th", { scope: "col", role: "columnheader" }, layer));
    const corner = el("th", { scope: "col", role: "columnheader" }, "layer");
    const table = el("table", { class: "heat", role: "grid", "aria-label": caption, onkeydown: (event) => move(event, table) },
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, corner, ...heads)), el("tbody", { role: "rowgroup" }, ...rows));
    table.querySelector("td[data-module]")?.setAttribute("tabindex", 0);
    const ends = diverging ? [`−${top}`, `+${top}`] : ["0", text(top)];
    const scale = el("div", { class: `scale ${diverging ? "diverging" : ""}`, "aria-hidden": "true" }, ends[0], el("i"), ends[1]);
    return el("figure", {}, el("figcaption", {}, caption), el("div", { class: "scroll" }, table), scale, readout);
  }

  function move(event, table) {
    const steps = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
    const cell = event.target.closest("td");
    if (!cell || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") {
      select(Number(cell.dataset.module));
      event.preventDefault();
      return;
    }
    const rows = [...table.tBodies[0].rows];
    let [x, y] = [cell.cellIndex, rows.indexOf(cell.parentNode)];
    let step = steps[event.key];
    if (event.key === "Home") [x, step] = [0, [1, 0]];
    if (event.key === "End") [x, step] = [rows[y].cells.length, [-1, 0]];
    if (!step) return;
    event.preventDefault();
    do {
      x += step[0];
      y += step[1];
      const next = rows[y]?.cells[x];
      if (!next || next.tagName !== "TD") return;
      if (next.dataset.module === undefined) continue; // no such module in this layer
      focusCell(table, next);
      return;
    } while (true);
  }

  function focusCell(table, cell) {
    for (const old of table.querySelectorAll("td[tabindex='0']")) old.tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus();
  }

  function heatMaps() {
    const highest = largest(modules.flatMap((module) => module.ranks), 1);
    const maps = labels.map((label, side) => heatMap({
      caption: two ? `Ranks of ${label}` : "Ranks", value: (module) => module.ranks[side], text: String, top: highest,
    }));
    if (two) {
      const most = largest(modules.map((module) => Math.abs(change(module) ?? 0)), 1);
      maps.push(heatMap({ caption: `Difference of ranks: ${labels[1]} − ${labels[0]}`, value: change, text: signed, top: most, diverging: true }));
      maps.push(heatMap({
        caption: "Overlap of the column spaces of ΔW, in %", top: 1, text: (value) => (100 * value).toFixed(0),
        value: (module) => module.both?.out ?? null,
      }));
    }
    return el("section", { "aria-labelledby": "ranks" }, el("h2", { id: "ranks" }, "Ranks: layer × module"),
      el("p", { class: "note" }, "Arrow keys go from cell to cell; Enter, or a click, chooses the module whose spectra are drawn below."),
      el("div", { class: "maps" }, ...maps));
  }

  // Charts

  const WIDTH = 400, HEIGHT = 240, LEFT = 58, RIGHT = 12, TOP = 12, BOTTOM = 40;

  function ticks(low, high, logarithmic) {
    if (logarithmic) {
      const [from, to] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
      const every = Math.max(1, Math.ceil((to - from + 1) / 6));
      const decades = Array.from({ length: Math.max(0, to - from + 1) }, (_, i) => 10 ** (from + i)).filter((_, i) => i % every === 0);
      return decades.length > 1 ? decades : [low, high];
    }
    const most = (high - low) / 3, size = 10 ** Math.floor(Math.log10(most));
    const step = [5, 2, 1].find((factor) => factor * size <= most * (1 + 1e-9)) * size;
    return Array.from({ length: Math.floor((high - low) / step + 1e-9) + 1 }, (_, i) => low + i * step);
  }

  /* series: one array of numbers or null for each label; context: pale ones of other modules. */
  function chart({ title, across, up, series, names = labels, context = [], logarithmic = false, top = null, marks = null }) {
    const shown = series.map((values) => values ?? []);
    const count = largest([...shown, ...context].map((values) => values.length), 1);
    const all = [...shown, ...context].flat().filter((value) => value > 0);
    if (!all.length) logarithmic = false;
    const high = top ?? (largest(all, 0) * 1.05 || 1), low = logarithmic ? Math.max(smallest(all), high * 1e-8) * 0.9 : 0;
    const scale = logarithmic ? Math.log : (value) => value;
    const x = (i) => LEFT + (count === 1 ? 0.5 : i / (count - 1)) * (WIDTH - LEFT - RIGHT);
    const y = (value) => TOP + (1 - (scale(Math.max(value, low)) - scale(low)) / (scale(high) - scale(low))) * (HEIGHT - TOP - BOTTOM);
    const line = (values) => values.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" ");

    const readout = el("p", { class: "readout", "aria-live": "polite" });
    const cursor = draw("path", { class: "cursor" });
    const summary = shown.map((values, side) => (values.length ? `${names[side] ? `${names[side]}: ` : ""}${values.length} values, ${short(values[0])} to ${short(values.at(-1))}` : null));
    const picture = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "application", "aria-label": `${title}. ${summary.filter(Boolean).join("; ")}. Arrow keys read the values.` },
      draw("title", {}, title));
    for (const tick of marks ?? ticks(low, high, logarithmic)) {
      picture.append(draw("path", { class: "axis", d: `M${LEFT} ${y(tick).toFixed(1)}H${WIDTH - RIGHT}` }),
        draw("text", { x: LEFT - 6, y: (y(tick) + 4).toFixed(1), "text-anchor": "end" }, short(tick)));
    }
    const every = Math.ceil(count / 10);
    for (let i = 0; i < count; i += every) picture.append(draw("text", { x: x(i).toFixed(1), y: HEIGHT - BOTTOM + 16, "text-anchor": "middle" }, String(i + 1)));
    picture.append(draw("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle" }, across));
    for (const values of context) picture.append(draw("polyline", { class: "context", points: line(values) }));
    shown.forEach((values, side) => {
      picture.append(draw("polyline", { class: `series ${SIDES[side]}`, points: line(values) }));
      if (count > 80) return;
      values.forEach((value, i) => {
        const at = [x(i), y(value)];
        picture.append(side === 0
          ? draw("circle", { class: "dot first", cx: at[0].toFixed(1), cy: at[1].toFixed(1), r: 3.5 })
          : draw("rect", { class: "dot second", x: (at[0] - 3).toFixed(1), y: (at[1] - 3).toFixed(1), width: 6, height: 6 }));
      });
    });
    picture.append(cursor);

    let place = 0;
    const read = (i) => {
      place = limit(i, 0, count - 1);
      cursor.setAttribute("d", `M${x(place).toFixed(1)} ${TOP}V${HEIGHT - BOTTOM}`);
      const values = shown.map((values, side) => `${names[side] ? `${names[side]} ` : ""}${short(values[place] ?? null)}`);
      readout.textContent = `${across} ${place + 1}: ${values.join(", ")}`;
    };
    picture.addEventListener("focus", () => read(place));
    picture.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -count, End: count }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      read(place + step);
    });
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * WIDTH;
      read(Math.round(((at - LEFT) / (WIDTH - LEFT - RIGHT)) * (count - 1)));
    });
    const longest = largest(shown.map((values) => values.length), 0);
    const rows = Array.from({ length: longest }, (_, i) => el("tr", {}, el("th", { scope: "row" }, String(i + 1)), ...shown.map((values) => el("td", {}, short(values[i] ?? null)))));
    const heads = names.map((name) => el("th", { scope: "col" }, name || up));
    const table = el("div", { class: "scroll" }, el("table", { class: "values" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, across), ...heads)), el("tbody", {}, ...rows)));
    const keys = el("p", { class: "note" }, `${up} `, ...names.flatMap((name, side) => (name ? [el("span", { class: `key ${SIDES[side]}` }), `${name} `] : [])));
    return el("figure", { class: "card" }, el("figcaption", {}, title), keys, picture, readout, el("details", {}, el("summary", {}, "Values as a table"), table));
  }

  const charts = el("div", { class: "charts" });
  const choice = el("select", { id: "module", onchange: () => select(choice.selectedIndex) }, ...modules.map((module) => el("option", {}, module.name)));

  function redraw() {
    const module = modules[state.module];
    const names = two ? labels : [""];
    const { logarithmic } = state;
    const others = (what) => (two ? [] : modules.filter((_, i) => i !== state.module).map((other) => other[what][0]));
    const drawn = [
      chart({ title: "Norms of the rank vectors, as stored", across: "vector", up: "‖a‖ + ‖b‖", series: module.norms, context: others("norms"), names, logarithmic }),
      chart({ title: "Singular values of scaling · B A", across: "number", up: "σ", series: module.values, context: others("values"), names, logarithmic }),
    ];
    if (module.both) {
      const angles = [module.both.anglesOut, module.both.anglesIn];
      drawn.push(chart({ title: "Principal angles between the two ΔW", across: "angle", up: "degrees", series: angles, names: ["column spaces", "row spaces"], top: 90, marks: [0, 30, 60, 90] }));
    }
    charts.replaceChildren(...drawn);
  }

  function spectra() {
    const box = el("input", { type: "checkbox", id: "log", onchange: () => { state.logarithmic = box.checked; redraw(); } });
    const note = two ? "" : "Pale: all the other modules.";
    return el("section", { "aria-labelledby": "spectra" }, el("h2", { id: "spectra" }, "Norms and singular values of a module"),
      el("div", { class: "controls" }, el("label", {}, "Module", choice), el("label", {}, box, "Logarithmic"), el("span", { class: "note" }, note)), charts);
  }

  // Ranks over the steps: a path for each rank, whose rectangles are the stretches of steps that a group has it

  function overSteps(adapter) {
    const { groups, steps, ranks, ticks: labelled } = adapter.history;
    const high = largest(ranks.flat(), 1);
    const row = limit(320 / groups.length, 3, 22), bottom = TOP + row * groups.length, height = bottom + 110;
    const width = 920, right = width - 28, last = Math.max(1, steps.at(-1));
    const x = (step) => LEFT + (step / last) * (right - LEFT);
    const until = (i) => (i + 1 < steps.length ? x(steps[i + 1]) : right);
    const paths = Array.from({ length: high + 1 }, () => []);
    ranks.forEach((values, group) => {
      for (let i = 0; i < values.length;) {
        let end = i;
        while (end + 1 < values.length && values[end + 1] === values[i]) end += 1;
        paths[values[i]].push(`M${x(steps[i]).toFixed(1)} ${(TOP + group * row).toFixed(1)}H${until(end).toFixed(1)}v${row.toFixed(1)}H${x(steps[i]).toFixed(1)}z`);
        i = end + 1;
      }
    });
    const sums = steps.map((_, i) => ranks.reduce((sum, values) => sum + values[i], 0));
    const most = largest(sums, 1), y = (sum) => height - 36 - (sum / most) * 60;
    const title = `Ranks over the steps${two ? ` of ${adapter.label}` : ""}, from ${adapter.history.file}`;
    const readout = el("p", { class: "readout", "aria-live": "polite" });
    const cursor = draw("path", { class: "cursor" });
    const about = `${title}: ${groups.length} groups, sum of ranks ${sums[0]} at first, ${sums.at(-1)} at the end. Arrow keys read the ranks.`;
    const picture = draw("svg", { viewBox: `0 0 ${width} ${height.toFixed(0)}`, tabindex: 0, role: "application", "aria-label": about }, draw("title", {}, title));
    paths.forEach((path, rank) => { if (path.length) picture.append(draw("path", { class: "level", d: path.join(""), "--share": (rank / high).toFixed(3) })); });
    labelled.forEach(([at, name]) => picture.append(draw("text", { x: LEFT - 6, y: (TOP + (at + 0.5) * row + 4).toFixed(1), "text-anchor": "end" }, name.length > 7 ? `${name.slice(0, 6)}…` : name)));
    for (const tick of ticks(0, last, false)) picture.append(draw("text", { x: x(tick).toFixed(1), y: height - 18, "text-anchor": "middle" }, whole(tick)));
    for (const sum of [0, most]) picture.append(draw("path", { class: "axis", d: `M${LEFT} ${y(sum)}H${right}` }), draw("text", { x: LEFT - 6, y: y(sum) + 4, "text-anchor": "end" }, whole(sum)));
    picture.append(draw("polyline", { class: "series first", points: sums.flatMap((sum, i) => [`${x(steps[i]).toFixed(1)},${y(sum).toFixed(1)}`, `${until(i).toFixed(1)},${y(sum).toFixed(1)}`]).join(" ") }),
      draw("text", { x: LEFT, y: y(most) - 6 }, "sum of ranks"), draw("text", { x: width / 2, y: height - 3, "text-anchor": "middle" }, "training step"), cursor);
    let [column, group] = [0, 0];
    const read = (i, g) => {
      [column, group] = [limit(i, 0, steps.length - 1), limit(g, 0, groups.length - 1)];
      cursor.setAttribute("d", `M${x(steps[column]).toFixed(1)} ${TOP}V${height - 36}M${LEFT} ${(TOP + (group + 0.5) * row).toFixed(1)}H${right}`);
      readout.textContent = `step ${whole(steps[column])}, ${groups[group]}: rank ${ranks[group][column]}; sum ${whole(sums[column])}`;
    };
    picture.addEventListener("focus", () => read(column, group));
    picture.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1], Home: [-steps.length, 0], End: [steps.length, 0] }[event.key];
      if (!step) return;
      event.preventDefault();
      read(column + step[0], group + step[1]);
    });
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      const step = ((((event.clientX - box.left) / box.width) * width - LEFT) / (right - LEFT)) * last;
      let i = steps.findLastIndex((at) => at <= step);
      if (i < 0) i = 0;
      read(i, Math.floor((((event.clientY - box.top) / box.height) * height - TOP) / row));
    });
    const shown = [...new Set([0, 0.25, 0.5, 0.75, 1].map((part) => Math.round(part * (steps.length - 1))))];
    const table = el("table", { class: "values" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "group"), ...shown.map((i) => el("th", { scope: "col" }, `step ${whole(steps[i])}`)))),
      el("tbody", {}, ...groups.map((name, g) => el("tr", {}, el("th", { scope: "row" }, name), ...shown.map((i) => el("td", {}, String(ranks[g][i])))))));
    const scale = el("div", { class: "scale", "aria-hidden": "true" }, "rank 0", el("i"), String(high));
    return el("figure", { class: "card steps" }, el("figcaption", {}, title), el("div", { class: "scroll" }, picture), scale, readout,
      el("details", {}, el("summary", {}, "Ranks as a table"), el("div", { class: "scroll" }, table)));
  }

  // The table

  const pair = (name, label, value, text, about) => labels.map((of, side) => ({
    key: two ? `${name}${side + 1}` : name, label, of: two ? of : null, value: (module) => value(module)[side], text, about,
  }));
  const columns = [
    { key: "module", label: "module", value: (module) => module.short, text: String, about: data.prefix ? `below ${data.prefix}` : "" },
    { key: "inputs", label: "K→N", value: (module) => module.shape[0] * module.shape[1], text: (_, module) => `${whole(module.shape[0])}→${whole(module.shape[1])}`, about: "inputs → outputs; sorted by K · N" },
    ...pair("rank", "rank", (module) => module.ranks, whole, "rank vectors"),
    ...(two ? [{ key: "change", label: "change", value: change, text: signed, about: "of the rank" }] : []),
    ...pair("parameters", "parameters", (module) => module.parameters, whole, "of lora_A and lora_B"),
    ...pair("norm", "‖ΔW‖", (module) => module.norm, short, "Frobenius norm of ΔW = scaling · B A"),
    ...(two
      ? [
        { key: "cosine", label: "cosine", value: (module) => module.both?.cosine ?? null, text: short, about: "⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖)" },
        { key: "distance", label: "distance", value: (module) => module.both?.distance ?? null, text: short, about: "‖ΔW₂ − ΔW₁‖ / ‖ΔW₁‖" },
        { key: "out", label: "overlap", of: "columns", value: (module) => module.both?.out ?? null, text: percent, about: "Σ cos² of the principal angles between the column spaces of ΔW, over the smaller rank" },
        { key: "in", label: "overlap", of: "rows", value: (module) => module.both?.in ?? null, text: percent, about: "the same for the row spaces" },
      ]
      : [
        { key: "largest", label: "σ₁", value: (module) => module.values[0][0] ?? 0, text: short, about: "largest singular value of ΔW" },
        { key: "rank90", label: "r₉₀", value: (module) => module.rank90[0], text: whole, about: "singular values that hold 90 % of Σσ²" },
        { key: "lowest", label: "lowest score", value: (module) => module.lowest[0], text: short, about: "smallest ‖a‖ + ‖b‖ as a share of the first vector's" },
      ]),
  ];
  const body = el("tbody");
  const heads = columns.map((column) => el("th", { scope: "col", "aria-sort": "none" },
    el("button", { type: "button", title: column.about || null, onclick: () => sortBy(column.key, state.sort === column.key ? !state.descending : column.key !== "module") },
      el("span", { class: "what" }, column.label), column.of && el("span", { class: "of" }, ` ${column.of}`))));
  const counted = el("caption", { "aria-live": "polite" });
  const rows = modules.map((module, index) => el("tr", { "data-module": index },
    ...columns.map((column, i) => (i === 0
      ? el("th", { scope: "row" }, el("button", { type: "button", title: module.name, onclick: () => select(index) }, module.short))
      : el("td", {}, column.text(column.value(module), module))))));

  function sortBy(key, descending) {
    if (!columns.some((column) => column.key === key)) return;
    Object.assign(state, { sort: key, descending });
    fillTable();
    writeHash();
  }

  function fillTable() {
    const column = columns.find(({ key }) => key === state.sort);
    let order = modules.map((_, index) => index);
    if (column) {
      const compare = (a, b) => {
        const [left, right] = [column.value(modules[a]), column.value(modules[b])];
        if (left === null || right === null) return (left === null) - (right === null) || a - b; // what is not there comes last
        const less = typeof left === "string" ? left.localeCompare(right, "en", { numeric: true }) : left - right;
        return (state.descending ? -less : less) || a - b;
      };
      order.sort(compare);
    }
    const wanted = state.filter.toLowerCase();
    order = order.filter((index) => modules[index].name.toLowerCase().includes(wanted));
    body.replaceChildren(...order.map((index) => rows[index]));
    heads.forEach((head, i) => head.setAttribute("aria-sort", columns[i] !== column ? "none" : state.descending ? "descending" : "ascending"));
    counted.textContent = `${order.length} of ${modules.length} modules${data.prefix ? `, below ${data.prefix}` : ""}`;
  }

  function table() {
    const filter = el("input", { type: "search", id: "filter", oninput: () => { state.filter = filter.value; fillTable(); } });
    const made = el("table", { class: "modules" }, counted, el("thead", {}, el("tr", {}, ...heads)), body);
    const about = columns.filter((column, i) => column.about && columns.findIndex((other) => other.about === column.about) === i);
    const words = about.flatMap((column) => [el("dt", {}, column.of && !labels.includes(column.of) ? `${column.label} ${column.of}` : column.label), el("dd", {}, column.about)]);
    return el("section", { "aria-labelledby": "table" }, el("h2", { id: "table" }, "Modules"),
      el("div", { class: "controls" }, el("label", {}, "Filter by name", filter)),
      el("div", { class: "scroll" }, made), el("details", {}, el("summary", {}, "What the columns are"), el("dl", {}, ...words)));
  }

  function lists() {
    const made = data.lists.map(([title, entries]) => el("div", {}, el("h3", {}, title), el("ul", {}, ...entries.map((entry) => el("li", {}, entry)))));
    return made.length ? el("section", { class: "lists", "aria-labelledby": "rest" }, el("h2", { id: "rest" }, "Beside them"), ...made) : null;
  }

  // What is chosen, here and in the address: #sort=rank:desc&module=3

  function select(index) {
    if (!(index in modules)) return;
    state.module = index;
    choice.selectedIndex = index;
    for (const cell of document.querySelectorAll(".heat td[data-module]")) cell.setAttribute("aria-selected", Number(cell.dataset.module) === index);
    rows.forEach((row, i) => (i === index ? row.setAttribute("aria-current", "true") : row.removeAttribute("aria-current")));
    redraw();
    writeHash();
  }

  function writeHash() {
    const parts = [`module=${state.module}`];
    if (state.sort) parts.unshift(`sort=${state.sort}:${state.descending ? "desc" : "asc"}`);
    try {
      history.replaceState(null, "", `#${parts.join("&")}`);
    } catch (error) {
      if (error.name !== "SecurityError") throw error; // in a sandboxed frame the page has no address of its own
    }
  }

  function readHash() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const [key, direction] = (wanted.get("sort") ?? "").split(":");
    if (key) sortBy(key, direction === "desc");
    select(Number(wanted.get("module") ?? state.module));
  }

  const histories = adapters.filter((adapter) => adapter.history).map(overSteps);
  const steps = histories.length ? el("section", { "aria-labelledby": "steps" }, el("h2", { id: "steps" }, "Ranks over the steps"), ...histories) : null;
  const sections = [summaries(), heatMaps(), spectra(), steps, table(), lists()];
  document.getElementById("main").append(...sections.filter(Boolean));
  fillTable();
  readHash();
  addEventListener("hashchange", readHash);
  root.dataset.ready = "";
})();
