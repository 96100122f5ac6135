"use strict";
// Texts from outside (file and class names, answers) only ever become text nodes: no innerHTML anywhere.

const data = JSON.parse(document.getElementById("data").textContent);
const { picture, model, tokens, boxes, form } = data;
const inWords = form === "words", side = picture.side, P = side * side, T = tokens.length, S = P + T;
const longest = Math.max(picture.width, picture.height);
const W = 1000 * picture.width / longest, H = 1000 * picture.height / longest; // the picture in SVG units
const state = { layer: -1, head: -1, chip: 0, box: 0, patch: null, threshold: data.threshold || 0, cell: [S - 1, 0] };
const MEAN = -1, MAXIMUM = -2;

// ---- small helpers ---------------------------------------------------------------------------------------

const $ = id => document.getElementById(id);
const percent = p => p >= 0.0995 ? `${Math.round(100 * p)}%` : `${(100 * p).toFixed(1)}%`;
const list = words => words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;

function make(name, attributes, children, space) {
  const node = space ? document.createElementNS(space, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...[children ?? []].flat());
  return node;
}
const svg = (name, attributes, ...children) => make(name, attributes, children, "http://www.w3.org/2000/svg");

async function unpack({ shape, bits, data }) {
  const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return { shape, values: bits === 8 ? new Uint8Array(buffer) : new Uint16Array(buffer) };
}

async function unpackProbabilities(packed) { // whole numbers of square roots, see page.py
  const { shape, values } = await unpack(packed), most = 2 ** packed.bits - 1;
  return { shape, values: Float32Array.from(values, v => (v / most) ** 2) };
}

function pictureSvg(pad, label) {
  const image = svg("image", { href: picture.url, width: W, height: H, preserveAspectRatio: "none" });
  const box = `${-pad} ${-pad} ${W + 2 * pad} ${H + 2 * pad}`;
  return [svg("svg", { viewBox: box, role: "img", "aria-label": label }, image), image];
}

function boxShape(box, at) {
  const [x0, y0, x1, y1] = box.box;
  const size = { x: x0 * W, y: y0 * H, width: Math.max(0, x1 - x0) * W, height: Math.max(0, y1 - y0) * H };
  const right = x0 > 0.6; // a caption there would leave the picture
  const caption = svg("text", { class: "caption", x: right ? x1 * W : size.x + 8, y: Math.max(36, size.y - 12), "text-anchor": right ? "end" : "start" },
    box.score === undefined ? box.label : `${box.label} ${box.score.toFixed(2)}`);
  return [svg("rect", { class: at ? "box at" : "box", ...size }), caption];
}

const isKept = box => inWords || (box.fate === "stays" && box.score >= state.threshold);
const placeOf = patch => `patch in row ${Math.floor(patch / side) + 1}, column ${patch % side + 1}`;

// ---- attention -------------------------------------------------------------------------------------------

let maps, view, chips = [], patches = [];

function combine(choice, count, at) { // the mean, the maximum, or one of `count` numbers
  if (choice >= 0) return at(choice);
  let found = 0;
  for (let i = 0; i < count; i++) found = choice === MEAN ? found + at(i) / count : Math.max(found, at(i));
  return found;
}

function updateView() {
  const { layers, heads } = model, at = maps.values;
  view = new Float32Array(T * S);
  for (let i = 0; i < T * S; i++)
    view[i] = combine(state.layer, layers, l => combine(state.head, heads, h => at[(l * heads + h) * T * S + i]));
}
const reads = (row, key) => view[row * S + key];

function addChip(parent, chip) {
  const i = chips.length, choose = () => { select(i); };
  const slot = chip.slot ? [make("small", {}, chip.slot)] : [];
  chip.node = make("button", { type: "button", class: "chip", tabindex: -1, onclick: choose, onfocus: choose,
    onpointerenter: () => showReading(i), onpointerleave: () => showReading(state.chip) }, [...slot, chip.text]);
  parent.append(chip.node);
  chips.push(chip);
}

