// The page works without this. With it, the live part is replaced as the log grows, deadlines count down, and the
// scrubber moves while it is dragged.
"use strict";

const main = document.getElementById("main");
const line = document.getElementById("line");
const announce = document.getElementById("announce");
let skew = Number(document.documentElement.dataset.now) - Date.now();
document.documentElement.classList.add("scripted");

// Replacing must not take away what the reader holds: focus, opened details, scroll positions, a half-typed search.
function replace(html) {
  const active = document.activeElement;
  const held = main.contains(active) ? place(active) : null;
  if (held && active.matches("input:not([type=range])")) return;
  const open = [...main.querySelectorAll("details[open][id]")].map((one) => one.id);
  const scrolled = [...main.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
  const before = said();
  main.innerHTML = html;
  open.forEach((id) => document.getElementById(id)?.setAttribute("open", ""));
  main.querySelectorAll(".scroll").forEach((one, index) => { one.scrollLeft = scrolled[index] || 0; });
  if (held) found(held)?.focus({ preventScroll: true });
  if (said() !== before) announce.textContent = said();
  tick();
}

// Where an element is: by its id, a link by where it leads, anything else by its number among its kind.
function place(one) {
  const kind = one.tagName;
  return { id: one.id, href: one.getAttribute("href"), kind, number: [...main.querySelectorAll(kind)].indexOf(one) };
}

function found(held) {
  if (held.id) return document.getElementById(held.id);
  const alike = [...main.querySelectorAll(held.kind)];
  return held.href === null ? alike[held.number] : alike.find((one) => one.getAttribute("href") === held.href);
}

function said() {
  return main.querySelector("[data-announce]")?.textContent ?? "";
}

function tick() {
  document.querySelectorAll("[data-deadline]").forEach((one) => {
    const left = Math.max(0, Math.round((Number(one.dataset.deadline) - Date.now() - skew) / 1000));
    const minutes = Math.floor(left / 60);
    one.textContent = ` (${minutes ? `${minutes} min ` : ""}${left % 60} s left)`;
  });
}

function follow(address) {
  let heard = Date.now();
  const source = new EventSource(address);
  const alive = (event) => {
    heard = Date.now();
    skew = Number(event.lastEventId) - heard;
    line.hidden = true;
  };
  source.addEventListener("alive", alive);
  source.addEventListener("live", (event) => { alive(event); replace(event.data); });
  const watch = setInterval(() => {
    // Refused, not interrupted: the session is over, or the console started anew. The browser will not ask again.
    if (source.readyState === EventSource.CLOSED) { clearInterval(watch); setTimeout(() => location.reload(), 3000); }
    if (Date.now() - heard > 15000 || source.readyState !== EventSource.OPEN && Date.now() - heard > 3000) {
      document.getElementById("as-of").textContent = new Date(heard).toLocaleTimeString();
      line.hidden = false;
    }
  }, 1000);
}

// The newest position asked for wins; while one is being fetched, the next waits.
let wanted = null;
let fetching = false;
async function scrub(form, position) {
  wanted = position;
  if (fetching) return;
  fetching = true;
  try {
    while (wanted !== null) {
      const address = `${form.getAttribute("action")}?at=${wanted}`;
      wanted = null;
      const answer = await fetch(address, { headers: { Accept: "text/html" } });
      if (!answer.ok) break;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const value = document.getElementById("at")?.value;
      replace(page.getElementById("main").innerHTML);
      if (wanted !== null) document.getElementById("at").value = value;
      history.replaceState(null, "", address);
    }
  } finally {
    fetching = false;
  }
}

main.addEventListener("input", (event) => {
  const form = event.target.closest("[data-scrubber]");
  if (form) scrub(form, event.target.value);
});

setInterval(tick, 1000);
tick();
if (main.dataset.live) follow(main.dataset.live);
