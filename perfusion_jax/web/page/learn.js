// The tab that learns: pictures, their masks, and the queue.
import { MOST_BYTES, MOST_FILES, ask as askPerson, askToDelete, command, find, listen, make, number, post, refresh, say, send, state } from "./common.js";
import { drawIt } from "./draw.js";

const SIDE = 384;
const message = find("#learn-message");
const view = crypto.randomUUID?.() ?? String(Math.random());
let files = [], draft = "";
const found = new Map(), masks = new Map(); // of each file: as training sees it, and the mask that was painted

function showFiles() {
  find("#dropped").replaceChildren(...files.map((file) => {
    const remove = make("button", { type: "button", title: `Leave out ${file.name}`, "aria-label": `Leave out ${file.name}`, onclick: () => leaveOut(file) }, "×");
    const seen = found.get(file)?.picture;
    const picture = make("img", { src: seen ?? URL.createObjectURL(file), alt: file.name, title: file.name });
    picture.addEventListener("load", () => URL.revokeObjectURL(picture.src));
    // Of a kind that browsers do not show, as HEIC: the studio does, when the pictures are looked at.
    picture.addEventListener("error", () => picture.replaceWith(make("span", { class: "blank" }, file.name)));
    return make("li", {}, picture, remove);
  }));
}
function change(now) {
  files = now;
  draft = "";
  for (const file of [...masks.keys()]) if (!now.includes(file)) masks.delete(file);
  for (const file of [...found.keys()]) if (!now.includes(file)) found.delete(file);
  if (!masks.size) found.clear(); // the masks that are found may be others now; painted ones stay
  showFiles();
  showPreviews();
}
async function leaveOut(file) {
  if (masks.has(file) && (await askPerson(`The mask that you painted of ${file.name} goes with it.`, "Leave it out")) === null) return;
  const place = files.indexOf(file);
  change(files.filter((each) => each !== file));
  (find(`#dropped li:nth-child(${Math.min(place + 1, files.length)}) button`) ?? find("#files")).focus();
}
function add(given, folders = []) {
  const isPicture = (file) => file.type.startsWith("image/") || /\.(heic|heif|avif)$/i.test(file.name);
  const wrong = [...folders.map((name) => `${name} is a folder`), ...given.filter((file) => !isPicture(file)).map((file) => `${file.name} is not a picture`)];
  const now = [...files, ...given.filter(isPicture)], bytes = now.reduce((sum, file) => sum + file.size, 0);
  if (now.length > MOST_FILES) return say(message, `${now.length} pictures: 3 to 10 are enough, and at most ${MOST_FILES} are taken.`, "error");
  if (bytes > MOST_BYTES) return say(message, `${Math.round(bytes / 2 ** 20)} MiB: at most ${MOST_BYTES / 2 ** 20} MiB are taken together.`, "error");
  say(message, wrong.length ? `${wrong.join(", ")}: left out. Drop the pictures themselves.` : "", "error");
  if (now.length > files.length) change(now);
}
find("#files").addEventListener("change", (event) => {
  add([...event.target.files]);
  event.target.value = "";
});
const drop = find("#drop");
for (const name of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.toggle("over", name === "dragover"); });
}
drop.addEventListener("drop", (event) => {
  const folders = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter((entry) => entry?.isDirectory).map((entry) => entry.name);
  add([...event.dataTransfer.files].filter((file) => !folders.includes(file.name)), folders);
});