function buildTokens() {
  const row = (parent, name, low) => {
    const node = make("div", { class: low ? "row low" : "row" }, make("span", {}, name));
    parent.append(node);
    return node;
  };
  const prompt = row($("tokens"), "the question");
  tokens.slice(0, data.prompt_tokens).forEach((token, i) => addChip(prompt, { text: token.text, row: i }));
  if (inWords) {
    const answer = row($("tokens"), "the answer");
    data.words.forEach(word => addChip(answer, { ...word, slot: null, word }));
    return;
  }
  const order = boxes.map((box, i) => i).sort((a, b) => boxes[b].score - boxes[a].score);
  const rest = order.filter(i => boxes[i].fate !== "stays");
  const addBox = parent => i => {
    const line = row(parent, `${boxes[i].label} ${boxes[i].score.toFixed(2)}`, boxes[i].fate !== "stays");
    boxes[i].tokens.forEach(token => addChip(line, { ...token, box: i }));
  };
  order.filter(i => boxes[i].fate === "stays").forEach(addBox($("tokens")));
  if (rest.length) {
    const more = make("details", {}, make("summary", {}, `${rest.length} more, doubles of these or empty`));
    rest.forEach(addBox(more));
    $("tokens").append(more);
  }
}

function buildPicture() {
  const [figure, image] = pictureSvg(0, "The picture with its patches; arrow keys move the patch");
  image.setAttribute("class", "dim");
  figure.id = "patches";
  figure.setAttribute("tabindex", 0);
  const w = W / side, h = H / side;
  for (let i = 0; i < P; i++) {
    const place = { x: (i % side) * w, y: Math.floor(i / side) * h, width: w, height: h };
    patches.push(svg("rect", { class: "patch", ...place, onpointerenter: () => showPatch(i), onclick: () => showPatch(i) }));
  }
  figure.append(...patches, svg("g", { id: "boxes" }));
  figure.addEventListener("pointerleave", () => showReading(state.chip));
  figure.addEventListener("keydown", event => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -side, ArrowDown: side }[event.key];
    if (!step) return;
    event.preventDefault();
    const next = (state.patch ?? 0) + step;
    if (next >= 0 && next < P) showPatch(next);
  });
  $("picture").append(figure);
}

function shade(nodes, values, write) {
  const most = Math.max(1e-9, ...values);
  nodes.forEach((node, i) => write(node, values[i] / most));
}

function chipName(chip) {
  if (chip.slot) return chip.slot === "class" ? `the class of ${chip.text}` : `${chip.slot} of ${boxes[chip.box].label}`;
  return chip.word ? `“${chip.text}”` : `${chip.text} of the question`;
}

function showReading(i) { // one token: what it reads
  const chip = chips[i], row = chip.row, image = Array.from({ length: P }, (_, key) => reads(row, key));
  state.patch = null;
  shade(patches, image, (node, share) => { node.style.fillOpacity = (0.85 * share).toFixed(3); node.classList.remove("at"); });
  chips.forEach(other => { other.node.style.background = ""; other.node.classList.toggle("at", other === chip); });
  const shapes = boxes.map((box, k) => isKept(box) || k === chip.box ? boxShape(box, k === chip.box) : []);
  $("boxes").replaceChildren(...[0, 1].flatMap(part => shapes.flatMap(shape => shape[part] ?? []))); // captions last
  const text = tokens.map((token, key) => ({ ...token, key, share: reads(row, P + key) }));
  const readable = text.filter(token => mask.values[row_(row) + P + token.key] < CLOSED);
  $("strip").replaceChildren(...readable.map(token => make("div", { role: "listitem", title: token.of,
    style: `--share: ${(100 * Math.min(1, token.share)).toFixed(1)}%` },
    [make("small", {}, percent(token.share)), token.text === " " ? "␣" : token.text])));
  const sum = values => values.reduce((a, b) => a + b, 0), onImage = sum(image);
  const bos = reads(row, P), asked = sum(text.slice(1, data.prompt_tokens).map(token => token.share));
  const rest = sum(text.slice(data.prompt_tokens).map(token => token.share));
  const best = image.indexOf(Math.max(...image)), verb = chip.slot || chip.word ? "To write" : "At";
  const exact = state.layer !== MAXIMUM && state.head !== MAXIMUM;
  $("reading").textContent = `${verb} ${chipName(chip)} it reads ` + (exact
    ? `the picture with ${percent(onImage)} of its attention, <bos> with ${percent(bos)}, the rest of the question with ` +
      `${percent(asked)} and the answer with ${percent(rest)}. ` : "the most that any layer or head reads. ") +
    `The strongest patch, ${placeOf(best)}, has ${percent(image[best])}.`;
}
const row_ = row => maskOffset(state.layer) + (P + row) * S;

