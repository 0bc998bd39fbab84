// Reads the page anew and replaces only what has changed, so that nothing flickers, scrolls or loses the focus.
"use strict";
const EVERY = 10000;
const PATIENCE = 20000;

function bringInStep(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  // What has a key, such as a row, is found by it wherever it stands now.
  const known = new Map([...old.children].filter(keyOf).map((child) => [keyOf(child), child]));
  const wanted = new Set([...fresh.children].map(keyOf));
  let at = old.firstChild;
  for (const child of fresh.childNodes) {
    const key = keyOf(child);
    while (key && known.has(key) && at && at !== known.get(key) && !(keyOf(at) && wanted.has(keyOf(at)))) at = removed(at);
    const same = key ? known.get(key) : at && !keyOf(at) && at.nodeName === child.nodeName ? at : null;
    if (same && same === at) at = at.nextSibling;
    else old.insertBefore(same || child.cloneNode(true), at);
    if (!same) continue;
    if (same.nodeType === Node.ELEMENT_NODE) bringInStep(same, child);
    else if (same.nodeValue !== child.nodeValue) same.nodeValue = child.nodeValue;
  }
  while (at) at = removed(at);
}

function keyOf(node) {
  return node.nodeType === Node.ELEMENT_NODE ? node.id || node.getAttribute("aria-labelledby") : null;
}

function removed(node) {
  const next = node.nextSibling;
  node.remove();
  return next;
}

let isUpdating = false;
let hasFailed = false;

async function update() {
  if (document.hidden || isUpdating) return;
  isUpdating = true;
  const stale = document.getElementById("stale");
  try {
    const answer = await fetch(location.href, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (!fresh.getElementById("main")) throw new Error("not a page of the dashboard");
    // A database that is away for a moment takes nobody's page away.
    const isBlip = !answer.ok && !hasFailed && !document.querySelector("#main [role=alert]");
    hasFailed = !answer.ok;
    if (isBlip) {
      stale.textContent = `${fresh.querySelector("#main h1").textContent}: this is old.`;
      document.title = "? · level_sync";
      return;
    }
    for (const id of ["main", "asof"]) bringInStep(document.getElementById(id), fresh.getElementById(id));
    document.title = fresh.title;
    stale.textContent = "";
  } catch {
    stale.textContent = "The dashboard does not answer: this is old.";
    document.title = "? · level_sync";
  } finally {
    isUpdating = false;
  }
}

setInterval(update, EVERY);
document.addEventListener("visibilitychange", update);
