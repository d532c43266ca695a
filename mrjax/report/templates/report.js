"use strict";
// The viewer and the sortable table. Images are PNGs of codes (see mrjax/report/selection.py), which are shown through
// a window: `width` and `level` are in units of the value that is white by default.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const names = Object.keys(data.labels);
const defaults = { width: 1, level: 0.5 };
const state = { volume: 0, position: 0, image: "reconstruction", gray: { ...defaults }, inferno: { ...defaults } };
const mapOf = (image) => (image === "error" ? "inferno" : "gray");
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// The codes of an image, decoded once.
const decoded = new WeakMap();
function decode(slice, image) {
  if (!decoded.has(slice)) decoded.set(slice, {});
  const images = decoded.get(slice);
  images[image] ??= (async () => {
    const png = new Image();
    png.src = `data:image/png;base64,${slice.images[image]}`;
    await png.decode();
    const canvas = new OffscreenCanvas(png.width, png.height);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(png, 0, 0);
    return context.getImageData(0, 0, png.width, png.height);
  })();
  return images[image];
}

// The colour of each code in a window.
function lookUp(map, { width, level }) {
  const colours = new Uint8ClampedArray(4 * 256);
  for (let code = 0; code < 256; code++) {
    const value = data.headroom * (code / 254) ** 2;
    const shade = Math.round(255 * clamp((value - level) / width + 0.5, 0, 1));
    colours.set(code === data.notFinite ? [255, 0, 255, 255] : [...data.colours[map][shade], 255], 4 * code);
  }
  return new Uint32Array(colours.buffer);
}

async function paint(canvas, slice, image, window, isCurrent = () => true) {
  const { data: codes, width, height } = await decode(slice, image);
  if (!isCurrent()) return;
  const colours = lookUp(mapOf(image), window);
  const shown = new ImageData(width, height);
  const pixels = new Uint32Array(shown.data.buffer);
  for (let i = 0; i < pixels.length; i++) pixels[i] = colours[codes[4 * i]];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  if (canvas.id === "image") fit();
  canvas.getContext("2d").putImageData(shown, 0, 0);
}

const current = () => {
  const volume = data.volumes[state.volume];
  return { volume, slice: volume.slices[state.position], window: state[mapOf(state.image)] };
};
const percent = (value) => `${+(value).toPrecision(3)} %`;

// Show the state: the large image, the small ones, and what is said of them.
let frame = 0;
function show() {
  const { volume, slice, window } = current();
  const mine = ++frame;
  const unit = state.image === "error" ? 100 / volume.gain : 100; // % of white
  const low = unit * (window.level - window.width / 2), high = unit * (window.level + window.width / 2);
  paint(find("image"), slice, state.image, window, () => mine === frame);
  for (const button of find("images").children) {
    const image = button.dataset.image;
    button.hidden = !(image in slice.images);
    button.setAttribute("aria-pressed", image === state.image);
    if (!button.hidden) paint(button.firstChild, slice, image, state[mapOf(image)], () => mine === frame);
  }
  const where = `slice ${slice.number + 1} of ${volume.total}`;
  find("image").setAttribute("aria-label", `${volume.name}, ${where}, ${data.labels[state.image]}`);
  find("shown-volume").textContent = `${volume.name}\n${volume.contrast}`;
  find("shown-image").textContent = data.labels[state.image];
  find("shown-slice").textContent = where;
  find("shown-window").textContent = `W ${percent(unit * window.width)}\nL ${percent(unit * window.level)}`;
  find("volume").value = state.volume;
  Object.assign(find("slice"), { max: volume.slices.length - 1, value: state.position });
  find("slice").setAttribute("aria-valuetext", where);
  find("slice-text").textContent = `${slice.number + 1} of ${volume.total}`;
  for (const [id, value] of [["window", window.width], ["level", window.level]]) {
    find(id).value = 100 * value;
    find(id).setAttribute("aria-valuetext", `${percent(unit * value)} of white`);
    find(`${id}-text`).textContent = `${percent(unit * value)} of white`;
  }
  find("bar-low").textContent = percent(low);
  find("bar-high").textContent = `${percent(high)} of white`;
  drawBar();
  find("scores").hidden = !Object.keys(slice.scores).length;
  find("scores").tBodies[0].replaceChildren(...Object.entries(slice.scores).map(([image, scores]) => {
    const row = document.createElement("tr");
    row.append(cell("th", data.labels[image], image), ...scores.map((score) => cell("td", score, "number")));
    return row;
  }));
  const note = volume.note ? `Volume: ${volume.note}. ` : "";
  const white = `White is ${volume.white} in the file's units, the 99.5th percentile of the ` +
    `${volume.gain ? "ground truth" : "reconstruction"}.`;
  const error = volume.gain ? ` The error's scale is ×${volume.gain}: 0 to ${100 / volume.gain} % of white.` : "";
  find("scale").textContent = `${note}${white}${error} Magenta: not a finite number.`;
}

function cell(tag, text, className) {
  return Object.assign(document.createElement(tag), { textContent: text, className });
}

function drawBar() {
  const context = find("bar").getContext("2d");
  const pixels = context.createImageData(256, 1);
  data.colours[mapOf(state.image)].forEach((colour, i) => pixels.data.set([...colour, 255], 4 * i));
  context.putImageData(pixels, 0, 0);
}