function showPatch(patch) { // one patch: which tokens read it
  state.patch = patch;
  patches.forEach((node, i) => node.classList.toggle("at", i === patch));
  const shares = chips.map(chip => reads(chip.row, patch));
  shade(chips.map(chip => chip.node), shares, (node, share) => {
    node.style.background = `color-mix(in srgb, var(--accent) ${Math.round(60 * share)}%, var(--panel))`;
  });
  const order = shares.map((share, i) => i).filter(i => chips[i].slot || chips[i].word || chips[i].row === 0);
  order.sort((a, b) => shares[b] - shares[a]);
  const best = order.slice(0, 3).map(i => `${chipName(chips[i])} (${percent(shares[i])})`);
  $("reading").textContent = `The ${placeOf(patch)} is read most for ${list(best)}.`;
}

function select(i) {
  state.chip = i;
  const chip = chips[i];
  chips.forEach((other, k) => {
    other.node.tabIndex = k === i ? 0 : -1;
    other.node.setAttribute("aria-current", k === i);
  });
  showReading(i);
  if (chip.box !== undefined && chip.box !== state.box) showBox(chip.box);
  if (chip.word) showBars($("best"), chip.word.best.map(([text, p]) => ({ text, p, at: text === chip.text })));
}

function buildControls() {
  const words = (choice, what) => choice === MEAN ? "mean of all" : choice === MAXIMUM ? "maximum of all" : `${what} ${choice}`;
  for (const what of ["layer", "head"]) {
    const input = $(what);
    input.max = model[`${what}s`] + 1;
    const update = () => {
      state[what] = [MEAN, MAXIMUM][input.value] ?? input.value - 2;
      const window = what === "layer" && state.layer >= 0 && mask.shape[0] > 1 && model.window;
      const kind = window ? (state.layer % 2 ? ", global" : `, local: window ${window}`) : "";
      $(`${what}-name`).textContent = words(state[what], what) + kind;
      input.setAttribute("aria-valuetext", $(`${what}-name`).textContent);
      updateView();
      if (state.patch === null) showReading(state.chip); else showPatch(state.patch);
      if (what === "layer") showMask();
    };
    input.addEventListener("input", update);
    update();
  }
  $("tokens").addEventListener("keydown", event => {
    const { key, shiftKey } = event;
    if (key === "ArrowLeft" || key === "ArrowRight") {
      const shownChips = chips.filter(chip => chip.node.offsetParent);
      const next = shownChips[shownChips.indexOf(chips[state.chip]) + (key === "ArrowLeft" ? -1 : 1)];
      if (next) next.node.focus();
    } else if (key === "ArrowUp" || key === "ArrowDown") {
      const input = $(shiftKey ? "head" : "layer");
      input.value = +input.value + (key === "ArrowUp" ? 1 : -1);
      input.dispatchEvent(new Event("input"));
    } else return;
    event.preventDefault();
  });
}

