// The frame and its first panel: where it looks. With panels.js, which comes before it, one script.
// Texts from outside (file and class names, answers) only ever become text nodes: no innerHTML anywhere.

const data = JSON.parse(document.getElementById("data").textContent);
const { picture, model, tokens, boxes, form } = data;
const inWords = form === "words", side = picture.side, P = side * side, T = tokens.length, S = P + T;
const longest = Math.max(picture.width, picture.height);
const W = 1000 * picture.width / longest, H = 1000 * picture.height / longest; // the picture in SVG units
const MEAN = -1, MAXIMUM = -2; // in place of the number of a layer or head
const state = {
  layer: MEAN, head: MEAN, chip: 0, box: 0, patch: null, threshold: data.threshold || 0, cell: [S - 1, 0],
};

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
  const place = { x: right ? x1 * W : size.x + 8, y: Math.max(36, size.y - 12), "text-anchor": right ? "end" : "start" };
  const caption = svg("text", { class: "caption", ...place },
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
  const name = chip.slot && `${chip.slot} ${chip.text}, ${boxes[chip.box].label}`;
  chip.node = make("button", { type: "button", class: "chip", tabindex: -1, "aria-label": name,
    onclick: choose, onfocus: choose, onpointerenter: () => showReading(i), onpointerleave: () => showReading(state.chip) }, [...slot, chip.text]);
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

const shadeOf = share => `background: color-mix(in srgb, var(--accent) ${Math.round(60 * share)}%, var(--panel))`;

function chipName(chip) {
  if (chip.slot) return chip.slot === "class" ? `the class of ${chip.text}` : `${chip.slot} of ${boxes[chip.box].label}`;
  return chip.word ? `“${chip.text}”` : `${chip.text} of the question`;
}

function showReading(i) { // one token: what it reads
  const chip = chips[i], row = chip.row, image = Array.from({ length: P }, (_, key) => reads(row, key));
  state.patch = null;
  shade(patches, image, (node, share) => {
    node.style.fillOpacity = (0.85 * share).toFixed(3);
    node.classList.remove("at");
  });
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
    node.style = shadeOf(share);
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
  const words = (choice, what) =>
    choice === MEAN ? "mean of all" : choice === MAXIMUM ? "maximum of all" : `${what} ${choice}`;
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

// ---- all together ----------------------------------------------------------------------------------------

async function start() {
  for (const node of document.querySelectorAll("[data-form]")) node.hidden = !node.dataset.form.split(" ").includes(form);
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
  $("what-if").hidden = !data.what_if.length;
  if (inWords) {
    $("answer").textContent = answerText();
    showChanges();
  } else {
    coordinates = await unpackProbabilities(data.coordinates);
    classes = await unpackProbabilities(data.classes);
    buildBoxes();
    if (form === "parallel") buildTree();
    buildScores();
    showBox(chips[state.chip].box ?? 0);
  }
  select(state.chip);
  document.body.dataset.ready = "yes";
}
start();
