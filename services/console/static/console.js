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
  label();
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

let leave = () => {};
function follow(address) {
  leave();
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
  leave = () => { clearInterval(watch); source.close(); };
}

// The newest position asked for wins; while one is being fetched, the next waits.
let wanted = null;
let fetching = false;
async function scrub(input) {
  wanted = { id: input.id, address: `${input.form.getAttribute("action")}?${new URLSearchParams(new FormData(input.form))}` };
  if (fetching) return;
  fetching = true;
  leave();
  let live = main.dataset.live;
  try {
    while (wanted !== null) {
      const { id, address } = wanted;
      wanted = null;
      const answer = await fetch(address, { headers: { Accept: "text/html" } });
      if (!answer.ok) break;
      const page = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("main");
      const value = document.getElementById(id)?.value;
      live = page.dataset.live;
      replace(page.innerHTML);
      if (wanted !== null) document.getElementById(id).value = value;
      history.replaceState(null, "", address);
    }
  } finally {
    fetching = false;
    if (live) follow(main.dataset.live = live);
  }
}

main.addEventListener("input", (event) => {
  if (event.target.type === "range" && event.target.closest("[data-scrubber]")) scrub(event.target);
});

// Both answers to a reader's text as they come. Asked again, the ones before are given up.
let asking = null;
async function ask(form) {
  asking?.abort();
  const mine = asking = new AbortController();
  const button = form.querySelector("button");
  const side = (name) => form.parentElement.querySelector(`[data-side=${name}]`);
  const sides = ["base", "expert"].map(side);
  const text = document.createElement("span");
  text.className = "dim";
  text.textContent = form.elements.text.value;
  sides.forEach((one) => { one.replaceChildren(text.cloneNode(true)); one.setAttribute("aria-busy", "true"); });
  sides[0].closest(".sides").hidden = false;
  button.textContent = "Stop";
  const problem = (one, words) => {
    const said = document.createElement("b");
    said.className = "bad";
    said.textContent = ` ${words}`;
    one.append(said);
  };
  try {
    const body = new URLSearchParams(new FormData(form));
    const answer = await fetch(form.action, { method: "POST", body, headers: { Accept: "text/event-stream" }, signal: mine.signal });
    if (!answer.ok) throw new Error((await answer.text()).trim());
    let rest = "";
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const events = (rest + part.value).split("\n\n");
      rest = events.pop();
      events.filter((one) => one.startsWith("event: piece")).forEach((one) => {
        const piece = JSON.parse(one.slice(one.indexOf("data: ") + 6));
        side(piece.side).append(piece.text);
        if (piece.problem) problem(side(piece.side), piece.problem);
      });
    }
    announce.textContent = "Both have answered.";
  } catch (error) {
    if (error.name !== "AbortError") problem(sides[0], error.message || "The console does not answer.");
  } finally {
    if (asking === mine) {
      asking = null;
      button.textContent = "Try";
      sides.forEach((one) => one.removeAttribute("aria-busy"));
    }
  }
}

main.addEventListener("submit", (event) => {
  if (!event.target.matches("[data-try]")) return;
  event.preventDefault();
  if (asking) asking.abort(); else ask(event.target);
});

// On a narrow screen a row is shown as a list of names and values: each cell then says whose value it is.
function label() {
  main.querySelectorAll("table:not([data-labelled])").forEach((table) => {
    table.dataset.labelled = "";
    const names = [...table.querySelectorAll("thead tr:last-child > *")].map((one) => one.innerText.trim());
    if (!names.length) return;
    table.classList.add("rows");
    table.setAttribute("role", "table");
    table.querySelectorAll("tr").forEach((row) => row.setAttribute("role", "row"));
    table.querySelectorAll("thead th").forEach((one) => one.setAttribute("role", "columnheader"));
    table.querySelectorAll("tbody tr").forEach((row) => [...row.children].forEach((cell, index) => {
      cell.setAttribute("role", cell.tagName === "TH" ? "rowheader" : "cell");
      if (cell.tagName !== "TD") return;
      const content = document.createElement("span");
      content.append(...cell.childNodes);
      cell.append(content);
      cell.dataset.name = names[index] ?? "";
    }));
  });
}

setInterval(tick, 1000);
label();
tick();
if (main.dataset.live) follow(main.dataset.live);
