// The panels below the first one; page.js unpacks what they show, and has the state and the small helpers.

// ---- the distributions of a box --------------------------------------------------------------------------

let coordinates, classes;

function showBars(parent, rows) {
  parent.replaceChildren(...rows.map(({ text, p, at, noise }) => make("div", { role: "listitem", class: at && "at" }, [
    make("span", {}, text),
    make("i", { "aria-hidden": "true" }, make("b", { class: noise && "noise", style: `width: ${100 * p}%` })),
    make("span", {}, percent(p)),
  ])));
}

function curve(k, slot, place) { // an SVG path of 1,024 probabilities; place(position 0..1, height 0..1) -> [x, y]
  const first = (k * 4 + slot) * 1024, p = coordinates.values.subarray(first, first + 1024), most = Math.max(...p);
  const points = Array.from(p, (v, i) => place((i + 0.5) / 1024, v / most).map(x => x.toFixed(1)).join(" "));
  return [`M${place(0, 0).join(" ")}L${points.join("L")}L${place(1, 0).join(" ")}Z`, most];
}

function showBox(k) {
  const box = boxes[k], pad = 175, far = pad - 45;
  state.box = k;
  $("box").value = k;
  const [figure] = pictureSvg(pad, `${box.label}: ${box.tokens.map(token => `${token.slot} ${token.text}`).join(", ")}`);
  figure.append(...boxShape(box, true));
  const places = [(u, v) => [-12 - far * v, u * H], (u, v) => [u * W, -12 - far * v],
    (u, v) => [W + 12 + far * v, u * H], (u, v) => [u * W, H + 12 + far * v]];
  const names = ["y0", "x0", "y1", "x1"], most = [];
  places.forEach((place, slot) => {
    const [path, highest] = curve(k, slot, place), [x, y] = place(0.5, 1.12);
    const middle = { x, y: y + 10, "text-anchor": "middle", transform: slot % 2 ? null : `rotate(-90 ${x} ${y})` };
    most.push(`${names[slot]} ${percent(highest)}`);
    figure.append(svg("path", { class: "curve", d: path }), svg("text", middle, names[slot]));
  });
  $("curves").replaceChildren(figure);
  $("curves-text").textContent = `the likeliest positions have ${list(most)}.`;
  const count = classes.shape[1], p = classes.values.subarray(k * count, (k + 1) * count);
  const order = Array.from(p.keys()).sort((a, b) => p[b] - p[a]), best = order.slice(0, 10);
  if (!best.includes(count - 1)) best.push(count - 1);
  const row = c => ({ text: data.names[c], p: p[c], at: data.names[c] === box.label, noise: c === count - 1 });
  showBars($("classes"), best.map(row));
  document.querySelectorAll("[data-box]").forEach(node => node.classList.toggle("at", +node.dataset.box === k));
}

function chooseBox(k) {
  const chip = chips.findIndex(chip => chip.box === k && chip.slot === "class");
  showBox(k);
  select(chip);
}

function buildBoxes() {
  const option = k => make("option", { value: k }, `${boxes[k].label} ${boxes[k].score.toFixed(2)}, box ${k + 1}`);
  const order = boxes.map((box, k) => k).sort((a, b) => boxes[b].score - boxes[a].score);
  const group = (label, stay) =>
    make("optgroup", { label }, order.filter(k => (boxes[k].fate === "stays") === stay).map(option));
  $("box").append(group("objects", true), group("doubles, empty", false));
  $("box").addEventListener("change", event => chooseBox(+event.target.value));
}