// ---- the distributions of a box --------------------------------------------------------------------------

let coordinates, classes;

function showBars(parent, rows) {
  parent.replaceChildren(...rows.map(({ text, p, at, low }) => make("div", { role: "listitem", class: [at && "at", low && "low"].filter(Boolean).join(" ") || null }, [
    make("span", {}, text), make("i", { "aria-hidden": "true" }, make("b", { class: low && "noise", style: `width: ${100 * p}%` })), make("span", {}, percent(p))])));
}

function curve(k, slot, place) { // an SVG path of 1,024 probabilities; place(position 0..1, height 0..1) -> [x, y]
  const p = coordinates.values.subarray((k * 4 + slot) * 1024, (k * 4 + slot + 1) * 1024), most = Math.max(...p);
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
    const turn = slot % 2 ? "" : `rotate(-90 ${x} ${y})`;
    most.push(`${names[slot]} ${percent(highest)}`);
    figure.append(svg("path", { class: "curve", d: path }), svg("text", { x, y: y + 10, "text-anchor": "middle", transform: turn }, names[slot]));
  });
  $("curves").replaceChildren(figure);
  $("curves-text").textContent = `Left to bottom: y0, y1 along the height, x0, x1 along the width. Each is drawn to its own height; the likeliest position has ${list(most)}.` +
    (form === "parallel" ? " The curve of y0 is the same for all boxes: it is written before they part." : "");
  const count = classes.shape[1], p = classes.values.subarray(k * count, (k + 1) * count);
  const order = Array.from(p.keys()).sort((a, b) => p[b] - p[a]), best = order.slice(0, 10);
  if (!best.includes(count - 1)) best.push(count - 1);
  showBars($("classes"), best.map(c => ({ text: data.names[c], p: p[c], at: data.names[c] === box.label, low: c === count - 1 })));
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
  const group = (label, keep) => make("optgroup", { label }, order.filter(k => (boxes[k].fate === "stays") === keep).map(option));
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
    const path = "M" + points.map(([x, y], i) => i ? `C${x - 85} ${points[i - 1][1]} ${x - 85} ${y} ${x} ${y}` : `${x} ${y}`).join("");
    const choose = () => chooseBox(k);
    figure.append(svg("path", { class: "branch", "data-box": k, d: path }), svg("path", { class: "hit", d: path, onpointerenter: choose, onclick: choose }));
    if (box.fate === "stays") names.push([points[3][1], box, k]);
  });
  data.peaks.filter(peak => peak.mass > 1e-4).forEach(({ at: y, mass }) => figure.append(svg("circle", { class: used.has(y) ? "peak" : "peak left",
    cx: axes[0], cy: at(y), r: 4 + 24 * Math.sqrt(mass) }, svg("title", {}, `y0 ${y}: ${percent(mass)} of the probability`))));
  let y = 0; // names side by side would cover each other
  names.sort((a, b) => a[0] - b[0]).forEach(([wanted, box, k], i) => {
    y = Math.min(Math.max(wanted + 10, y + 44), top + height - 44 * (names.length - 1 - i) + 10);
    figure.append(svg("text", { x: axes[3] + 22, y, class: "leaf", "data-box": k }, box.label));
  });
  $("tree").append(figure);
}

