// The image page: shows one image after another without leaving the page, keeps the next two ready, posts acts.

import { ActiveClock, allSent, done, newAct, pending, send } from "/static/acts.js";
import { isCommentTyped, whenCommentIsLeft } from "/static/comment.js";
import { DISPLAY_KEYS, expect, isThere, show, showWhyNot } from "/static/display.js";
import { element } from "/static/dom.js";
import { banner, note, showMessage, showOpenBy } from "/static/messages.js";
import { fillPanel } from "/static/panel.js";
import { bodyOf, getJson, post, remember } from "/static/server.js";
import { sourceOf } from "/static/sources.js";

const AHEAD = 2;
const REACTION_MS = 700; // a key that comes sooner was meant for what the screen showed before
const TOO_EARLY = "Nothing was done: the image had only just come, or was not there yet.";

const page = document.getElementById("workplace");
const source = sourceOf(page.dataset);
const states = new Map(); // key -> Promise of state
const drafts = new Map(); // key -> comment that no act has taken along yet
const unsaved = new Map(); // key -> name of an image whose reading could not be saved, and that was not read again
let current = null; // state in the panel
let heading = null; // promise of the state that the page is at, or on its way to
let showing = 0; // counts calls of open(), so that a late answer is dropped
let clock = null;

const stateOf = (key) => remember(states, String(key), () => getJson(source.api(key)));

// `page.dataset.shown` is the key of the image that is before the reader: acts are taken while it is there. `unasked`:
// the page goes there by itself, while the reader looks at another image.
async function open(named, { push = true, message = "", unasked = false } = {}) {
  const key = String(named); // the page names it as text, the server as a number
  const turn = (showing += 1);
  delete page.dataset.shown;
  if (!current) showMessage("Loading …");
  heading = stateOf(key);
  let state;
  try {
    state = await heading;
  } catch (error) {
    return turn === showing ? stay(error) : undefined;
  }
  if (turn !== showing) return undefined;
  current = { ...state, key };
  clock = new ActiveClock();
  if (push) history.pushState({ key }, "", source.url(key));
  document.title = `${state.name} · cxrbatch`;
  fillPanel(current, relatedAddress);
  expect(current);
  element("comment").value = drafts.get(key) ?? "";
  banner([message, othersUnsaved(key)].filter(Boolean).join(" "));
  try {
    const body = await bodyOf(state.id, "reduced");
    if (turn !== showing) return undefined;
    show(body);
  } catch (error) {
    if (turn !== showing) return undefined;
    showWhyNot(error.message);
  }
  await painted();
  if (unasked) await new Promise((resolve) => setTimeout(resolve, REACTION_MS));
  if (turn !== showing) return undefined;
  page.dataset.shown = key;
  opened(current);
  for (const next of (state.next ?? []).slice(0, AHEAD)) {
    stateOf(next)
      .then((following) => bodyOf(following.id, "reduced"))
      .catch(() => {});
  }
  return undefined;
}

// Where the page was going cannot be opened.
function stay(error) {
  if (current && !isThere()) {
    states.set(current.key, Promise.resolve(current)); // in hand; its pixels were on their way
    open(current.key, { push: false });
  } else {
    heading = Promise.resolve(current);
    if (current) page.dataset.shown = current.key;
  }
  if (current) note(error.message);
  else showMessage(error.message);
}

const isShown = () => current !== null && page.dataset.shown === current.key;

// Resolves when what was drawn is on the screen; in a tab in the background nothing is ever drawn.
const painted = () =>
  new Promise((resolve) => {
    requestAnimationFrame(() => requestAnimationFrame(resolve));
    setTimeout(resolve, 500);
  });

// Tells the server that the image is before the reader, and learns who else has it open.
async function opened(state) {
  try {
    const answer = await post(`/api/images/${state.id}/opened`, {});
    if (current === state) showOpenBy(answer.open_by);
  } catch {
    // The act itself says when the server is away.
  }
}

// ---- reading ----

function begin(state, action, label, comment) {
  const made = newAct(state, action, { label, comment, activeMs: clock.read() });
  pending.add(made);
  return made;
}

async function save(made) {
  const answer = await send(made);
  states.delete(made.key); // what it says of the reader is not so any more
  return answer;
}

async function act(action, label = null) {
  if (!isShown()) return note(TOO_EARLY);
  const state = current;
  if (action === "accept" && !state.label) return note("There is no answer to accept.");
  if (state.closed) return note("This round is closed.");
  const made = begin(state, action, label, element("comment").value);
  unsaved.delete(state.key);
  drafts.delete(state.key);
  element("comment").value = "";
  const one = { place: source.place, key: state.key, name: state.name, shown: state.shown, signature: state.signature };
  done.add(one);
  const saved = save(made);
  const late = lateness();
  let next = "unread" in state ? (state.unread ?? undefined) : state.next?.[0];
  // This state may be older than the last save: an image that was just read is not the next one.
  if ("unread" in state && done.has(source.place, String(next))) next = undefined;
  if (next !== undefined) open(next);
  const turn = showing;
  let answer;
  try {
    answer = await saved;
  } catch (error) {
    done.remove(one);
    return comeBack(state, made, error);
  }
  unsaved.delete(state.key);
  if (answer.others?.length && !state.deciding) note(`${state.name}: ${answer.others.join(", ")} read it too (${answer.status}).`);
  if (next !== undefined) return undefined;
  await allSent(); // what is not saved yet would count as unread
  if (turn !== showing) return undefined; // the reader has gone elsewhere, or was sent back to what could not be saved
  states.delete(state.key);
  await open(state.key, { push: false });
  if (turn + 1 !== showing) return undefined;
  const unread = current?.key === state.key ? (current.unread ?? undefined) : undefined;
  if (unread === undefined) note("That was the last image.");
  else if (!isCommentedBesides(unread)) open(unread, { unasked: late() });
  return undefined;
}

