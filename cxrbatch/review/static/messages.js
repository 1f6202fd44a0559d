// What the page tells the reader: over the image, and above the panel what went wrong and who else is there.

import { element } from "/static/dom.js";

const NOTED_MS = 4000;
let standing = ""; // said until the image changes
let noted = ""; // said for a while, in front of it
let timer = 0;

export function showMessage(text) {
  standing = text;
  say();
}

// `stays`: until something else is noted.
export function note(text, { stays = false } = {}) {
  noted = text;
  say();
  clearTimeout(timer);
  if (text && !stays) timer = setTimeout(() => note(""), NOTED_MS);
}

function say() {
  const message = element("message");
  message.textContent = noted || standing;
  message.classList.toggle("noted", Boolean(noted)); // not in the middle of an image
  message.hidden = !(noted || standing);
}

export function showOpenBy(reader) {
  element("open-by").textContent = reader && `${reader} has this image open too.`;
  element("open-by").hidden = !reader;
}

export function banner(text) {
  element("banner").textContent = text;
  element("banner").hidden = !text;
}
