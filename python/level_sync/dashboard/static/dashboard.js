// Reads the page anew and replaces only what has changed, so that nothing flickers, scrolls or loses the focus.
"use strict";
const EVERY = 10000;

function bringInStep(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  const differs = old.nodeName !== fresh.nodeName || old.nodeType !== fresh.nodeType;
  if (differs || old.nodeType === Node.TEXT_NODE) {
    old.replaceWith(fresh.cloneNode(true));
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  const [had, has] = [[...old.childNodes], [...fresh.childNodes]];
  has.forEach((child, at) => (at < had.length ? bringInStep(had[at], child) : old.append(child.cloneNode(true))));
  had.slice(has.length).forEach((child) => child.remove());
}

let isUpdating = false;

async function update() {
  if (document.hidden || isUpdating) return;
  isUpdating = true;
  const stale = document.getElementById("stale");
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!fresh.getElementById("main")) throw new Error("not a page of the dashboard");
    for (const id of ["main", "asof"]) bringInStep(document.getElementById(id), fresh.getElementById(id));
    document.title = fresh.title;
  } catch {
    stale.textContent = " · the dashboard does not answer, this is old";
  } finally {
    isUpdating = false;
  }
}

setInterval(update, EVERY);
document.addEventListener("visibilitychange", update);
