// Requests to the server. What it refuses, and that it is away, is an Error with a sentence for the reader.

import { parseBody } from "/static/pixels.js";

const KEPT = 8; // answers in memory, of a kind
const csrf = document.querySelector("meta[name=csrf]").content;
const bodies = new Map(); // "image size" -> Promise of parsed body

const ask = (url, options) =>
  fetch(url, options).catch(() => {
    throw new Error("The server cannot be reached.");
  });

export async function getJson(url) {
  const answer = await ask(url, { headers: { Accept: "application/json" } });
  if (!answer.ok) throw new Error(await problemOf(answer));
  return answer.json();
}

// An error is `final` where the same request would be refused again.
export async function post(url, document) {
  const answer = await ask(url, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf, Accept: "application/json" },
    body: JSON.stringify(document),
  });
  if (answer.ok) return answer.json();
  const error = new Error(await problemOf(answer));
  error.final = answer.status < 500;
  throw error;
}

async function problemOf(answer) {
  try {
    const { detail } = await answer.json();
    return typeof detail === "string" ? detail : "The request was refused.";
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

// The promise under this key, made if it is not there; one that fails is forgotten, so that it can be asked again.
export function remember(map, key, make) {
  if (!map.has(key)) {
    const made = make();
    map.set(key, made);
    made.catch(() => map.get(key) === made && map.delete(key));
    if (map.size > KEPT) map.delete(map.keys().next().value);
  }
  return map.get(key);
}

// The pixels of an image; size: "reduced" or "full".
export const bodyOf = (id, size) =>
  remember(bodies, `${id} ${size}`, async () => {
    const answer = await ask(`/api/images/${id}/pixels?size=${size}`);
    if (!answer.ok) throw new Error(await problemOf(answer));
    return parseBody(await answer.arrayBuffer());
  });

export const overlayOf = (id) => remember(bodies, `${id} overlay`, () => getJson(`/api/images/${id}/overlay`));