/** Sends what is asked for of a draft; the pictures once more where the studio has them no longer. */
async function ask(path, more) {
  for (let again = false; ; again = true) {
    const sent = files;
    if (!draft) {
      const now = (await send(`/api/drop?view=${view}`, sent)).draft;
      if (files !== sent) throw new Error("The pictures have changed meanwhile: once more, please.");
      draft = now;
    }
    try { return await post(path, { ...form(), ...more }); } catch (error) {
      if (again || !error.message.includes("drop them again")) throw error;
      draft = "";
    }
  }
}
function form() {
  return {
    draft,
    name: find("#thing-name").value,
    kind: find("#thing-kind").value,
    steps: number("#thing-steps"),
    seed: number("#thing-seed"),
    crop: find("#thing-crop").checked,
    flip: find("#thing-flip").checked,
    licence: find("#thing-licence").value,
    keys: find("#thing-keys").value,
    masks: find("#thing-masks").value,
  };
}
async function busy(button, words, doing) {
  const before = button.textContent;
  if (button.getAttribute("aria-disabled") === "true") return;
  button.setAttribute("aria-disabled", "true"); // and not disabled, which would lose the focus
  button.textContent = words;
  try { await doing(); } catch (error) { say(message, error.message, "error"); }
  button.textContent = before;
  button.removeAttribute("aria-disabled");
}
find("#thing-kind").addEventListener("change", async (event) => {
  try { say(message, event.target.value.trim() ? (await post("/api/kind", { kind: event.target.value })).warning : "", "warning"); }
  catch (error) { say(message, error.message, "error"); }
});
// Masks that were found would be others now; painted ones stay, unless the pictures are cut in another way.
for (const id of ["thing-name", "thing-kind", "thing-seed", "thing-masks", "thing-keys"]) {
  find(`#${id}`).addEventListener("change", () => { if (!masks.size) { found.clear(); showPreviews(); } });
}
find("#thing-crop").addEventListener("change", async (event) => {
  if (masks.size && (await askPerson("The masks that you painted are of pictures that are cut in the other way: they go.", "Cut them anew")) === null) {
    event.target.checked = !event.target.checked;
    return;
  }
  masks.clear();
  found.clear();
  showPreviews();
});
window.addEventListener("beforeunload", (event) => { if (files.length) event.preventDefault(); });

async function look() {
  const sent = files, { previews, warning } = await ask("/api/look", {});
  if (files !== sent) throw new Error("The pictures have changed meanwhile: once more, please.");
  sent.forEach((file, place) => found.set(file, previews[place]));
  showFiles();
  await showPreviews();
  return warning;
}
find("#look-button").addEventListener("click", (event) => busy(event.target, "Looking…", async () => {
  say(message, state.loading ? "As soon as the model is loaded." : "");
  say(message, await look(), "warning");
}));
find("#learn-form").addEventListener("submit", (event) => {
  event.preventDefault();
  busy(find("#start-button"), "Starting…", async () => {
    say(message, state.loading ? "As soon as the model is loaded." : "");
    // Where one was painted, all are learnt by as they are seen.
    if (masks.size && files.some((file) => !found.has(file))) await look();
    const painted = masks.size ? Object.fromEntries(files.map((file, place) => [place, masks.get(file) ?? found.get(file).mask])) : {};
    const name = find("#thing-name").value.trim(), { warning } = await ask("/api/learn", { painted });
    say(message, `${name} is in the queue.${warning ? ` But ${warning}.` : ""}`, warning ? "warning" : "");
    find("#thing-name").value = "";
    masks.clear();
    change([]);
    await refresh();
    find("#tab-learn").focus();
  });
});

