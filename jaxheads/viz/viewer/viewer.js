"use strict";
(() => {
  // What the page holds: sizes, tokens, names, and for each run one compressed block a layer.
  const about = JSON.parse(document.getElementById("about").textContent);
  const { layers, heads, queries, keys, scale, bits, decimals, thumb, runs, scores } = about;
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const KEEP = 8; // decompressed layers held for each run
  const DIFFERENCE = "difference";
  const state = { layer: 0, head: 0, view: runs.length > 1 ? "both" : "0", query: null, key: null, held: null };
  const blocks = new Map(); // "run.layer" -> Promise of codes [heads, queries, keys]
  let shown = []; // the codes of the chosen head, one array a run
  let request = 0;

  const fromBase64 = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  async function inflate(bytes) {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const raw = await new Response(stream).arrayBuffer();
    if (bits === 8) return new Uint8Array(raw);
    const view = new DataView(raw); // stored little-endian, whatever machine reads it
    return Uint16Array.from({ length: raw.byteLength / 2 }, (_, i) => view.getUint16(2 * i, true));
  }

  function block(run, layer) {
    const name = `${run}.${layer}`;
    const found = blocks.get(name) ?? inflate(fromBase64(byId(`data-${run}-${layer}`).textContent));
    blocks.delete(name); // the newest goes last, so the first is the one to drop
    blocks.set(name, found);
    if (blocks.size > KEEP * runs.length) blocks.delete(blocks.keys().next().value);
    return found;
  }

  const codeAt = (run, q, k) => shown[run][q * keys + k];
  const valueAt = (run, q, k) => (codeAt(run, q, k) / scale) ** 2;
  // Half a step of the square root either way, and the rounding of what is shown; rounded up.
  const errorAt = (value) => {
    const unit = 10 ** -decimals;
    return Math.ceil((Math.sqrt(value) / scale + 0.25 / scale ** 2) / unit + 0.5) * unit;
  };
  const number = (x) => x.toFixed(decimals);
  const signed = (x) => (x < 0 ? "\u2212" : "+") + number(Math.abs(x));
  const visible = (token) => (token === "" ? "\u2205" : token.replace(/\n/g, "\u23ce").replace(/\t/g, "\u21e5").replace(/\r/g, "\u240d"));
  const quoted = (token) => `\u201c${visible(token)}\u201d`;

  // Colours

  function colours() {
    const style = getComputedStyle(root);
    const read = (name) => {
      const hex = style.getPropertyValue(name).trim();
      return [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
    };
    return { low: read("--low"), high: read("--high"), minus: read("--minus"), plus: read("--plus"), zero: read("--zero"), mark: style.getPropertyValue("--mark").trim() };
  }
  const blend = (a, b, t) => a.map((x, i) => Math.round(x + (b[i] - x) * t));

  function paint(canvas, width, height, colourAt) {
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      const [r, g, b] = colourAt(i);
      image.data.set([r, g, b, 255], 4 * i);
    }
    context.putImageData(image, 0, 0);
  }

  function table(from, to, size) {
    return Array.from({ length: size + 1 }, (_, i) => blend(from, to, i / size));
  }

  // The grid of heads

  const cells = [];
  function buildGrid() {
    const grid = byId("grid");
    grid.style.gridTemplateColumns = `repeat(${heads}, max-content)`;
    for (let layer = 0; layer < layers; layer++) {
      const row = document.createElement("div");
      row.setAttribute("role", "row");
      for (let head = 0; head < heads; head++) {
        const cell = document.createElement("button");
        cell.type = "button";
        cell.id = `head-${layer}-${head}`;
        cell.setAttribute("role", "gridcell");
        const score = scores ? `, score ${scores[layer][head]}` : "";
        cell.setAttribute("aria-label", `layer ${layer} head ${head}${score}`);
        cell.title = `${layer}.${head}${score}`;
        cell.append(document.createElement("canvas"), scores ? String(scores[layer][head]) : `${layer}.${head}`);
        cell.addEventListener("click", () => choose(layer, head));
        cells.push(cell);
        row.append(cell);
      }
      grid.append(row);
    }
    grid.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: heads, ArrowUp: -heads }[event.key];
      const at = cells.indexOf(document.activeElement);
      if (step === undefined || at < 0 || !cells[at + step]) return;
      event.preventDefault();
      cells[at + step].focus();
    });
  }

  function drawGrid() {
    const { low, high } = colours();
    const shades = table(low, high, 255);
    const run = state.view === "1" ? 1 : 0;
    const codes = fromBase64(runs[run].thumbs);
    const size = thumb * thumb;
    cells.forEach((cell, n) => {
      paint(cell.firstChild, thumb, thumb, (i) => shades[codes[n * size + i]]);
    });
  }

  function markGrid() {
    cells.forEach((cell, n) => {
      const chosen = n === state.layer * heads + state.head;
      cell.setAttribute("aria-selected", String(chosen));
      cell.tabIndex = chosen ? 0 : -1;
    });
  }

  // The matrices

  const panels = [];
  function buildPanels() {
    const names = state.view === "both" ? [0, 1] : [state.view === DIFFERENCE ? DIFFERENCE : Number(state.view)];
    panels.length = 0;
    byId("panels").replaceChildren(
      ...names.map((run) => {
        const figure = document.createElement("figure");
        const caption = document.createElement("figcaption");
        caption.textContent = run === DIFFERENCE ? `${runs[0].name} \u2212 ${runs[1].name}` : runs[run].name;
        const box = document.createElement("div");
        box.className = "matrix";
        const canvas = document.createElement("canvas");
        canvas.setAttribute("role", "img");
        const overlay = document.createElement("canvas");
        overlay.className = "overlay";
        const side = Math.max(1, Math.floor(480 / Math.max(queries, keys)));
        canvas.style.width = `${side * keys}px`;
        canvas.style.height = `${side * queries}px`;
        overlay.width = side * keys;
        overlay.height = side * queries;
        box.append(canvas, overlay);
        const cellOf = (event) => {
          const area = canvas.getBoundingClientRect();
          const part = (at, size, count) => Math.min(count - 1, Math.max(0, Math.floor((at / size) * count)));
          return [part(event.clientY - area.top, area.height, queries), part(event.clientX - area.left, area.width, keys)];
        };
        box.addEventListener("pointermove", (event) => {
          const [q, k] = cellOf(event);
          point(state.held ?? q, k);
        });
        box.addEventListener("click", (event) => {
          const [q, k] = cellOf(event);
          hold(q);
          point(q, k);
        });
        figure.append(caption, box);
        panels.push({ run, canvas, overlay, side });
        return figure;
      }),
    );
  }

  function drawPanels() {
    const { low, high, minus, plus, zero } = colours();
    for (const { run, canvas } of panels) {
      const where = `layer ${state.layer} head ${state.head}`;
      if (run === DIFFERENCE) {
        const gaps = Float64Array.from({ length: queries * keys }, (_, i) => (shown[0][i] / scale) ** 2 - (shown[1][i] / scale) ** 2);
        const bound = gaps.reduce((most, x) => Math.max(most, Math.abs(x)), 0) || 1;
        paint(canvas, keys, queries, (i) => blend(zero, gaps[i] < 0 ? minus : plus, Math.abs(gaps[i]) / bound));
        canvas.setAttribute("aria-label", `difference of attention, ${where}, symmetric scale to ${number(bound)}`);
      } else {
        const shades = table(low, high, scale);
        paint(canvas, keys, queries, (i) => shades[shown[run][i]]);
        canvas.setAttribute("aria-label", `attention, ${runs[run].name}, ${where}`);
      }
    }
    drawOverlays();
  }

  function drawOverlays() {
    const { mark } = colours();
    for (const { overlay, side } of panels) {
      const context = overlay.getContext("2d");
      context.clearRect(0, 0, overlay.width, overlay.height);
      context.strokeStyle = mark;
      context.lineWidth = Math.min(2, Math.max(1, side / 4));
      if (state.query !== null) context.strokeRect(0, state.query * side, overlay.width, side);
      if (state.key !== null) context.strokeRect(state.key * side, 0, side, overlay.height);
    }
  }

  // The tokens

  const strips = {};
  function buildStrip(name, tokens, onPoint, onClick) {
    const strip = byId(name);
    const items = tokens.map((token, index) => {
      const item = document.createElement("span");
      item.id = `${name}-${index}`;
      item.textContent = visible(token);
      item.setAttribute("role", "option");
      item.setAttribute("aria-label", `${index} ${visible(token)}`);
      item.tabIndex = index ? -1 : 0;
      item.addEventListener("pointerenter", () => onPoint(index));
      item.addEventListener("focus", () => onPoint(index));
      item.addEventListener("click", () => onClick(index));
      return item;
    });
    strip.replaceChildren(...items);
    strips[name] = items;
    strip.onkeydown = (event) => {
      const at = items.indexOf(document.activeElement);
      if (at < 0) return;
      const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 }[event.key];
      if (event.key === "Enter" || event.key === " ") onClick(at);
      else if (to === undefined || !items[to]) return;
      else {
        items[at].tabIndex = -1;
        items[to].tabIndex = 0;
        items[to].focus();
      }
      event.preventDefault();
    };
  }

  function buildStrips() {
    const run = runs[state.view === "1" ? 1 : 0];
    buildStrip("queries", run.queries, (q) => point(q, null), hold);
    buildStrip("keys", run.keys, (k) => point(state.held, k), (k) => point(state.held, k));
  }

  // Colours of one strip by the attention between its tokens and the marked one on the other.
  function colourStrip(name, valueOf, marked) {
    const { low, high, minus, plus, zero } = colours();
    strips[name].forEach((item, index) => {
      const value = valueOf ? valueOf(index) : 0;
      const from = state.view === DIFFERENCE ? zero : low;
      const to = state.view === DIFFERENCE ? (value < 0 ? minus : plus) : high;
      const share = Math.sqrt(Math.abs(value));
      item.style.backgroundColor = value ? `rgb(${blend(from, to, share).join(",")})` : "";
      item.style.color = value && share > 0.55 ? "var(--back)" : "";
      item.classList.toggle("marked", index === marked);
      item.classList.toggle("held", name === "queries" && index === state.held);
      item.setAttribute("aria-selected", String(index === marked));
    });
  }

  const measure = (q, k) => {
    if (state.view === DIFFERENCE) return valueAt(0, q, k) - valueAt(1, q, k);
    return valueAt(state.view === "1" ? 1 : 0, q, k);
  };

  // What is said in numbers

  function values(q, k) {
    const lines = runs.map((run, n) => {
      const value = valueAt(n, q, k);
      return [`value-${n}`, run.name, `${number(value)} \u00b1${errorAt(value).toFixed(decimals)}`];
    });
    if (runs.length > 1) {
      const [a, b] = [valueAt(0, q, k), valueAt(1, q, k)];
      lines.push(["value-difference", `${runs[0].name} \u2212 ${runs[1].name}`, signed(a - b)]);
    }
    byId("values").replaceChildren(
      ...lines.map(([id, name, text]) => {
        const line = document.createElement("li");
        const amount = document.createElement("span");
        amount.id = id;
        amount.textContent = text;
        line.append(`${name}: `, amount);
        return line;
      }),
    );
  }

  function strongest(q, k) {
    const table = byId("strongest");
    const along = q === null ? queries : keys;
    const order = Array.from({ length: along }, (_, i) => i);
    const at = (i) => (q === null ? measure(i, k) : measure(q, i));
    order.sort((a, b) => Math.abs(at(b)) - Math.abs(at(a)) || a - b);
    const run = runs[state.view === "1" ? 1 : 0];
    const tokens = q === null ? run.queries : run.keys;
    table.caption.textContent = q === null ? "Strongest queries" : "Strongest keys";
    table.tBodies[0].replaceChildren(
      ...order.slice(0, 5).map((i) => {
        const row = document.createElement("tr");
        const cells = [String(i), quoted(tokens[i]), ...(state.view === "both" ? runs.map((_, n) => number(q === null ? valueAt(n, i, k) : valueAt(n, q, i))) : [state.view === DIFFERENCE ? signed(at(i)) : number(at(i))])];
        cells.forEach((text, n) => {
          const cell = document.createElement("td");
          if (n > 1) cell.className = "number";
          cell.textContent = text;
          row.append(cell);
        });
        return row;
      }),
    );
    const header = ["", "", ...(state.view === "both" ? runs.map((r) => r.name) : [])].map((text) => {
      const cell = document.createElement("th");
      cell.textContent = text;
      return cell;
    });
    const row = document.createElement("tr");
    row.append(...header);
    table.tHead.replaceChildren(row);
  }

  function describe() {
    const { query, key } = state;
    const run = runs[state.view === "1" ? 1 : 0];
    const parts = [`layer ${state.layer} head ${state.head}`];
    if (query !== null) parts.push(`query ${query} ${quoted(run.queries[query])}`);
    if (key !== null) parts.push(`key ${key} ${quoted(run.keys[key])}`);
    byId("pair").textContent = parts.join(" \u00b7 ");
    byId("values").replaceChildren();
    byId("strongest").hidden = query === null && key === null;
    if (query !== null && key !== null) values(query, key);
    if (query !== null || key !== null) strongest(query, key);
  }

  function refresh() {
    if (!shown.length) return;
    const { query, key } = state;
    colourStrip("keys", query === null ? null : (k) => measure(query, k), key);
    colourStrip("queries", key === null ? null : (q) => measure(q, key), query);
    drawOverlays();
    describe();
  }

  // What happens

  function point(query, key) {
    Object.assign(state, { query, key });
    refresh();
  }

  function hold(query) {
    state.held = state.held === query ? null : query;
    point(query, null);
  }

  async function choose(layer, head) {
    Object.assign(state, { layer, head });
    byId("layer").value = layer;
    byId("head").value = head;
    markGrid();
    const mine = ++request;
    const found = await Promise.all(runs.map((_, run) => block(run, layer)));
    if (mine !== request) return; // another head was chosen meanwhile
    const size = queries * keys;
    shown = found.map((codes) => codes.subarray(head * size, (head + 1) * size));
    drawPanels();
    refresh();
    root.dataset.shown = `${layer}.${head}`;
  }

  function fill(select, options, onChange) {
    select.append(...options.map(([value, text]) => new Option(text, value)));
    select.addEventListener("change", () => onChange(select.value));
  }

  function redraw() {
    drawGrid();
    if (!shown.length) return;
    drawPanels();
    refresh();
  }

  fill(byId("layer"), Array.from({ length: layers }, (_, i) => [i, i]), (value) => choose(Number(value), state.head));
  fill(byId("head"), Array.from({ length: heads }, (_, i) => [i, i]), (value) => choose(state.layer, Number(value)));
  const views = runs.map((run, n) => [String(n), run.name]);
  if (runs.length > 1) views.unshift(["both", "side by side"], [DIFFERENCE, DIFFERENCE]);
  else byId("view-label").hidden = true;
  fill(byId("view"), views, (value) => {
    state.view = value;
    buildPanels();
    buildStrips();
    redraw();
  });
  byId("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = isDark ? "light" : "dark";
    redraw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    state.held = null;
    point(null, null);
  });
  byId("precision").textContent = about.precision;
  buildGrid();
  buildPanels();
  buildStrips();
  drawGrid();
  const [first, second] = about.start;
  choose(first, second);
})();
