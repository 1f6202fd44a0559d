// Whether a comment is being typed, and when that ends.

import { element } from "/static/dom.js";

const field = element("comment");
let pressed = false; // whether a mouse button is down
for (const [name, is] of Object.entries({ pointerdown: true, pointerup: false, pointercancel: false })) {
  document.addEventListener(name, () => (pressed = is), true);
}

export const isCommentTyped = () => document.activeElement === field;

// Not before the click that leaves it has reached its button: what that does is meant for the image on the screen.
export async function whenCommentIsLeft() {
  const once = (target, ...names) => new Promise((resolve) => names.forEach((name) => target.addEventListener(name, resolve, { once: true })));
  await once(field, "blur");
  if (pressed) await once(document, "pointerup", "pointercancel");
  await new Promise((resolve) => setTimeout(resolve));
}