// A pixel of the image is a square of whole pixels of the screen.
function fit() {
  const { width, height } = find("image");
  const ratio = devicePixelRatio || 1;
  const room = Math.min(find("image").parentNode.clientWidth, 720) * ratio;
  const zoom = Math.max(1, Math.floor(Math.min(room / width, (720 * ratio) / height))) / ratio;
  const scale = Math.min(zoom, room / ratio / width); // an image larger than the screen is shown whole
  Object.assign(find("image").style, { width: `${scale * width}px`, height: `${scale * height}px` });
}

function select(volume, position = Math.floor(data.volumes[volume].slices.length / 2)) {
  Object.assign(state, { volume, position });
  const { slice } = current();
  if (!(state.image in slice.images)) state.image = "reconstruction";
  show();
}
function scroll(steps) {
  state.position = clamp(state.position + steps, 0, current().volume.slices.length - 1);
  show();
}
function switchTo(image) {
  if (image in current().slice.images) state.image = image;
  show();
}
function setWindow(width, level) {
  Object.assign(current().window, { width: clamp(width, 0.02, 2), level: clamp(level, 0, 2) });
  show();
}
const reset = () => setWindow(defaults.width, defaults.level);

function startViewer() {
  for (const image of names.filter((name) => data.volumes.some((v) => v.slices.some((s) => name in s.images)))) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", onclick: () => switchTo(image) });
    button.dataset.image = image;
    button.append(document.createElement("canvas"), data.labels[image]);
    find("images").append(button);
  }
  find("volume").onchange = (event) => select(+event.target.value);
  find("slice").oninput = (event) => scroll(event.target.value - state.position);
  find("window").oninput = (event) => setWindow(event.target.value / 100, current().window.level);
  find("level").oninput = (event) => setWindow(current().window.width, event.target.value / 100);
  find("reset").onclick = reset;
  const stage = find("image").parentNode;
  stage.onkeydown = (event) => {
    const images = names.filter((name) => name in current().slice.images);
    const turn = (by) => switchTo(images[(images.indexOf(state.image) + by + images.length) % images.length]);
    const keys = {
      ArrowUp: () => scroll(-1), ArrowDown: () => scroll(1), PageUp: () => scroll(-5), PageDown: () => scroll(5),
      Home: () => scroll(-Infinity), End: () => scroll(Infinity), ArrowLeft: () => turn(-1), ArrowRight: () => turn(1),
      0: reset,
    };
    images.forEach((name, i) => (keys[i + 1] = () => switchTo(name)));
    if (!(event.key in keys) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  };
  let turned = 0;
  stage.addEventListener("wheel", (event) => {
    if (event.ctrlKey) return; // the browser's zoom
    event.preventDefault();
    turned += event.deltaMode ? 40 * event.deltaY : event.deltaY; // a touch pad sends many small turns
    const steps = Math.trunc(turned / 40);
    if (steps) scroll(Math.sign(steps) * Math.min(Math.abs(steps), 1));
    if (steps) turned = 0;
  }, { passive: false });
  startDragging(stage);
  addEventListener("resize", fit);
  for (const card of document.querySelectorAll(".card")) {
    const volume = +card.dataset.volume;
    const position = data.volumes[volume].slices.findIndex((slice) => slice.number === +card.dataset.number);
    for (const canvas of card.querySelectorAll("canvas")) {
      paint(canvas, data.volumes[volume].slices[position], canvas.dataset.image, defaults);
    }
    card.onclick = () => open(volume, position);
  }
  for (const link of document.querySelectorAll(".link")) link.onclick = () => open(+link.dataset.volume);
  function open(volume, position) {
    select(volume, position);
    find("viewer").scrollIntoView();
    stage.focus({ preventScroll: true });
  }
  select(0);
}

// A mouse or two fingers set window and level; one finger scrolls.
function startDragging(stage) {
  const pointers = new Map();
  let start = null;
  const begin = () => {
    const [first] = pointers.values();
    start = first && { ...first, ...current().window, position: state.position, fingers: pointers.size };
  };
  stage.onpointerdown = (event) => {
    if (event.button) return;
    stage.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    begin();
  };
  stage.onpointermove = (event) => {
    if (!pointers.has(event.pointerId)) return;
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    const [{ x, y }] = pointers.values();
    const right = x - start.x, down = y - start.y;
    if (event.pointerType === "touch" && start.fingers === 1) {
      const along = Math.abs(right) > Math.abs(down) ? -right : -down;
      scroll(start.position + Math.round(along / 16) - state.position);
    } else {
      setWindow(start.width * Math.exp(right / 200), start.level + down / 300);
    }
  };
  stage.onpointerup = stage.onpointercancel = (event) => {
    pointers.delete(event.pointerId);
    begin();
  };
}

// Headings sort the table: numbers by value, not-a-number last; again for the other order.
function sortBy(heading) {
  const headings = [...heading.parentNode.children];
  const column = headings.indexOf(heading);
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of headings) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => {
    const { dataset, textContent } = row.cells[column];
    return "value" in dataset ? Number(dataset.value.replace("inf", "Infinity")) : textContent.trim();
  };
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b || 0);
  const body = heading.closest("table").tBodies[0];
  const rows = [...body.rows].map((row) => [key(row), row]);
  const [known, unknown] = [rows.filter(([k]) => k === k), rows.filter(([k]) => k !== k)];
  known.sort(([a], [b]) => (down ? compare(b, a) : compare(a, b)));
  body.append(...[...known, ...unknown].map(([, row]) => row));
}

for (const button of document.querySelectorAll("#table thead button")) button.onclick = () => sortBy(button.closest("th"));
if (data.volumes.length) startViewer();
