// The tab that draws: the prompt with its completion, sliders of the concepts that it names, pictures as they come.
import { command, find, listen, make, number, pictures, post, refresh, say, send, settled, state, stream } from "./common.js";

const SLIDERS = {
  bias: [0, 1, 0.01, "Bias β: how alike a word must be for the concept to act"],
  temperature: [0.02, 1, 0.01, "Temperature τ: how gradually it does"],
  strength: [0, 2, 0.05, "Strength"],
  start: [0, 1, 0.05, "Acts from this share of the steps"],
  end: [0, 1, 0.05, "up to this"],
};
// Fields of the form that are sent as they are.
const FIELDS = ["negative_prompt", "guidance", "guidance_rescale", "sampler", "steps", "spacing", "width", "height", "lock", "init_strength"];
const NUMBERS = ["guidance", "guidance_rescale", "steps", "width", "height", "init_strength"];
const prompt = find("#prompt"), list = find("#completions"), message = find("#draw-message");
const values = new Map(); // of the sliders, by the concept's key; they are kept while a name is typed anew
const view = crypto.randomUUID?.() ?? String(Math.random()); // of what this page draws, the newest alone is drawn
let start = null, draft = "", running = null, moved = 0; // start: the picture that drawing starts from, and what the studio calls it

const drawable = () => state.entries.filter((entry) => entry.drawable);
const named = () => {
  const calls = [...prompt.value.matchAll(/<([A-Za-z0-9][A-Za-z0-9_-]*)>/g)].map((match) => match[1]);
  return [...new Set(calls)].map((call) => drawable().find((entry) => entry.call === call)).filter(Boolean);
};

function ownValues(entry) {
  const own = { bias: entry.bias, temperature: entry.temperature, strength: 1, start: 0, end: 1 };
  return entry.gated ? own : { strength: 1 };
}

function slider(entry, name) {
  const [least, most, step, label] = SLIDERS[name], own = values.get(entry.key);
  const id = `slider-${name}-${entry.call}`;
  const output = make("output", { for: id }, own[name].toFixed(2));
  const input = make("input", { type: "range", id, min: Math.min(least, own[name]), max: Math.max(most, own[name]), step, value: own[name] });
  input.addEventListener("input", () => { own[name] = Number(input.value); output.textContent = own[name].toFixed(2); });
  input.addEventListener("change", () => {
    clearTimeout(moved);
    if (find("#follow").checked) moved = setTimeout(draw, 200);
  });
  return make("label", { class: "field", for: id }, make("span", {}, label, output), input);
}

let shown = "";
function showSliders(anew = false) {
  const entries = named(), now = entries.map((entry) => `${entry.call} ${entry.key}`).join();
  if (now === shown && !anew) return;
  shown = now;
  find("#concepts").replaceChildren(...entries.map((entry) => {
    if (!values.has(entry.key)) values.set(entry.key, ownValues(entry));
    const back = make("button", { type: "button", onclick: () => { values.delete(entry.key); showSliders(true); find(`#slider-strength-${entry.call}`).focus(); } }, "Its own values");
    return make("fieldset", {}, make("legend", {}, `<${entry.call}>, a ${entry.kind}`), ...Object.keys(ownValues(entry)).map((name) => slider(entry, name)), back);
  }));
}

function form() {
  const sent = { view, prompt: prompt.value, count: number("#count"), seed: number("#seed") };
  for (const name of FIELDS) sent[name] = NUMBERS.includes(name) ? number(`#${name}`) : find(`#${name}`).value;
  sent.concepts = Object.fromEntries(named().map((entry) => [entry.call, values.get(entry.key) ?? {}]));
  return sent;
}
async function sentStart() {
  if (start && !draft) draft = (await send(`/api/drop?view=${view}-start`, [start])).draft;
  return draft;
}

async function draw(sweep = () => null) {
  running?.abort();
  const own = (running = new AbortController());
  find("#stop-button").disabled = false;
  say(message, state.loading ? "Drawing, as soon as the model is loaded." : "Drawing. The first time, the model is compiled.");
  let problem = "", warnings = [], begun = false;
  try {
    if (state.loading) await settled(own.signal); // until then it is not known which concepts and which sampler it takes
    for (let again = false; ; again = true) {
      const sent = { ...form(), init_image: await sentStart(), sweep: sweep() };
      if (own !== running) return; // another drawing has begun
      const add = pictures(find("#drawn"), sent.prompt, Boolean(sent.sweep));
      problem = "";
      await stream("/api/draw", sent, own.signal, (each) => {
        if (each.error) problem = each.error;
        else if (each.command) {
          const open = find("#draw-command details")?.open;
          find("#draw-command").replaceChildren(command(each.command, "The command that draws the same"));
          find("#draw-command details").open = Boolean(open);
          warnings = each.warnings;
        } else {
          begun = true;
          say(message, warnings.join("\n"), "warning");
          add(each);
        }
      });
      if (again || !problem.includes("give it again")) break;
      draft = ""; // the studio has let go of it: once more
    }
  } catch (error) {
    if (own.signal.aborted) problem = own === running ? "Stopped." : "";
    else problem = error.message;
  }
  if (own !== running) return;
  find("#stop-button").disabled = true;
  if (problem) say(message, problem, problem === "Stopped." ? "" : "error");
  if (problem && !begun) find("#draw-command").replaceChildren(); // it is not of the pictures that are still seen
  refresh();
}