function buildScores() {
  const sequence = form === "sequence";
  $("h-scores").textContent = sequence ? "Where the objects end" : "Which branches stay";
  $("scores-text").textContent = sequence
    ? `The answer always has ${boxes.length} boxes, in this order. Where no object is left, noise, “no object here”, takes the probability (grey) and leaves little to the class (coloured), whose probability is the score. An object that is named twice is removed by non-maximum suppression (NMS).`
    : "Several branches often find the same object. Of boxes of one class that overlap, non-maximum suppression (NMS) keeps the best; of those, the threshold keeps the ones with a higher score. The score of a branch is the probability of its class, lowered a little where its y0 and x0 were unlikely.";
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
      return make("button", { type: "button", "data-box": k, class: `bar${isKept(box) ? "" : " low"}${k === state.box ? " at" : ""}`, onclick: () => chooseBox(k) }, [
        make("span", {}, `${k + 1} ${box.label}`), make("i", { "aria-hidden": "true" }, bars), make("span", {}, box.score.toFixed(2)),
        make("em", {}, sequence ? `noise ${percent(box.noise)}, ${why(box, k)}` : why(box, k))]);
    }));
    const stay = boxes.filter(box => box.fate === "stays"), kept = boxes.filter(isKept);
    $("scores-count").textContent = `${boxes.length} ${sequence ? "boxes" : "branches"}, ${stay.length} after NMS, ${kept.length} above the threshold.`;
    document.querySelectorAll("#tree [data-box]").forEach(node => node.classList.toggle("kept", isKept(boxes[node.dataset.box])));
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
  return `“${data.prompt}” was answered ${how}: ${list(kept.map(box => `${box.label} ${box.score.toFixed(2)}`)) || "nothing found"}.`;
}

// ---- the logit lens --------------------------------------------------------------------------------------

let lens;

function buildLens() {
  const { names, shown } = data.lens, last = model.layers;
  if (!names.length) { $("lens").hidden = true; return; }
  const image = new Image();
  const canvases = Array.from({ length: last + 1 }, () => make("canvas", { width: 256, height: Math.round(256 * H / W), role: "img" }));
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
    $("lens-text").textContent = `“${names[c]}” among all ${inWords ? "tokens" : "classes and noise"}, on one scale: the strongest colour is ${percent(most)}.`;
    buttons.forEach(button => button.setAttribute("aria-pressed", +button.dataset.class === c));
    others.value = shown.includes(c) ? "" : c;
    state.lens = c;
  };
  const buttons = shown.map(c => make("button", { type: "button", "data-class": c, onclick: () => show(c) }, names[c].trim() || "␣"));
  const others = make("select", { "aria-label": "Any class", onchange: event => event.target.value && show(+event.target.value) },
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
  const pen = $("cells").getContext("2d", { willReadFrequently: true }), style = getComputedStyle(document.body), offset = maskOffset(state.layer);
  const used = [...new Set(mask.values.subarray(offset, offset + S * S))].sort((a, b) => a - b);
  const colour = reason => {
    const [open] = data.mask.reasons[reason % CLOSED];
    return `color-mix(in srgb, var(--${open ? "accent" : "ink"}) ${100 * SHADES[reason % CLOSED]}%, var(--panel))`;
  };
  const items = used.map(reason => make("li", {}, [make("i", { style: `background: ${colour(reason)}` }), reasonOf(reason)]));
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
  [...$("mask-layers").children].forEach((button, kind, all) => button.setAttribute("aria-pressed", all.length < 2 || kind === offset / (S * S)));
  showCell(...state.cell);
}

function showCell(t, s) {
  state.cell = [t, s];
  const cell = mask.values[maskOffset(state.layer) + t * S + s], [across, down] = document.querySelectorAll(".matrix i");
  Object.assign(across.style, { top: `${100 * t / S}%`, height: `${100 / S}%` });
  Object.assign(down.style, { left: `${100 * s / S}%`, width: `${100 / S}%` });
  $("cell").textContent = `Row ${tokenName(t)}, column ${tokenName(s)}: ${cell < CLOSED ? "open" : "closed"}, ${reasonOf(cell)}.`;
}

// ---- what if ---------------------------------------------------------------------------------------------

