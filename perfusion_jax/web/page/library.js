// The tab that keeps what was learnt: cards, renaming, exporting, deleting, comparing.
import { askToDelete, command, find, listen, make, number, pictures, post, refresh, say, state, stream } from "./common.js";

const message = find("#library-message");
const view = crypto.randomUUID?.() ?? String(Math.random());
let chosen = "";

const address = (entry) => `/grid?key=${encodeURIComponent(entry.key)}&at=${entry.grid}`;
function card(entry) {
  const picture = entry.grid ? make("img", { src: address(entry), alt: "" }) : make("span", { class: "blank" });
  return make("button", { type: "button", class: "card", "aria-pressed": String(entry.key === chosen), data: { key: entry.key }, onclick: () => choose(entry.key) },
    picture, make("strong", {}, `<${entry.call}>`), make("span", {}, `a ${entry.kind}`), entry.obstacle ? make("small", {}, entry.obstacle) : "");
}
function choose(key) {
  chosen = key;
  say(message, "");
  find("#exported").replaceChildren();
  find("#export-command").replaceChildren();
  show();
  const entry = state.entries.find((each) => each.key === key);
  if (entry) find("#new-name").value = entry.name;
}
function show() {
  const focused = document.activeElement?.dataset?.key;
  const cards = state.entries.map(card);
  find("#cards").replaceChildren(...(cards.length ? cards : [make("p", { class: "empty" }, "Nothing has been learnt yet.")]));
  if (focused) document.querySelector(`.card[data-key="${CSS.escape(focused)}"]`)?.focus();
  const entry = state.entries.find((each) => each.key === chosen);
  find("#details").hidden = !entry;
  if (entry) {
    const rows = Object.entries(entry.facts).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]);
    const picture = entry.grid ? make("img", { class: "grid-picture", src: address(entry), alt: "What it was scored by; its own pictures are on the left" }) : "";
    const odd = entry.obstacle ? make("p", { class: "note warning" }, `It cannot be drawn: ${entry.obstacle}.`) : "";
    find("#facts").replaceChildren(...[make("h2", {}, entry.name), odd, picture, make("dl", {}, ...rows)].filter((each) => each !== ""));
    find("#export-form").hidden = !entry.gated || !entry.drawable;
  }
  find("#compare-form").hidden = state.entries.filter((each) => each.drawable).length < 2;
  for (const side of ["left", "right"]) {
    const select = find(`#${side}`), before = select.value;
    const options = state.entries.filter((each) => each.drawable).map((each) => make("option", { value: each.key }, each.call));
    select.replaceChildren(...options);
    if (options.some((option) => option.value === before)) select.value = before;
    else if (side === "right" && options.length > 1) select.selectedIndex = 1;
  }
}
async function doing(work) {
  try { await work(); } catch (error) { say(message, error.message, "error"); }
}
find("#rename-form").addEventListener("submit", (event) => {
  event.preventDefault();
  doing(async () => {
    const key = await post("/api/rename", { key: chosen, name: find("#new-name").value });
    await refresh();
    choose(key);
    say(message, "It has its new name.");
  });
});
find("#export-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const kind = find("#export-kind").value, key = chosen;
  say(message, "Writing…");
  doing(async () => {
    const { folder, files, call, command: words } = await post("/api/export", { key, to: kind });
    if (key !== chosen) return; // another one is looked at by now
    say(message, `Written to ${folder}. Its README.md says which words to write in which tool.`);
    find("#exported").replaceChildren(...files.map((file) => make("li", {}, make("a", { href: `/exports/${call}/${kind}/${encodeURIComponent(file)}`, download: file }, file))));
    find("#export-command").replaceChildren(command(words, "The command that writes the same"));
  });
});
find("#delete-button").addEventListener("click", () => doing(async () => {
  const entry = state.entries.find((each) => each.key === chosen);
  const photographs = await askToDelete(entry.name, { key: entry.key });
  if (photographs === null) return;
  await post("/api/delete", { key: entry.key, photographs });
  choose("");
  await refresh();
  find(".card, #tab-library").focus();
}));

let comparing = null;
find("#compare-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  comparing?.abort();
  const own = (comparing = new AbortController()), place = find("#compare-message"), prompt = find("#compare-prompt").value;
  if (prompt.split("{}").length !== 2) return say(place, "The prompt must have one {} where the concept goes.", "error");
  say(place, "Drawing.");
  find("#compare-stop").disabled = false;
  const warnings = new Set(), commands = [];
  find("#compare-commands").replaceChildren();
  let problem = "";
  try {
    for (const side of ["left", "right"]) {
      const entry = state.entries.find((each) => each.key === find(`#${side}`).value), words = prompt.replace("{}", entry.phrase);
      const add = pictures(find(`#of-${side}`), words, false);
      const sent = { view: `${view}-${side}`, prompt: words, sampler: state.sampler, count: number("#compare-count"), seed: number("#compare-seed"), concepts: {} };
      await stream("/api/draw", sent, own.signal, (each) => {
        if (each.error) throw new Error(each.error);
        if (each.file) return add(each);
        each.warnings.forEach((warning) => warnings.add(warning));
        commands.push(command(each.command, `The command that draws ${words}`));
        find("#compare-commands").replaceChildren(...commands);
      });
    }
  } catch (error) {
    problem = own.signal.aborted ? "Stopped." : error.message;
  }
  if (own !== comparing) return; // two others are drawn by now
  find("#compare-stop").disabled = true;
  if (problem === "Stopped.") say(place, problem);
  else say(place, problem || [...warnings].join("\n"), problem ? "error" : "warning");
  refresh();
});
find("#compare-stop").addEventListener("click", () => comparing?.abort());
let shown = "";
listen(() => {
  const now = JSON.stringify(state.entries);
  if (now === shown) return; // a run that goes on changes nothing here
  shown = now;
  show();
});
