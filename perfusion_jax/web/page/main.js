// The page: its tabs, and the clock that asks for the studio's state.
import { find, refresh, state } from "./common.js";
import "./draw.js";
import "./learn.js";
import "./library.js";

const tabs = [...document.querySelectorAll('[role="tab"]')];
function open(name, focus = false) {
  for (const tab of tabs) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    find(`#${tab.getAttribute("aria-controls")}`).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  history.replaceState(null, "", `#/${name}`); // no name of an element, to which the Tab key would jump
}
tabs.forEach((tab, place) => {
  tab.addEventListener("click", () => open(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) open(tabs[(place + step + tabs.length) % tabs.length].getAttribute("aria-controls"), true);
  });
});
const asked = location.hash.slice(2), known = ["draw", "learn", "library"].includes(asked);
open(known ? asked : "draw");
// A picture that is dropped beside its place must not take the page's.
for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());
await refresh();
if (!known && !state.entries.length) open("learn"); // there is nothing to draw yet but the model's own words
for (;;) {
  await refresh();
  await new Promise((resolve) => { setTimeout(resolve, 2000); });
}