function effect(change) { // how much of the answer a change takes: [0 to 1, in short, in words]
  const where = `${change.tower === "vision" ? "vision layer" : "layer"} ${change.layer}`;
  const name = change.head === null ? `Without ${where}` : `Without head ${change.head} of ${where}`;
  if (inWords) return [change.same ? 0 : 1, change.same ? "·" : "≠", `${name}: ${change.same ? "the same answer" : `“${change.text}”`}.`];
  const kept = boxes.map((box, k) => k).filter(k => isKept(boxes[k]));
  const gone = kept.filter(k => (change.left[k] ?? 0) < state.threshold);
  const lost = gone.map(k => `${boxes[k].label} ${change.left[k] === null ? "is gone" : `falls from ${boxes[k].score.toFixed(2)} to ${change.left[k].toFixed(2)}`}`);
  const fresh = change.new.filter(([, score]) => score >= state.threshold).map(([label, score]) => `${label} ${score.toFixed(2)}`);
  const words = `${name}: ${gone.length ? list(lost) : "no box vanishes"}${fresh.length ? `; new: ${list(fresh)}` : ""}.`;
  return [gone.length / Math.max(1, kept.length), gone.length ? `−${gone.length}` : "·", words];
}

function showChanges() {
  const table = $("changes"), columns = [null, ...Array(model.heads).keys()];
  table.replaceChildren(make("thead", {}, make("tr", {}, [make("th"), ...columns.map(head => make("th", { scope: "col" }, head === null ? "whole layer" : `head ${head}`))])));
  const show = change => {
    table.querySelectorAll(".at").forEach(node => node.classList.remove("at"));
    change.node.classList.add("at");
    $("change").textContent = effect(change)[2];
    state.change = change;
  };
  const body = make("tbody");
  for (const first of data.what_if.filter(change => change.head === null)) {
    const same = data.what_if.filter(change => change.tower === first.tower && change.layer === first.layer);
    body.append(make("tr", {}, [make("th", { scope: "row" }, `${first.tower === "vision" ? "vision" : "decoder"} ${first.layer}`),
      ...same.map(change => {
        const [share, text, words] = effect(change);
        change.node = make("button", { type: "button", "aria-label": words, onclick: () => show(change), onfocus: () => show(change), onpointerenter: () => show(change),
          style: `background: color-mix(in srgb, var(--accent) ${Math.round(60 * share)}%, var(--panel))` }, text);
        return make("td", {}, change.node);
      })]));
  }
  table.append(body);
  if (state.change) show(state.change);
  else $("change").textContent = "Point at a cell to see what happens.";
}

function buildChanges() {
  $("what-if").hidden = !data.what_if.length;
  $("what-if-text").textContent = "The same question again, each time with one layer skipped, or with one head of the decoder reading nothing. " + (inWords
    ? "≠ marks where the answer is another one."
    : "A cell counts the boxes that are no longer kept, at the threshold above: the same class with at least half of their area in common (IoU 0.5).");
  if (inWords) showChanges();
}

// ---- all together ----------------------------------------------------------------------------------------

async function start() {
  document.title = `Look inside: ${picture.name}`;
  $("title").textContent = picture.name;
  maps = await unpackProbabilities(data.maps);
  lens = await unpackProbabilities(data.lens.values);
  mask = await unpack(data.mask.cells);
  mask.values = mask.values.map(reason => reason + (data.mask.reasons[reason][0] ? 0 : CLOSED));
  buildTokens();
  buildPicture();
  buildMask();
  state.chip = chips.findIndex(chip => chip.slot === "class" || chip.word);
  if (state.chip < 0) state.chip = 0;
  buildControls();
  buildLens();
  buildChanges();
  if (inWords) {
    $("words").hidden = false;
    $("answer").textContent = answerText();
  } else {
    coordinates = await unpackProbabilities(data.coordinates);
    classes = await unpackProbabilities(data.classes);
    for (const id of ["distributions", "scores"]) $(id).hidden = false;
    buildBoxes();
    if (form === "parallel") { $("branches").hidden = false; buildTree(); }
    buildScores();
    showBox(chips[state.chip].box ?? 0);
  }
  select(state.chip);
  document.body.dataset.ready = "yes";
}
start();