// Whether the reader no longer waits for what a key does.
function lateness() {
  const since = performance.now();
  return () => performance.now() - since > REACTION_MS;
}

// To an image whose reading could not be saved; not out of a comment that is being typed on another one.
async function comeBack(state, made, error) {
  const message = `Not saved: ${error.message}`;
  unsaved.set(state.key, state.name);
  states.set(state.key, Promise.resolve(state)); // in hand: the server may be away
  if (!drafts.get(state.key)) drafts.set(state.key, made.document.comment);
  while (isCommentedBesides(state.key)) {
    banner(`${state.name} is not saved: ${error.message} The page goes back there after this comment.`);
    await whenCommentIsLeft();
    if (!unsaved.has(state.key)) return;
  }
  open(state.key, { message, unasked: true });
}

// Whether a comment is being typed on another image: going to this one would put the rest of it there.
const isCommentedBesides = (key) => isCommentTyped() && current.key !== String(key);

// Of several readings that could not be saved the page comes back to one.
function othersUnsaved(key) {
  const names = [...unsaved].filter(([other]) => other !== key).map(([, name]) => name);
  return names.length ? `Not saved either: ${names.join(", ")}.` : "";
}

async function undo() {
  const before = done.last(source.place);
  if (!current || (!before && !isShown())) return note(TOO_EARLY);
  const last = before ?? (current.mine ? current : null);
  if (!last) return note("There is nothing to undo.");
  const at = done.remove(last);
  const made = begin(last, "withdraw", null, "");
  const turn = showing;
  const late = lateness();
  try {
    await save(made);
  } catch (error) {
    // The next undo is of this act still, not of an earlier one; unless it was never saved.
    if (!error.final && at >= 0 && !unsaved.has(last.key)) done.putBack(last, at);
    banner(`Not undone: ${error.message}`);
    return undefined;
  }
  unsaved.delete(last.key);
  if (turn === showing && !isCommentedBesides(last.key)) await open(last.key, { unasked: late() }); // not gone on
  return note(`${last.name}: your reading is withdrawn.`); // named: it stands for a while, also over the next image
}

// ---- going elsewhere ----

function relatedAddress(id) {
  return `/images/${id}${page.dataset.query ? `?${page.dataset.query}` : ""}`; // the list stays the one it was
}

// Round and round all images of the study or patient, this one among them.
function nextRelated() {
  if (!isShown()) return note(TOO_EARLY);
  if (!current.related?.length) return note("No other image of this study or patient is shown here.");
  const ids = [current.id, ...current.related.map((other) => other.id)].sort((a, b) => a - b);
  location.href = relatedAddress(ids[(ids.indexOf(current.id) + 1) % ids.length]);
  return undefined;
}

// From the image that the page is on its way to, so that every key counts: twice `n` goes two further.
let steps = Promise.resolve();
function step(way) {
  steps = steps.then(async () => {
    const from = await Promise.resolve(heading).catch(() => current);
    if (!from) note(TOO_EARLY);
    else if (!from[way]?.length) note("There is no further image in this list.");
    else open(from[way][0]);
  });
}

// ---- keys and buttons ----

const KEYS = {
  ...DISPLAY_KEYS,
  a: () => act("accept"),
  f: () => act("flag"),
  s: () => act("skip"),
  z: undo,
  n: () => step("next"),
  p: () => step("previous"),
  g: nextRelated,
  "?": () => element("keys").showModal(),
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input:not([type=range]), textarea, select, dialog[open]");
  if (typing || event.ctrlKey || event.metaKey || event.altKey || event.repeat) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const choice = current?.choices?.find((one) => one.key === event.key);
  if (choice) act("override", choice.label);
  else if (KEYS[event.key]) KEYS[event.key]();
  else return;
  event.preventDefault();
});

for (const [id, key] of Object.entries({ help: "?", next: "n", previous: "p" })) element(id).addEventListener("click", KEYS[key]);
document.querySelector(".acts").addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (!button) return;
  // The second click of a double click would act on the next image, which is there by then.
  if (event.detail > 1) note("A double click counts once.");
  else if (button.dataset.act === "undo") undo();
  else act(button.dataset.act, button.dataset.label);
});
element("comment").addEventListener("input", (event) => current && drafts.set(current.key, event.target.value));
document.addEventListener("visibilitychange", () => (document.hidden ? clock?.pause() : clock?.touch()));
for (const name of ["pointermove", "keydown", "wheel"]) document.addEventListener(name, () => clock?.touch(), { passive: true });
window.addEventListener("popstate", () => {
  const key = source.keyOf(location.pathname);
  if (key) {
    states.delete(key);
    open(key, { push: false });
  }
});

// What a killed tab or server left unsent is sent now, under its old id: it counts once.
async function start() {
  history.replaceState({ key: source.first }, "", location.href);
  const unsent = pending.all();
  const lost = [];
  if (unsent.length) showMessage("Saving what was not saved yet …");
  for (const one of unsent) {
    try {
      await save(one);
    } catch (error) {
      lost.push(`An earlier reading (${one.name ?? "of another page"}) was not saved: ${error.message}`);
    }
  }
  await open(source.first, { push: false, message: lost.join(" ") });
}

start();