function buildTree() {
  const figure = svg("svg", { viewBox: "0 0 1000 640", role: "img", "aria-label": "Branches from y0 to x0, y1 and x1" });
  const top = 60, height = 560, axes = [190, 360, 530, 700], at = position => top + height * position / 1024;
  axes.forEach((x, i) => figure.append(svg("line", { class: "axis", x1: x, x2: x, y1: top, y2: top + height }),
    svg("text", { x, y: 36, "text-anchor": "middle" }, ["y0", "x0", "y1", "x1"][i])));
  figure.append(svg("path", { class: "curve", d: curve(0, 0, (u, v) => [axes[0] - 170 * v, at(1024 * u)])[0] }));
  const used = new Set(boxes.map(box => +box.tokens[0].text)), names = [];
  boxes.forEach((box, k) => {
    const points = box.tokens.slice(0, 4).map((token, i) => [axes[i], at(+token.text)]);
    const bend = (x, from, to) => `C${x - 85} ${from} ${x - 85} ${to} ${x} ${to}`;
    const path = points.map(([x, y], i) => i ? bend(x, points[i - 1][1], y) : `M${x} ${y}`).join("");
    const choose = () => chooseBox(k);
    figure.append(svg("path", { class: "branch", "data-box": k, d: path }),
      svg("path", { class: "hit", d: path, onpointerenter: choose, onclick: choose }));
    if (box.fate === "stays") names.push([points[3][1], box, k]);
  });
  data.peaks.filter(peak => peak.mass > 1e-4).forEach(({ at: y, mass }) => {
    const circle = { class: used.has(y) ? "peak" : "peak left", cx: axes[0], cy: at(y), r: 4 + 24 * Math.sqrt(mass) };
    figure.append(svg("circle", circle, svg("title", {}, `y0 ${y}: ${percent(mass)} of the probability`)));
  });
  let y = 0; // names side by side would cover each other
  names.sort((a, b) => a[0] - b[0]).forEach(([wanted, box, k], i) => {
    y = Math.min(Math.max(wanted + 10, y + 44), top + height - 44 * (names.length - 1 - i) + 10);
    figure.append(svg("text", { x: axes[3] + 22, y, class: "leaf", "data-box": k }, box.label));
  });
  $("tree").append(figure);
}

function buildScores() {
  const sequence = form === "sequence";
  const order = boxes.map((box, k) => k);
  if (!sequence) order.sort((a, b) => boxes[b].score - boxes[a].score);
  $("threshold").value = state.threshold;
  const why = (box, k) => isKept(box) ? "kept" : box.fate === "stays" ? "below the threshold"
    : box.fate === "empty" ? "empty: it ends before it begins" : `double of box ${box.fate + 1}, ${boxes[box.fate].label}`;
  const update = () => {
    state.threshold = +$("threshold").value;
    $("threshold-name").textContent = state.threshold.toFixed(2);
    $("score-list").replaceChildren(...order.map(k => {
      const box = boxes[k], share = p => `width: ${100 * p}%`;
      const bars = [make("b", { style: share(Math.min(1, box.score)) })];
      if (sequence) bars.push(make("b", { class: "noise", style: share(box.noise) }));
      const look = `bar${isKept(box) ? "" : " low"}${k === state.box ? " at" : ""}`;
      return make("button", { type: "button", "data-box": k, class: look, onclick: () => chooseBox(k) }, [
        make("span", {}, `${k + 1} ${box.label}`),
        make("i", { "aria-hidden": "true" }, bars),
        make("span", {}, box.score.toFixed(2)),
        make("em", {}, `${sequence ? `noise ${percent(box.noise)}, ` : ""}${why(box, k)}`),
      ]);
    }));
    const stay = boxes.filter(box => box.fate === "stays"), kept = boxes.filter(isKept);
    const what = `${boxes.length} ${sequence ? "boxes" : "branches"}`;
    $("scores-count").textContent = `${what}, ${stay.length} after NMS, ${kept.length} above the threshold.`;
    for (const node of document.querySelectorAll("#tree [data-box]"))
      node.classList.toggle("kept", isKept(boxes[node.dataset.box]));
    $("answer").textContent = answerText();
    showReading(state.chip);
    showChanges();
  };
  $("threshold").addEventListener("input", update);
  update();
}

function answerText() {
  if (inWords) return `“${data.prompt}” was answered: “${data.text}”.`;
  const kept = boxes.filter(isKept).sort((a, b) => b.score - a.score);
  const how = form === "sequence" ? "one box after the other" : `all at once, in ${boxes.length} branches`;
  const found = list(kept.map(box => `${box.label} ${box.score.toFixed(2)}`)) || "nothing found";
  return `“${data.prompt}” was answered ${how}: ${found}.`;
}

// ---- the logit lens --------------------------------------------------------------------------------------

let lens;

