// The tab that draws: the prompt with its completion, sliders of the concepts that it names, pictures as they come.
import { command, find, listen, make, number, pictures, post, refresh, say, send, state, stream } from "./common.js";

const SLIDERS = {
  bias: [0, 1, 0.01, "Bias β: how alike a word must be for the concept to act"],
  temperature: [0.02, 1, 0.01, "Temperature τ: how gradually it does"],
  strength: [0, 2, 0.05, "Strength"],
  start: [0, 1, 0.05, "Acts from this share of the steps"],
  end: [0, 1, 0.05, "up to this"],
};
const FIELDS = ["negative_prompt", "guidance", "guidance_rescale", "sampler", "steps", "spacing", "width", "height", "lock", "init_strength"];
const NUMBERS = ["guidance", "guidance_rescale", "steps", "width", "height", "init_strength"];
const prompt = find("#prompt"), list = find("#completions"), message = find("#draw-message");
const values = new Map(); // of the sliders, by concept; they are kept while a name is typed anew
const view = crypto.randomUUID?.() ?? String(Math.random()); // of what this page draws, the newest alone is drawn
let init = "", running = null, moved = 0;

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
  const [least, most, step, label] = SLIDERS[name], own = values.get(entry.call);
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
  const entries = named(), calls = entries.map((entry) => entry.call).join(" ");
  if (calls === shown && !anew) return;
  shown = calls;
  find("#concepts").replaceChildren(...entries.map((entry) => {
    if (!values.has(entry.call)) values.set(entry.call, ownValues(entry));
    const back = make("button", { type: "button", onclick: () => { values.delete(entry.call); showSliders(true); find(`#slider-strength-${entry.call}`).focus(); } }, "Its own values");
    return make("fieldset", {}, make("legend", {}, `<${entry.call}>, a ${entry.kind}`), ...Object.keys(ownValues(entry)).map((name) => slider(entry, name)), back);
  }));
}

function form() {
  const sent = { view, prompt: prompt.value, count: number("#count"), seed: number("#seed"), init_image: init };
  for (const name of FIELDS) sent[name] = NUMBERS.includes(name) ? number(`#${name}`) : find(`#${name}`).value;
  sent.concepts = Object.fromEntries(named().map((entry) => [entry.call, values.get(entry.call) ?? {}]));
  return sent;
}

async function draw(sweep = null) {
  running?.abort();
  const own = (running = new AbortController());
  const sent = sweep ? { ...form(), sweep } : form();
  const add = pictures(find("#drawn"), sent.prompt, Boolean(sweep));
  find("#stop-button").disabled = false;
  say(message, "Drawing. The first time, the model is compiled.");
  let problem = "", warning = "";
  try {
    await stream("/api/draw", sent, own.signal, (each) => {
      if (each.error) problem = each.error;
      else if (each.command) {
        find("#draw-command").replaceChildren(command(each.command, "The command that draws the same"));
        warning = each.warning;
      } else {
        say(message, warning, "warning");
        add(each);
      }
    });
  } catch (error) {
    if (own.signal.aborted) problem = own === running ? "Stopped." : "";
    else problem = error.message;
  }
  if (own !== running) return; // another drawing has begun
  find("#stop-button").disabled = true;
  if (problem) say(message, problem, problem === "Stopped." ? "" : "error");
  refresh();
}

find("#draw-form").addEventListener("submit", (event) => { event.preventDefault(); draw(); });
find("#stop-button").addEventListener("click", () => running?.abort());
find("#sweep-button").addEventListener("click", () => {
  draw({ control: find("#sweep-control").value, first: number("#sweep-first"), last: number("#sweep-last"), count: number("#sweep-count") });
});
find("#init").addEventListener("change", async (event) => {
  init = "";
  if (!event.target.files.length) return;
  try {
    init = (await send("/api/drop", event.target.files)).draft;
    say(message, "");
  } catch (error) {
    event.target.value = "";
    say(message, error.message, "error");
  }
});

// Recipes.
async function restore(asking) {
  try {
    const sent = await asking;
    prompt.value = sent.prompt;
    find("#count").value = sent.count;
    find("#seed").value = sent.seed;
    for (const name of FIELDS) find(`#${name}`).value = sent[name] ?? "";
    values.clear();
    for (const entry of named()) values.set(entry.call, { ...ownValues(entry), ...sent.concepts[entry.call] });
    init = "";
    find("#init").value = "";
    showSliders(true);
    say(message, `Its recipe is back: draw it again, or change it.${sent.note ? ` But ${sent.note}.` : ""}`, sent.note && "warning");
  } catch (error) {
    say(message, error.message, "error");
  }
  find("#tab-draw").scrollIntoView();
}
find("#open").addEventListener("change", (event) => {
  if (event.target.files.length) restore(send("/api/recipe", event.target.files));
  event.target.value = "";
});
let before = "";
function showBefore() {
  if (before === state.drawings.join()) return;
  before = state.drawings.join();
  find("#before").replaceChildren(...state.drawings.map((name) =>
    make("button", { type: "button", title: name, onclick: () => restore(post(`/api/recipe?drawing=${name}`, {})) },
      make("img", { src: `/drawings/${name}`, alt: name, loading: "lazy" }))));
}

// Completion of <names>.
let chosen = 0;
const begun = () => prompt.value.slice(0, prompt.selectionStart).match(/<([A-Za-z0-9_-]*)$/);
const close = () => { list.hidden = true; prompt.removeAttribute("aria-activedescendant"); };
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
  mark();
});
prompt.addEventListener("blur", close);
prompt.addEventListener("keydown", (event) => {
  if (list.hidden) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) draw();
    return;
  }
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) {
    chosen = (chosen + step + list.children.length) % list.children.length;
    mark();
  } else if (event.key === "Enter" || event.key === "Tab") choose(list.children[chosen].dataset.call);
  else if (event.key === "Escape") close();
  else return;
  event.preventDefault();
});

let settled = false;
listen(() => {
  if (!settled) find("#sampler").value = state.sampler;
  settled = true;
  showSliders();
  showBefore();
});
