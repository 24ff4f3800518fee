// What the tabs share: elements, requests, notes, pictures, and the state of the studio.

export const find = (selector) => document.querySelector(selector);

/** An element with properties and children; text is never read as HTML. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

/** Shows a line to the person: "" (a plain one), "warning" or "error"; nothing where there are no words. */
export function say(place, words, kind = "") {
  place.replaceChildren(...(words ? [make("p", { class: `note ${kind}` }, words)] : []));
}

async function answer(response) {
  const text = await response.text();
  let sent;
  try { sent = JSON.parse(text); } catch { sent = { error: text || `the studio answered ${response.status}` }; }
  if (!response.ok) throw new Error(sent.error ?? `the studio answered ${response.status}`);
  return sent;
}

const silent = () => { throw new Error("The studio does not answer. What was being learnt is saved; start it again, and this page goes on."); };
/** A browser says the same of a server that is not there and of a file that it cannot read any more: asks which it is. */
async function failed(error) {
  if (!(error instanceof TypeError)) throw error;
  await fetch("/api/state").catch(silent);
  throw new Error("This could not be sent: has a file been moved or changed since it was chosen? Choose it again.");
}

export const post = (path, values) =>
  fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values) }).then(answer).catch(failed);

export const MOST_FILES = 64, MOST_BYTES = 512 * 2 ** 20; // of one request, as the server takes them
export async function send(path, files) {
  const bytes = files.reduce((sum, file) => sum + file.size, 0);
  if (files.length > MOST_FILES) throw new Error(`${files.length} pictures: at most ${MOST_FILES} are taken.`);
  if (bytes > MOST_BYTES) throw new Error(`${Math.round(bytes / 2 ** 20)} MiB: at most ${MOST_BYTES / 2 ** 20} MiB are taken together.`);
  const form = new FormData();
  for (const file of files) form.append("files", file, file.name);
  return fetch(path, { method: "POST", body: form }).then(answer).catch(failed);
}

/** Calls `each` with every object of a stream of lines of JSON. */
export async function stream(path, values, signal, each) {
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(values), signal };
  const response = await fetch(path, options).catch(failed);
  if (!response.ok) await answer(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) each(JSON.parse(line));
  }
}

// The state of the studio, asked for every other second; listeners are called where it has changed.
const listeners = [];
export let state = { entries: [], jobs: [], interrupted: [], drawings: [], loading: true };
let seen = "";
export const listen = (listener) => listeners.push(listener);
export async function refresh() {
  let problem = "", again = false;
  try {
    const sent = await fetch("/api/state").catch(silent).then(answer);
    problem = sent.problem;
    again = Boolean(problem);
    const text = JSON.stringify(sent);
    if (text === seen) return;
    seen = text;
    state = sent;
    find("#loading").hidden = !sent.loading;
    for (const listener of listeners) listener();
  } catch (error) {
    problem = error.message;
  } finally {
    const place = find("#connection");
    if (place.dataset.problem !== problem) {
      place.dataset.problem = problem;
      const button = make("button", { type: "button", onclick: async () => { await post("/api/act", { act: "load" }).catch(() => {}); refresh(); } }, "Try again");
      place.replaceChildren(make("span", {}, problem), ...(again ? [" ", button] : []));
    }
    place.hidden = !problem;
  }
}

/** Waits until the model is there, or cannot be loaded, or the signal ends it. */
export const settled = (signal) => new Promise((resolve) => {
  if (!state.loading) resolve();
  signal.addEventListener("abort", resolve);
  listen(() => { if (!state.loading) resolve(); });
});

/** A command line to copy. */
export function command(words, label) {
  const line = words.map((word) => (/^[\w@%+=:,./<>-]+$/.test(word) && !/[<>]/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`)).join(" ");
  const button = make("button", { type: "button" }, "Copy");
  const shown = make("pre", { tabIndex: 0 }, line);
  button.addEventListener("click", async () => {
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(line);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    } else {
      getSelection().selectAllChildren(shown); // browsers give the clipboard to pages of this machine or of HTTPS alone
    }
  });
  return make("details", { class: "command" }, make("summary", {}, label), shown, button);
}

/** A place that drawn pictures are added to, with the words of their prompt: to hover or focus one shows where they looked. */
export function pictures(place, prompt, isStrip) {
  const words = make("p", { class: "words", role: "group", "aria-label": "Words: hover or focus one to see where the pictures looked at it" });
  const figures = make("div", { class: isStrip ? "pictures strip" : "pictures" });
  const show = (number) => {
    figures.querySelectorAll(".looks").forEach((cover) => { cover.hidden = cover.dataset.word !== String(number); });
    [...words.children].forEach((word, each) => word.setAttribute("aria-pressed", String(each === number)));
  };
  let begun = false;
  return (picture) => {
    if (!begun) {
      begun = true;
      words.replaceChildren(...picture.words.map((word, number) => {
        const share = (value) => `${Math.round(100 * value)} %`;
        const title = `${share(word.least)} to ${share(word.most)} of the attention`;
        const on = () => show(number), off = () => show(-1);
        return make("button", { type: "button", title, "aria-pressed": "false", onmouseenter: on, onfocus: on, onmouseleave: off, onblur: off }, word.text);
      }));
      place.replaceChildren(words, figures);
    }
    const address = `/drawings/${picture.file}?at=${picture.at}`;
    const covers = picture.words.map((word, number) => make("img", { class: "looks", src: word.looks, alt: "", hidden: true, data: { word: number } }));
    const small = Math.max(picture.width, picture.height) < 256 ? " small" : "";
    figures.append(make("figure", {},
      make("div", { class: `frame${small}` }, make("img", { src: address, alt: `${prompt}, ${picture.label}`, title: `${prompt}, ${picture.label}`, width: picture.width, height: picture.height }), ...covers),
      make("figcaption", {}, make("span", {}, picture.label), make("a", { href: address, download: picture.file }, picture.file))));
  };
}

/** The number in a field, or null where it is empty. */
export function number(selector) {
  const field = find(selector);
  if (field.validity.badInput) throw new Error(`${field.closest("label").firstChild.textContent.trim()}: it must be a number`);
  return field.value === "" ? null : Number(field.value);
}

/** Asks a question, with a list under it and a box to tick if there are any; null if the answer is no, else whether the box is ticked. */
export function ask(words, yes, list = [], box = "") {
  const dialog = find("#ask-dialog");
  find("#ask-words").textContent = words;
  find("#ask-yes").textContent = yes;
  find("#ask-list").replaceChildren(...list.map((each) => make("li", {}, each)));
  find("#ask-box").checked = false;
  find("#ask-box-words").textContent = box;
  find("#ask-box").parentElement.hidden = !box;
  return new Promise((resolve) => {
    const end = (answer) => () => { dialog.close(); resolve(answer()); };
    find("#ask-yes").onclick = end(() => find("#ask-box").checked);
    find("#ask-no").onclick = end(() => null);
    dialog.oncancel = () => resolve(null);
    dialog.showModal();
    find("#ask-no").focus();
  });
}

/** Asks twice whether something is to be deleted, and says what goes; null if not, else whether its photographs go too. */
export async function askToDelete(name, what) {
  const { files, photographs } = await post("/api/doomed", what);
  const more = photographs ? `and the photographs that it was learnt from: ${photographs}` : "";
  const too = await ask(`Delete ${name}? These go:`, "Yes", files, more);
  if (too === null) return null;
  return (await ask(`Nothing brings ${name}${too ? " and its photographs" : ""} back. Really?`, "Delete for good")) === null ? null : too;
}