function buildLens() {
  const { names, shown } = data.lens, last = model.layers;
  if (!names.length) { $("lens").hidden = true; return; }
  const image = new Image();
  const size = { width: 256, height: Math.round(256 * H / W), role: "img" };
  const canvases = Array.from({ length: last + 1 }, () => make("canvas", size));
  const captions = canvases.map(() => make("figcaption"));
  $("lens-maps").append(...canvases.map((canvas, i) => make("figure", {}, [canvas, captions[i]])));
  const show = c => {
    const at = (layer, patch) => lens.values[(layer * names.length + c) * P + patch];
    let most = 0;
    for (let i = 0; i <= last; i++) for (let k = 0; k < P; k++) most = Math.max(most, at(i, k));
    canvases.forEach((canvas, i) => {
      const pen = canvas.getContext("2d"), w = canvas.width / side, h = canvas.height / side;
      pen.filter = "grayscale(.75) brightness(.8)";
      pen.drawImage(image, 0, 0, canvas.width, canvas.height);
      pen.filter = "none";
      pen.fillStyle = getComputedStyle(document.body).getPropertyValue("--accent");
      let highest = 0;
      for (let k = 0; k < P; k++) {
        highest = Math.max(highest, at(i, k));
        pen.globalAlpha = 0.9 * at(i, k) / Math.max(most, 1e-9);
        pen.fillRect((k % side) * w, Math.floor(k / side) * h, w, h);
      }
      pen.globalAlpha = 1;
      captions[i].textContent = `${i ? `after layer ${i - 1}` : "before the first layer"}: up to ${percent(highest)}`;
      canvas.setAttribute("aria-label", `${names[c]} ${captions[i].textContent}`);
    });
    const among = inWords ? "tokens" : "classes and noise";
    $("lens-text").textContent = `“${names[c]}” among all ${among}: the strongest colour is ${percent(most)}.`;
    buttons.forEach(button => button.setAttribute("aria-pressed", +button.dataset.class === c));
    others.value = shown.includes(c) ? "" : c;
    state.lens = c;
  };
  const buttons = shown.map(c =>
    make("button", { type: "button", "data-class": c, onclick: () => show(c) }, names[c].trim() || "␣"));
  const choose = event => event.target.value && show(+event.target.value);
  const others = make("select", { "aria-label": "Any class", onchange: choose },
    [make("option", { value: "" }, "any other …"), ...names.map((name, c) => make("option", { value: c }, name))]);
  $("lens-classes").append(...buttons, ...(names.length > shown.length ? [others] : []));
  image.onload = () => show(shown[0]);
  image.src = picture.url;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { show(state.lens); showMask(); });
}

// ---- the mask --------------------------------------------------------------------------------------------

let mask;
const CLOSED = 100; // added to the reasons of closed cells as they are unpacked

const maskOffset = layer => (mask.shape[0] > 1 && layer >= 0 ? layer % 2 : 0) * S * S;
const reasonOf = cell => data.mask.reasons[cell % CLOSED][1];
const tokenName = i => i < P ? placeOf(i) : `“${tokens[i - P].text}” (${tokens[i - P].of})`;