// Masks.
const load = (address) => new Promise((resolve) => { const image = new Image(); image.onload = () => resolve(image); image.src = address; });
const canvasOf = () => Object.assign(document.createElement("canvas"), { width: SIDE, height: SIDE });
/** A mask, white where the thing is, as the alpha of a canvas. */
async function alphaOf(address) {
  const canvas = canvasOf(), context = canvas.getContext("2d");
  context.drawImage(await load(address), 0, 0, SIDE, SIDE);
  const pixels = context.getImageData(0, 0, SIDE, SIDE);
  for (let place = 0; place < pixels.data.length; place += 4) {
    pixels.data[place + 3] = pixels.data[place];
    pixels.data[place] = pixels.data[place + 1] = pixels.data[place + 2] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}
/** The same back as a PNG, grey on black. */
function greyOf(alpha) {
  const canvas = canvasOf(), context = canvas.getContext("2d");
  context.fillRect(0, 0, SIDE, SIDE);
  context.drawImage(alpha, 0, 0);
  return canvas.toDataURL("image/png");
}
/** Draws a picture, dark where its mask is not. */
function shade(canvas, picture, alpha) {
  const context = canvas.getContext("2d"), lit = canvasOf(), part = lit.getContext("2d");
  part.drawImage(alpha, 0, 0);
  part.globalCompositeOperation = "source-in";
  part.drawImage(picture, 0, 0, SIDE, SIDE);
  context.globalAlpha = 1;
  context.fillStyle = "#000";
  context.fillRect(0, 0, SIDE, SIDE);
  context.globalAlpha = 0.15;
  context.drawImage(picture, 0, 0, SIDE, SIDE);
  context.globalAlpha = 1;
  context.drawImage(lit, 0, 0);
}
let drawn = 0; // of the calls of `showPreviews`, the latest
async function showPreviews() {
  const own = ++drawn, seen = files.filter((file) => found.has(file));
  const shown = await Promise.all(seen.map(async (file) => {
    const canvas = canvasOf(), { picture, mask } = found.get(file);
    shade(canvas, await load(picture), await alphaOf(masks.get(file) ?? mask));
    const label = `${file.name}${masks.has(file) ? ", mended" : ""}`;
    return make("figure", {},
      make("button", { type: "button", "aria-label": `Mend the mask of ${file.name}`, onclick: () => mend(file) }, make("img", { src: canvas.toDataURL(), alt: "" })),
      make("figcaption", {}, label));
  }));
  if (own !== drawn) return;
  find("#previews").replaceChildren(...shown);
  find("#previews-box").hidden = !shown.length;
}
async function mend(file) {
  const dialog = find("#mask-dialog"), canvas = find("#mask-canvas"), preview = found.get(file);
  const picture = await load(preview.picture), alpha = await alphaOf(masks.get(file) ?? preview.mask), context = alpha.getContext("2d");
  let at = null, last = null;
  const show = () => {
    shade(canvas, picture, alpha);
    if (!at) return;
    const over = canvas.getContext("2d");
    for (const [colour, width] of [["#000", 4], ["#fff", 1.5]]) { // seen on black and on white
      over.strokeStyle = colour;
      over.lineWidth = width;
      over.beginPath();
      over.arc(...at, find("#brush-size").value / 2, 0, 7);
      over.stroke();
    }
  };
  const paint = () => {
    context.globalCompositeOperation = find("#erase").checked ? "destination-out" : "source-over";
    context.strokeStyle = "#fff";
    context.lineWidth = find("#brush-size").value;
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(...(last ?? at));
    context.lineTo(at[0] + 0.01, at[1]);
    context.stroke();
    last = at;
  };
  canvas.onpointermove = canvas.onpointerdown = (event) => {
    const box = canvas.getBoundingClientRect();
    at = [((event.clientX - box.left) * SIDE) / box.width, ((event.clientY - box.top) * SIDE) / box.height];
    if (event.type === "pointerdown") canvas.setPointerCapture(event.pointerId);
    if (event.buttons & 1) paint();
    show();
  };
  canvas.onpointerup = canvas.onpointerleave = () => { last = null; };
  canvas.onkeydown = (event) => {
    const steps = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8], " ": [0, 0] }[event.key];
    if (!steps) return;
    event.preventDefault();
    at = (at ?? [SIDE / 2, SIDE / 2]).map((value, axis) => Math.min(SIDE, Math.max(0, value + steps[axis])));
    last = null;
    if (event.key === " ") paint();
    show();
  };
  find("#mask-keep").onclick = async () => {
    masks.set(file, greyOf(alpha));
    dialog.close();
    await showPreviews();
    find(`#previews [aria-label="${CSS.escape(`Mend the mask of ${file.name}`)}"]`)?.focus();
  };
  find("#mask-cancel").onclick = () => dialog.close();
  find("#mask-title").textContent = `Paint what belongs to the thing: ${file.name}`;
  show();
  dialog.showModal();
}

