// The first page of a list is asked for again every few seconds: rows of a running `watch` appear by themselves.
"use strict";

const EVERY_MS = 5000;
const holder = document.getElementById("rows");

async function refresh() {
  if (document.hidden || !holder.dataset.first || holder.contains(document.activeElement)) return;
  const before = new Set([...holder.querySelectorAll("tr[data-id]")].map((row) => row.dataset.id));
  let text;
  try {
    const answer = await fetch(location.href, { headers: { "X-Fragment": "1", Accept: "text/html" }, redirect: "manual" });
    if (!answer.ok) return;
    text = await answer.text();
  } catch {
    return;
  }
  const page = new DOMParser().parseFromString(text, "text/html");
  if (holder.contains(document.activeElement)) return; // a row was chosen meanwhile: it stays under the hand
  holder.replaceChildren(...page.body.childNodes);
  let added = 0;
  for (const row of holder.querySelectorAll("tr[data-id]")) {
    if (before.has(row.dataset.id)) continue;
    row.classList.add("new");
    added += 1;
  }
  if (added && before.size) document.getElementById("live").textContent = `${added} new`;
}

// One after another: an answer that is late must not replace a newer one.
async function goOn() {
  await refresh();
  setTimeout(goOn, EVERY_MS);
}
setTimeout(goOn, EVERY_MS);

// As on the image page; Enter opens, as with every link.
document.addEventListener("keydown", (event) => {
  const way = { n: 1, p: -1 }[event.key];
  if (!way || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
  const links = [...holder.querySelectorAll("tr[data-id] a")];
  const at = links.indexOf(document.activeElement);
  links[at < 0 ? 0 : at + way]?.focus();
});

// What is not filtered by stays out of the address.
document.getElementById("filters").addEventListener("formdata", ({ formData }) => {
  for (const [name, value] of [...formData]) {
    if (value === "" || (name === "sort" && value === "uncertain")) formData.delete(name);
  }
});
