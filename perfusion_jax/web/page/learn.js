// The tab that learns: pictures, their masks, and the queue.
import { command, find, listen, make, number, post, refresh, say, send, state } from "./common.js";

const SIDE = 384;
const message = find("#learn-message");
let files = [], draft = "", previews = [], masks = {}; // masks: of the pictures, by number, that were painted

function showFiles() {
  find("#dropped").replaceChildren(...files.map((file, place) => {
    const remove = make("button", { type: "button", title: `Leave out ${file.name}`, "aria-label": `Leave out ${file.name}`, onclick: () => change(files.filter((_, each) => each !== place)) }, "×");
    const picture = make("img", { src: URL.createObjectURL(file), alt: file.name, title: file.name });
    picture.addEventListener("load", () => URL.revokeObjectURL(picture.src));
    return make("li", {}, picture, remove);
  }));
}
function change(now) {
  files = now;
  showFiles();
  forget();
  (find("#dropped button") ?? find("#files")).focus();
}
/** What was seen of the pictures is not true any more. */
function forget(dropAgain = true) {
  if (dropAgain) draft = "";
  previews = [];
  masks = {};
  find("#previews-box").hidden = true;
}
find("#files").addEventListener("change", (event) => { change([...files, ...event.target.files]); event.target.value = ""; });
const drop = find("#drop");
for (const name of ["dragover", "dragleave", "drop"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.toggle("over", name === "dragover"); });
}
drop.addEventListener("drop", (event) => change([...files, ...event.dataTransfer.files]));

/** Sends what is asked for of a draft; the pictures once more where the studio has them no longer. */
async function ask(path, more) {
  for (let again = false; ; again = true) {
    const sent = files;
    if (!draft) {
      const now = (await send("/api/drop", sent)).draft;
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
for (const id of ["thing-name", "thing-kind", "thing-seed", "thing-masks", "thing-keys", "thing-crop"]) {
  find(`#${id}`).addEventListener("change", () => { if (id === "thing-crop" || !Object.keys(masks).length) forget(false); });
}
window.addEventListener("beforeunload", (event) => { if (files.length) event.preventDefault(); });

find("#look-button").addEventListener("click", (event) => busy(event.target, "Looking…", async () => {
  const sent = await ask("/api/look", {});
  previews = sent.previews;
  masks = {};
  say(message, sent.warning, "warning");
  await showPreviews();
}));
find("#learn-form").addEventListener("submit", (event) => {
  event.preventDefault();
  busy(find("#start-button"), "Starting…", async () => {
    // Where one was painted, all are learnt by as they are seen.
    const painted = Object.keys(masks).length ? Object.fromEntries(previews.map((preview, place) => [place, masks[place] ?? preview.mask])) : {};
    const { warning } = await ask("/api/learn", { painted });
    say(message, `${find("#thing-name").value.trim()} is in the queue.${warning ? ` But ${warning}.` : ""}`, warning ? "warning" : "");
    find("#thing-name").value = "";
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
async function showPreviews() {
  const shown = await Promise.all(previews.map(async (preview, place) => {
    const canvas = canvasOf();
    shade(canvas, await load(preview.picture), await alphaOf(masks[place] ?? preview.mask));
    const label = `${preview.name}${masks[place] ? ", mended" : ""}`;
    return make("figure", {},
      make("button", { type: "button", "aria-label": `Mend the mask of ${preview.name}`, onclick: () => mend(place) }, make("img", { src: canvas.toDataURL(), alt: "" })),
      make("figcaption", {}, label));
  }));
  find("#previews").replaceChildren(...shown);
  find("#previews-box").hidden = false;
}
async function mend(place) {
  const dialog = find("#mask-dialog"), canvas = find("#mask-canvas"), preview = previews[place];
  const picture = await load(preview.picture), alpha = await alphaOf(masks[place] ?? preview.mask), context = alpha.getContext("2d");
  let at = null, last = null;
  const show = () => {
    shade(canvas, picture, alpha);
    if (!at) return;
    const over = canvas.getContext("2d");
    over.strokeStyle = "#fff";
    over.beginPath();
    over.arc(...at, find("#brush-size").value / 2, 0, 7);
    over.stroke();
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
    masks[place] = greyOf(alpha);
    dialog.close();
    await showPreviews();
    find(`#previews figure:nth-child(${place + 1}) button`).focus();
  };
  find("#mask-cancel").onclick = () => dialog.close();
  find("#mask-title").textContent = `Paint what belongs to the thing: ${preview.name}`;
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
function jobOf(job) {
  const parts = [make("div", {}, make("strong", {}, job.run), make("span", {}, job.things.join(", ")), make("em", {}, job.state))];
  const { progress } = job;
  if (progress) {
    const rate = progress.rate ? `, ${progress.rate.toPrecision(3)} steps a second, ${duration((progress.total - progress.position) / progress.rate)} left` : "";
    parts.push(make("progress", { max: progress.total, value: progress.position, "aria-label": `Steps of ${job.run}` }));
    parts.push(make("p", {}, `Step ${progress.position} of ${progress.total}${rate}${progress.words ? `: ${progress.words}` : ""}`));
  }
  for (const warning of job.warnings) parts.push(make("p", { class: "note warning" }, warning));
  if (job.error) parts.push(make("p", { class: "note error" }, job.error));
  parts.push(make("div", { class: "row" }, ...ACTS[job.state].map(([act, label]) => button(act, job.run, label))));
  return make("li", { class: "job", data: { run: job.run, state: job.state } }, ...parts, command(job.command, "The command that learns it"));
}
/** Puts rows in place of others; those that stay are not touched, so that nobody loses their place in them. */
function replace(list, rows) {
  for (const row of [...list.children]) if (!rows.includes(row)) row.remove();
  rows.forEach((row, place) => { if (list.children[place] !== row) list.insertBefore(row, list.children[place] ?? null); });
}
const shownJobs = new Map();
function showQueue() {
  const focused = document.activeElement?.dataset?.act ? { ...document.activeElement.dataset } : null;
  const rows = state.jobs.map((job) => {
    const text = JSON.stringify(job), before = shownJobs.get(job.run);
    if (before?.text === text) return before.row;
    const row = jobOf(job);
    if (before?.row.querySelector("details")?.open) row.querySelector("details").open = true;
    shownJobs.set(job.run, { text, row });
    return row;
  });
  const begun = state.interrupted.map((run) => make("li", { class: "job" }, make("strong", {}, run), " was begun and has not come to its end ", button("adopt", run, "Go on")));
  find("#queue .empty").hidden = rows.length + begun.length > 0;
  replace(find("#queue ol"), rows);
  replace(find("#queue ul"), begun);
  if (focused) document.querySelector(`[data-act="${focused.act}"][data-run="${CSS.escape(focused.run)}"]`)?.focus();
}
let grid = "";
listen(() => {
  showQueue();
  if (grid === state.grid) return;
  grid = state.grid;
  const picture = make("img", { class: "grid-picture", src: `/grid?at=${grid}`, alt: "What it draws by now; the thing's own pictures are on the left" });
  find("#run-grid").replaceChildren(...(grid ? [picture] : []));
});