// The queue.
function duration(seconds) {
  const whole = Math.round(seconds), minutes = Math.floor(whole / 60);
  if (minutes >= 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}
const ACTS = {
  learning: [["stop", "Stop"]],
  waiting: [["stop", "Stop"], ["forget", "Take out"]],
  stopped: [["go_on", "Go on"], ["forget", "Take out"]],
  failed: [["go_on", "Try again"], ["forget", "Take out"]],
  done: [["forget", "Take out"]],
};
function button(act, run, label) {
  return make("button", { type: "button", data: { act, run }, "aria-label": `${label}: ${run}`, onclick: async () => {
    try { await post("/api/act", { act, run }); say(message, ""); } catch (error) { say(message, error.message, "error"); }
    refresh();
  } }, label);
}
const plain = (value) => (value >= 100 ? Math.round(value) : Number(value.toPrecision(3))).toLocaleString("en");
function wordsOf({ progress, stopping }) {
  if (stopping) return "Stopping: what it has learnt is being saved.";
  if (!progress) return "Loading the model.";
  const { position, total, rate, words } = progress;
  const speed = rate ? `, ${plain(rate)} steps a second, ${duration((total - position) / rate)} left` : "";
  return `Step ${position.toLocaleString("en")} of ${total.toLocaleString("en")}${speed}${words ? `: ${words}` : ""}`;
}
/** A row, and what brings its numbers up to date where the rest of it stays. */
function jobOf(job) {
  const parts = [make("div", {}, make("strong", {}, job.run), make("span", {}, job.things.join(", ")), make("em", {}, job.state))];
  const bar = make("progress", { "aria-label": `Steps of ${job.run}` }), words = document.createTextNode("");
  if (job.state === "learning") parts.push(bar, make("p", {}, words));
  for (const warning of job.warnings) parts.push(make("p", { class: "note warning" }, warning));
  if (job.error) parts.push(make("p", { class: "note error" }, job.error));
  const learnt = state.entries.filter((entry) => job.learnt.includes(entry.key) && entry.drawable);
  const draws = learnt.map((entry) => make("button", { type: "button", class: "primary", onclick: () => drawIt(entry) }, learnt.length > 1 ? `Draw ${entry.call}` : "Draw it"));
  parts.push(make("div", { class: "row" }, ...draws, ...ACTS[job.state].map(([act, label]) => button(act, job.run, label))));
  const grid = make("img", { class: "grid-picture", alt: `What ${job.run} draws by now; its own pictures are on the left` });
  if (job.command.length) parts.push(command(job.command, "The command that learns it"));
  const row = make("li", { class: "job", data: { run: job.run, state: job.state } }, ...parts, grid);
  const update = (now) => {
    const told = wordsOf(now), address = `/grid?run=${encodeURIComponent(now.run)}&at=${now.grid}`;
    if (words.data !== told) words.data = told;
    if (now.progress) Object.assign(bar, { max: now.progress.total, value: now.progress.position });
    grid.hidden = !now.grid;
    if (now.grid && grid.getAttribute("src") !== address) grid.src = address;
  };
  return { row, update };
}
/** Puts rows in place of others; those that stay are not touched, so that nobody loses their place in them. */
function replace(list, rows) {
  for (const row of [...list.children]) if (!rows.includes(row)) row.remove();
  rows.forEach((row, place) => { if (list.children[place] !== row) list.insertBefore(row, list.children[place] ?? null); });
}
const shownJobs = new Map(), shownRuns = new Map();
function showQueue() {
  const focused = document.activeElement?.dataset?.act ? { ...document.activeElement.dataset } : null;
  const rows = state.jobs.map((job) => {
    const drawable = state.entries.filter((entry) => job.learnt.includes(entry.key) && entry.drawable).map((entry) => entry.call);
    const text = JSON.stringify({ ...job, progress: null, stopping: false, grid: "", drawable });
    let shown = shownJobs.get(job.run);
    if (shown?.text !== text) {
      const open = shown?.row.querySelector("details")?.open;
      shown = { text, ...jobOf(job) };
      if (open && shown.row.querySelector("details")) shown.row.querySelector("details").open = true;
      shownJobs.set(job.run, shown);
    }
    shown.update(job);
    return shown.row;
  });
  const begun = state.interrupted.map((run) => {
    if (!shownRuns.has(run)) {
      shownRuns.set(run, make("li", { class: "job", data: { run } }, make("div", {}, make("strong", {}, run), make("span", {}, "was begun and has not come to its end")),
        make("div", { class: "row" }, button("adopt", run, "Go on"), make("button", { type: "button", class: "danger", "aria-label": `Delete: ${run}`, onclick: () => discard(run) }, "Delete…"))));
    }
    return shownRuns.get(run);
  });
  find("#queue .empty").hidden = rows.length + begun.length > 0;
  replace(find("#queue ol"), rows);
  replace(find("#queue ul"), begun);
  if (focused && !document.activeElement?.dataset?.act) document.querySelector(`[data-act="${focused.act}"][data-run="${CSS.escape(focused.run)}"]`)?.focus();
}
async function discard(run) {
  try {
    const photographs = await askToDelete(run, { run });
    if (photographs !== null) await post("/api/act", { act: "discard", run, photographs });
  } catch (error) {
    say(message, error.message, "error");
  }
  await refresh();
}
listen(showQueue);