function buildMask() {
  const canvas = $("cells"), names = model.window && mask.shape[0] > 1
    ? [`local layers 0, 2, …: window of ${model.window}`, "global layers 1, 3, …"] : ["all layers"];
  names.forEach((name, kind) => $("mask-layers").append(make("button", { type: "button", onclick: () => {
    $("layer").value = kind + 2;
    $("layer").dispatchEvent(new Event("input"));
  } }, name)));
  canvas.width = canvas.height = S;
  const point = event => {
    const { left, top, width, height } = canvas.getBoundingClientRect(), last = S - 1;
    const place = (part, size) => Math.max(0, Math.min(last, Math.floor(S * part / size)));
    showCell(place(event.clientY - top, height), place(event.clientX - left, width));
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("click", point);
  canvas.addEventListener("keydown", event => {
    const step = event.shiftKey ? 10 : 1;
    const move = { ArrowLeft: [0, -step], ArrowRight: [0, step], ArrowUp: [-step, 0], ArrowDown: [step, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    showCell(...state.cell.map((x, i) => Math.max(0, Math.min(S - 1, x + move[i]))));
  });
}

const SHADES = [1, 0.3, 0.55, 0.8, 0, 0.06, 0.14, 0.4, 0.9, 0]; // of each reason: accent if open, else ink

function showMask() {
  const pen = $("cells").getContext("2d", { willReadFrequently: true });
  const style = getComputedStyle(document.body), offset = maskOffset(state.layer);
  const used = [...new Set(mask.values.subarray(offset, offset + S * S))].sort((a, b) => a - b);
  const colour = reason => {
    const [open] = data.mask.reasons[reason % CLOSED];
    return `color-mix(in srgb, var(--${open ? "accent" : "ink"}) ${100 * SHADES[reason % CLOSED]}%, var(--panel))`;
  };
  const swatch = reason => make("i", { style: `background: ${colour(reason)}` });
  const items = used.map(reason => make("li", {}, [swatch(reason), reasonOf(reason)]));
  if (model.window && offset === 0 && !used.includes(CLOSED + 7))
    items.push(make("li", {}, "the window cuts nothing off: no token of this answer is that far from the first"));
  $("legend").replaceChildren(...items);
  // The browser mixes the colours; one pixel of each tells what they became.
  const pixels = pen.createImageData(S, S), rgb = new Map(used.map((reason, i) => {
    pen.fillStyle = style.getPropertyValue("--panel");
    pen.fillRect(0, 0, 1, 1);
    pen.globalAlpha = SHADES[reason % CLOSED];
    pen.fillStyle = style.getPropertyValue(reason < CLOSED ? "--accent" : "--ink");
    pen.fillRect(0, 0, 1, 1);
    pen.globalAlpha = 1;
    return [reason, pen.getImageData(0, 0, 1, 1).data];
  }));
  for (let i = 0; i < S * S; i++) pixels.data.set(rgb.get(mask.values[offset + i]), 4 * i);
  pen.putImageData(pixels, 0, 0);
  [...$("mask-layers").children].forEach((button, kind, all) =>
    button.setAttribute("aria-pressed", all.length < 2 || kind === offset / (S * S)));
  showCell(...state.cell);
}

function showCell(t, s) {
  state.cell = [t, s];
  const cell = mask.values[maskOffset(state.layer) + t * S + s], [across, down] = document.querySelectorAll(".matrix i");
  Object.assign(across.style, { top: `${100 * t / S}%`, height: `${100 / S}%` });
  Object.assign(down.style, { left: `${100 * s / S}%`, width: `${100 / S}%` });
  const may = cell < CLOSED ? "open" : "closed";
  $("cell").textContent = `Row ${tokenName(t)}, column ${tokenName(s)}: ${may}, ${reasonOf(cell)}.`;
}

// ---- what if ---------------------------------------------------------------------------------------------

function effect(change) { // how much of the answer a change takes: from 0 to 1, in short, and in words
  const where = `${change.tower === "vision" ? "vision layer" : "layer"} ${change.layer}`;
  const without = change.head === null ? `Without ${where}` : `Without head ${change.head} of ${where}`;
  if (inWords) {
    if (change.same) return [0, "·", `${without}: the same answer.`];
    return [1, "≠", `${without}: “${change.text}”.`];
  }
  const kept = [...boxes.keys()].filter(k => isKept(boxes[k]));
  const gone = kept.filter(k => (change.left[k] ?? 0) < state.threshold);
  const lost = gone.map(k => {
    const { label, score } = boxes[k], left = change.left[k];
    return left === null ? `${label} is gone` : `${label} falls from ${score.toFixed(2)} to ${left.toFixed(2)}`;
  });
  const fresh = change.new.filter(([, score]) => score >= state.threshold);
  const also = fresh.length ? `; new: ${list(fresh.map(([label, score]) => `${label} ${score.toFixed(2)}`))}` : "";
  const words = `${without}: ${list(lost) || "no box vanishes"}${also}.`;
  return [gone.length / Math.max(1, kept.length), gone.length ? `−${gone.length}` : "·", words];
}

function showChanges() {
  const table = $("changes"), heads = [...Array(model.heads).keys()].map(head => `head ${head}`);
  const columns = ["whole layer", ...heads].map(name => make("th", { scope: "col" }, name));
  table.replaceChildren(make("thead", {}, make("tr", {}, [make("td"), ...columns])));
  const show = change => {
    table.querySelectorAll(".at").forEach(node => node.classList.remove("at"));
    change.node.classList.add("at");
    $("change").textContent = effect(change)[2];
    state.change = change;
  };
  const cell = change => {
    const [share, text, words] = effect(change), point = () => show(change);
    change.node = make("button", { type: "button", "aria-label": words, onclick: point, onfocus: point,
      onpointerenter: point, style: shadeOf(share) }, text);
    return make("td", {}, change.node);
  };
  const body = make("tbody");
  for (const { tower, layer } of data.what_if.filter(change => change.head === null)) {
    const cells = data.what_if.filter(change => change.tower === tower && change.layer === layer).map(cell);
    body.append(make("tr", {}, [make("th", { scope: "row" }, `${tower} ${layer}`), ...cells]));
  }
  table.append(body);
  if (state.change) show(state.change);
  else $("change").textContent = "Point at a cell to see what happens.";
}