/** Opens the tab with a prompt of a concept. */
export function drawIt(entry) {
  prompt.value = `a photo of a ${entry.phrase}`;
  showSliders();
  find("#tab-draw").click();
  prompt.focus();
}

find("#draw-form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
find("#stop-button").addEventListener("click", () => running?.abort());
find("#sweep-button").addEventListener("click", () => draw(() => (
  { control: find("#sweep-control").value, first: number("#sweep-first"), last: number("#sweep-last"), count: number("#sweep-count") }
)));
function startFrom(file) {
  start = file;
  draft = "";
  if (!file) find("#init").value = "";
  find("#init-remove").hidden = !file;
}
find("#init").addEventListener("change", (event) => startFrom(event.target.files[0] ?? null));
find("#init-remove").addEventListener("click", () => { startFrom(null); find("#init").focus(); });

// Recipes.
async function restore(asking) {
  try {
    const sent = await asking;
    prompt.value = sent.prompt;
    find("#count").value = sent.count;
    find("#seed").value = sent.seed;
    for (const name of FIELDS) find(`#${name}`).value = sent[name] ?? "";
    values.clear();
    for (const entry of named()) values.set(entry.key, { ...ownValues(entry), ...sent.concepts[entry.call] });
    startFrom(null);
    showSliders(true);
    say(message, `Its recipe is back: draw it again, or change it.${sent.note ? ` But ${sent.note}.` : ""}`, sent.note && "warning");
  } catch (error) {
    say(message, error.message, "error");
  }
  find("#tab-draw").scrollIntoView();
}
find("#open").addEventListener("change", (event) => {
  if (event.target.files.length) restore(send("/api/recipe", [...event.target.files]));
  event.target.value = "";
});
let before = "";
function showBefore() {
  const now = JSON.stringify(state.drawings);
  if (before === now) return;
  before = now;
  find("#before").replaceChildren(...state.drawings.map(({ name, at }) =>
    make("button", { type: "button", title: name, onclick: () => restore(post(`/api/recipe?drawing=${encodeURIComponent(name)}`, {})) },
      make("img", { src: `/drawings/${encodeURIComponent(name)}?at=${at}`, alt: name, loading: "lazy" }))));
}

// Completion of <names>.
let chosen = 0;
const begun = () => prompt.value.slice(0, prompt.selectionStart).match(/<([A-Za-z0-9_-]*)$/);
const close = () => { list.hidden = true; prompt.setAttribute("aria-expanded", "false"); prompt.removeAttribute("aria-activedescendant"); };
function choose(call) {
  close();
  if (!begun()) return; // the cursor has moved away
  const at = prompt.selectionStart, start = at - begun()[0].length;
  const rest = prompt.value.slice(at).match(/^[A-Za-z0-9_-]*>?/)[0].length; // of a name that is changed
  prompt.setRangeText(`<${call}>`, start, at + rest, "end");
  showSliders();
}
function mark() {
  [...list.children].forEach((item, place) => item.setAttribute("aria-selected", String(place === chosen)));
  list.children[chosen].scrollIntoView({ block: "nearest" });
  prompt.setAttribute("aria-activedescendant", list.children[chosen].id);
}
prompt.addEventListener("input", () => {
  showSliders();
  const match = begun();
  const found = match ? drawable().filter((entry) => entry.call.toLowerCase().startsWith(match[1].toLowerCase())) : [];
  if (!found.length) return close();
  list.replaceChildren(...found.map(({ call, kind }, place) =>
    make("li", { id: `completion-${place}`, role: "option", data: { call }, onmousedown: (event) => { event.preventDefault(); choose(call); } }, `<${call}>, a ${kind}`)));
  list.style.top = `${prompt.offsetTop + prompt.offsetHeight}px`;
  chosen = 0;
  list.hidden = false;
  prompt.setAttribute("aria-expanded", "true");
  mark();
});
prompt.addEventListener("blur", close);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    close();
    draw();
  }
  if (list.hidden) return;
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) {
    chosen = (chosen + step + list.children.length) % list.children.length;
    mark();
  } else if (event.key === "Enter" || event.key === "Tab") choose(list.children[chosen].dataset.call);
  else if (event.key === "Escape") close();
  else return;
  event.preventDefault();
});

let hasSampler = false;
listen(() => {
  if (!hasSampler && !state.loading) {
    hasSampler = true;
    find("#sampler").value = state.sampler;
  }
  prompt.placeholder = `a photo of a ${drawable()[0]?.phrase ?? "dog"} on the beach`;
  showSliders();
  showBefore();
});
