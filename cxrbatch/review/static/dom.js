// What every script of the image page needs to write into it.

export const element = (id) => document.getElementById(id);

// "needs_review" as people write it.
export const words = (text) => String(text ?? "").replaceAll("_", " ");

export function make(tag, { className = "", text = "", ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
