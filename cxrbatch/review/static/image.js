// The image page: shows one image after another without leaving the page, keeps the next two ready, posts acts.

import { Viewer, parseBody } from "/static/viewer.js";

const AHEAD = 2;
const KEPT = 8; // images in memory
const IDLE_MS = 60_000; // without a hand on mouse or keyboard nobody is reading
const RETRIES_MS = [300, 1000, 3000, 8000];
const REACTION_MS = 700; // a key that comes sooner was meant for what the screen showed before
const TOO_EARLY = "Nothing was done: the image had only just come, or was not there yet.";

const page = document.getElementById("workplace");
const csrf = document.querySelector("meta[name=csrf]").content;
const element = (id) => document.getElementById(id);
const viewer = new Viewer(element("canvas"), viewChanged);
const source = page.dataset.round ? roundSource(page.dataset.round) : listSource(page.dataset.query);
const states = new Map(); // key -> Promise of state
const bodies = new Map(); // "image size" -> Promise of parsed body
const drafts = new Map(); // key -> comment that no act has taken along yet
let current = null; // state in the panel
let onScreen = null; // key whose pixels, or why there are none, the viewer shows
let heading = null; // promise of the state that the page is at, or on its way to
let showing = 0; // counts calls of open(), so that a late answer is dropped
let clock = null;

// Where images come from: a filtered list, or a round. A key names an image in it.
function listSource(query) {
  const suffix = query ? `?${query}` : "";
  return {
    place: "images",
    first: page.dataset.image,
    api: (key) => `/api/images/${key}${suffix}`,
    url: (key) => `/images/${key}${suffix}`,
    keyOf: (path) => path.match(/^\/images\/(\d+)/)?.[1],
    list: `/images${suffix}`,
  };
}

function roundSource(round) {
  const { part, position } = page.dataset; // "read": positions of this reader; "decide": images
  return {
    place: `rounds/${round}/${part}`,
    first: position,
    api: (key) => `/api/rounds/${round}/${part}/${key}`,
    url: (key) => `/rounds/${round}/${part}/${key}`,
    keyOf: (path) => path.match(/\/(?:read|decide)\/(\d+)/)?.[1],
    list: `/rounds/${round}`,
  };
}

const ask = (url, options) =>
  fetch(url, options).catch(() => {
    throw new Error("The server cannot be reached.");
  });

async function getJson(url) {
  const answer = await ask(url, { headers: { Accept: "application/json" } });
  if (!answer.ok) throw new Error(await problemOf(answer));
  return answer.json();
}

async function problemOf(answer) {
  try {
    const { detail } = await answer.json();
    return typeof detail === "string" ? detail : "The request was refused.";
  } catch {
    return `The server answered ${answer.status}.`;
  }
}

function remember(map, key, make) {
  if (!map.has(key)) {
    const made = make();
    map.set(key, made);
    made.catch(() => map.get(key) === made && map.delete(key));
    if (map.size > KEPT) map.delete(map.keys().next().value);
  }
  return map.get(key);
}

const stateOf = (key) => remember(states, String(key), () => getJson(source.api(key)));

const bodyOf = (id, size) =>
  remember(bodies, `${id} ${size}`, async () => {
    const answer = await ask(`/api/images/${id}/pixels?size=${size}`);
    if (!answer.ok) throw new Error(await problemOf(answer));
    return parseBody(await answer.arrayBuffer());
  });

// `page.dataset.shown` is the key of the image that is before the reader: acts are taken while it is there. `unasked`:
// the page goes there by itself, while the reader looks at another image.
async function open(named, { push = true, message = "", unasked = false } = {}) {
  const key = String(named); // the page names it as text, the server as a number
  const turn = (showing += 1);
  delete page.dataset.shown;
  if (!bodies.size) showMessage("Loading …");
  heading = stateOf(key);
  let state;
  try {
    state = await heading;
  } catch (error) {
    return turn === showing ? stay(error) : undefined;
  }
  if (turn !== showing) return undefined;
  current = { ...state, key, wanting: null };
  clock = new ActiveClock();
  if (push) history.pushState({ key }, "", source.url(key));
  document.title = `${state.name} · cxrbatch`;
  fill(current);
  element("comment").value = drafts.get(key) ?? "";
  banner([message, othersUnsaved(key)].filter(Boolean).join(" "));
  try {
    const body = await bodyOf(state.id, "reduced");
    if (turn !== showing) return undefined;
    viewer.show(body);
    fillPresets();
    showMessage("");
  } catch (error) {
    if (turn !== showing) return undefined;
    viewer.clear();
    showMessage(error.message);
  }
  onScreen = key;
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
  if (current && onScreen !== current.key) {
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
    // What stands there already, such as that a reading was not saved, must stay.
    if (current === state && answer.open_by) banner(`${element("banner").textContent} ${answer.open_by} has this image open too.`.trim());
  } catch {
    // The act itself says when the server is away.
  }
}

async function post(url, document) {
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

// ---- acts: kept in the tab until the server has them, sent again under the same id ----

const pending = {
  all: () => JSON.parse(sessionStorage.getItem("pending") ?? "[]"),
  add: (act) => sessionStorage.setItem("pending", JSON.stringify([...pending.all(), act])),
  done: (id) => sessionStorage.setItem("pending", JSON.stringify(pending.all().filter((act) => act.document.act_id !== id))),
};
const doneActs = JSON.parse(sessionStorage.getItem("acts") ?? "[]"); // for undo: {place, key, name, shown, signature}
const sending = new Map(); // key of an image -> promise of its last act that is on its way
const unsaved = new Map(); // key of an image -> its name: its reading could not be saved, and it was not read again
let retrying = 0; // acts that were not kept at first, until the server has them or refuses them
const isHere = (done) => done.place === source.place;
const keepActs = () => sessionStorage.setItem("acts", JSON.stringify(doneActs.slice(-50)));

function forget(done) {
  const at = doneActs.indexOf(done);
  if (at >= 0) doneActs.splice(at, 1); // undone meanwhile, it is not there
  keepActs();
}

// Acts on one image go one after another: one that is tried again must not come after a later one and replace it.
function send(act) {
  const sent = Promise.resolve(sending.get(act.key))
    .catch(() => {})
    .then(() => deliver(act));
  sending.set(act.key, sent);
  const settled = () => sending.get(act.key) === sent && sending.delete(act.key);
  sent.then(settled, settled);
  return sent;
}

async function deliver(act) {
  let failed = 0;
  try {
    for (const wait of [...RETRIES_MS, 0]) {
      try {
        const answer = await post("/api/acts", act.document);
        pending.done(act.document.act_id);
        states.delete(act.key);
        return answer;
      } catch (error) {
        if (error.final || !wait) {
          pending.done(act.document.act_id);
          throw error;
        }
        if (!failed) {
          failed = 1;
          retrying += 1;
        }
        await new Promise((resolve) => setTimeout(resolve, wait));
      }
    }
    return undefined;
  } finally {
    retrying -= failed;
  }
}

// Only a page of images sends them again, in the same tab.
window.addEventListener("beforeunload", (event) => retrying && event.preventDefault());

function actOn(state, action, label = null) {
  const document = {
    act_id: crypto.randomUUID ? crypto.randomUUID() : randomId(),
    action,
    label,
    comment: element("comment").value,
    active_ms: clock.read(),
    shown: state.shown,
    signature: state.signature,
  };
  return { key: state.key, name: state.name, document };
}

function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function act(action, label = null) {
  if (!isShown()) return note(TOO_EARLY);
  const state = current;
  if (action === "accept" && !state.label) return note("There is no answer to accept.");
  if (state.closed) return note("This round is closed.");
  const made = actOn(state, action, label);
  pending.add(made);
  unsaved.delete(state.key);
  drafts.delete(state.key);
  element("comment").value = "";
  const done = { place: source.place, key: state.key, name: state.name, shown: state.shown, signature: state.signature };
  doneActs.push(done);
  keepActs();
  const sent = send(made);
  const late = lateness();
  let next = "unread" in state ? (state.unread ?? undefined) : state.next?.[0];
  // This state may be older than the last save: an image that was just read is not the next one.
  if ("unread" in state && doneActs.some((one) => isHere(one) && one.key === String(next))) next = undefined;
  if (next !== undefined) open(next);
  const turn = showing;
  let answer;
  try {
    answer = await sent;
  } catch (error) {
    forget(done);
    return comeBack(state, made, error);
  }
  unsaved.delete(state.key);
  if (answer.others?.length) note(`${state.name}: ${answer.others.join(", ")} has read it too (${answer.status}).`);
  if (next !== undefined) return undefined;
  await Promise.allSettled(sending.values()); // what is not saved yet would count as unread
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
  if (isCommentedBesides(state.key)) {
    banner(`${state.name} is not saved: ${error.message} The page goes back there after this comment.`);
    await new Promise((resolve) => element("comment").addEventListener("blur", resolve, { once: true }));
    if (!unsaved.has(state.key)) return;
  }
  open(state.key, { message, unasked: true });
}

// Whether a comment is being typed on another image: going to this one would put the rest of it there.
const isCommentedBesides = (key) => document.activeElement === element("comment") && current.key !== String(key);

// Of several readings that could not be saved the page comes back to one.
function othersUnsaved(key) {
  const names = [...unsaved].filter(([other]) => other !== key).map(([, name]) => name);
  return names.length ? `Not saved either: ${names.join(", ")}.` : "";
}

async function undo() {
  const done = doneActs.findLast(isHere);
  if (!current || (!done && !isShown())) return note(TOO_EARLY);
  const last = done ?? (current.mine ? current : null);
  if (!last) return note("There is nothing to undo.");
  const at = doneActs.indexOf(last);
  forget(last);
  const made = actOn({ ...last }, "withdraw");
  made.document.comment = "";
  pending.add(made);
  const turn = showing;
  const late = lateness();
  try {
    await send(made);
  } catch (error) {
    // The next undo is of this act still, not of an earlier one; unless it was never saved.
    if (!error.final && at >= 0 && !unsaved.has(last.key)) doneActs.splice(at, 0, last);
    keepActs();
    banner(`Not undone: ${error.message}`);
    return undefined;
  }
  unsaved.delete(last.key);
  states.delete(last.key);
  // The reader has gone on.
  if (turn !== showing || isCommentedBesides(last.key)) return note(`${last.name}: your reading is withdrawn.`);
  await open(last.key, { unasked: late() });
  note("Your reading of this image is withdrawn.");
  return undefined;
}

class ActiveClock {
  constructor() {
    this.total = 0;
    this.since = performance.now();
    this.hand = this.since;
  }

  touch() {
    const now = performance.now();
    if (this.since === null && !document.hidden) this.since = now;
    this.hand = now;
  }

  pause() {
    if (this.since === null) return;
    const end = Math.min(performance.now(), this.hand + IDLE_MS);
    this.total += Math.max(0, end - this.since);
    this.since = null;
  }

  read() {
    this.pause();
    this.touch();
    return Math.round(this.total);
  }
}

document.addEventListener("visibilitychange", () => (document.hidden ? clock?.pause() : clock?.touch()));
for (const name of ["pointermove", "keydown", "wheel"]) document.addEventListener(name, () => clock?.touch(), { passive: true });

// ---- the panel ----

const words = (text) => String(text ?? "").replaceAll("_", " ");

function make(tag, { className = "", text = "", ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function fill(state) {
  element("name").textContent = state.name;
  element("folder").textContent = state.folder ?? "";
  element("place").textContent = state.place ?? "";
  fillAnswer(state);
  fillBars(state.bars ?? []);
  fillChoices(state);
  fillRelated(state.related ?? []);
  fillHistory(state.history ?? []);
  const facts = element("facts");
  facts.hidden = !state.facts?.length;
  facts.querySelector("dl").replaceChildren(
    ...(state.facts ?? []).flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value })]),
  );
  element("previous").disabled = !state.previous?.length;
  element("next").disabled = !state.next?.length;
  for (const id of ["heat"]) element(id).hidden = state.blinded;
  setHeat(false);
}

function fillAnswer(state) {
  const answer = element("answer");
  if (state.blinded) {
    answer.replaceChildren(make("p", { className: "dim", text: "Blinded: what the model and others say is not shown." }));
  } else if (!state.label) {
    answer.replaceChildren(make("p", { text: "The model has no answer for this image." }));
  } else {
    const tags = [...(state.why ?? []), ...(state.flags ?? [])].map((word) => make("span", { className: "tag", text: words(word) }));
    answer.replaceChildren(
      make("p", { className: "says" }, make("span", { className: "dim", text: "Model" }), make("strong", { text: words(state.label) }), make("span", { className: "share", text: `${Math.round(100 * state.confidence)} %` })),
      make("p", { className: "why" }, make("span", { className: `chip ${state.decision}`, text: words(state.decision) }), ...tags),
    );
  }
  if (state.label_set?.length > 1) {
    answer.append(make("p", { className: "final" }, make("span", { className: "dim", text: "May be" }), make("span", { text: state.label_set.map(words).join(", ") })));
  }
  if (state.status) {
    const text = state.status.label ? words(state.status.label) : words(state.status.status);
    answer.append(make("p", { className: "final" }, make("span", { className: "dim", text: "Readers" }), make("span", { className: `chip ${state.status.status}`, text }), make("span", { className: "dim", text: state.status.by })));
  }
  if (state.mine) {
    answer.append(make("p", { className: "final" }, make("span", { className: "dim", text: "You" }), make("strong", { text: words(state.mine.label ?? state.mine.action) })));
  }
}

function fillBars(bars) {
  const holder = element("bars");
  holder.hidden = !bars.length;
  const rows = [];
  for (const bar of bars) {
    const track = make("div", { className: "track" });
    const filled = make("div", { className: "filled" });
    filled.style.width = `${100 * bar.probability}%`;
    track.append(filled);
    if (bar.threshold != null) {
      const mark = make("div", { className: "threshold", title: `reported from ${bar.threshold.toFixed(2)} on` });
      mark.style.left = `${100 * bar.threshold}%`;
      track.append(mark);
    }
    rows.push(make("div", { className: bar.in_set ? "bar-row in-set" : "bar-row" }, make("span", { text: words(bar.label) }), track, make("span", { className: "number", text: bar.probability.toFixed(2) })));
  }
  holder.replaceChildren(...rows);
}

function fillChoices(state) {
  const buttons = [];
  if (!state.blinded && state.label) {
    const accept = make("button", { className: "accept" }, make("kbd", { text: "a" }), ` Accept ${words(state.label)}`);
    accept.addEventListener("click", () => act("accept"));
    buttons.push(accept);
  }
  for (const choice of state.choices) {
    const button = make("button", {}, make("kbd", { text: choice.key }), ` ${words(choice.label)}`);
    if (state.mine?.label === choice.label) button.setAttribute("aria-pressed", "true");
    button.addEventListener("click", () => act("override", choice.label));
    buttons.push(button);
  }
  element("choices").replaceChildren(...buttons);
}

function fillRelated(related) {
  const holder = element("related");
  holder.hidden = !related.length;
  const links = related.map((other) => {
    const text = [other.study_date || "no date", other.view, other.same_study ? "this study" : "same patient"].filter(Boolean).join(" · ");
    const link = make("a", { href: relatedAddress(other.id), text });
    return make("li", {}, link);
  });
  holder.replaceChildren(make("h3", { text: "Also of this study or patient" }), make("ul", {}, ...links));
}

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

function fillHistory(acts) {
  const holder = element("history");
  holder.hidden = !acts.length;
  const rows = acts.map((one) => {
    const said = one.action === "withdraw" ? "withdrawn" : [one.adjudication ? "adjudicated" : one.action, words(one.label)].filter(Boolean).join(" ");
    const shown = one.blinded ? "blinded" : one.shown ? `shown ${words(one.shown)} ${Math.round(100 * one.shown_confidence)} %` : "nothing shown";
    return make("li", {}, make("strong", { text: one.reader }), ` ${said} `, make("span", { className: "dim", text: `${one.at} · ${shown}` }), ...(one.comment ? [make("q", { text: one.comment })] : []));
  });
  holder.replaceChildren(make("h3", { text: "History" }), make("ol", {}, ...rows));
}

function fillPresets() {
  const select = element("preset");
  select.replaceChildren(...viewer.presets().map((preset, number) => make("option", { value: number, text: preset.name })));
}

let standing = ""; // said until the image changes
let noted = ""; // said for a while, in front of it
function showMessage(text) {
  standing = text;
  say();
}

function say() {
  const message = element("message");
  message.textContent = noted || standing;
  message.hidden = !(noted || standing);
}

function banner(text) {
  element("banner").textContent = text;
  element("banner").hidden = !text;
}

let noteTimer = 0;
function note(text) {
  noted = text;
  say();
  clearTimeout(noteTimer);
  if (text) noteTimer = setTimeout(() => note(""), 4000);
}

// ---- the view ----

function viewChanged() {
  const readout = element("readout");
  if (!viewer.image) {
    readout.textContent = "";
    return;
  }
  const { center, width } = viewer.current();
  const figure = (number) => (Math.abs(number) < 10 ? number.toFixed(2) : Math.round(number));
  readout.textContent = `C ${figure(center)}  W ${figure(width)}  ${Math.round(100 * viewer.zoom * devicePixelRatio)} %${viewer.image.step > 1 ? "  reduced" : ""}`;
  if (viewer.wantsMore() && current && onScreen === current.key && current.wanting !== current.id) {
    const { id, key } = current;
    current.wanting = id;
    bodyOf(id, "full")
      .then((body) => onScreen === key && viewer.show(body, { keep: true }))
      .catch((error) => note(error.message));
  }
}

let heatOn = false;
async function setHeat(on) {
  heatOn = on;
  element("heat").setAttribute("aria-pressed", String(on));
  element("heat-share").hidden = !on;
  if (!on) return viewer.setOverlay(null, 0);
  const state = current;
  note("The heat map is being made …");
  try {
    const overlay = await remember(bodies, `${state.id} overlay`, () => getJson(`/api/images/${state.id}/overlay`));
    if (current === state && heatOn) {
      viewer.setOverlay(overlay, element("heat-share").value / 100);
      note(`What moved the score for ${words(overlay.label)}; not where disease is.`);
    }
  } catch (error) {
    if (current !== state) return undefined;
    setHeat(false);
    note(error.message);
  }
  return undefined;
}

element("heat-share").addEventListener("input", (event) => viewer.setOverlay(viewer.overlay, event.target.value / 100));
element("preset").addEventListener("change", (event) => {
  viewer.setWindow(viewer.presets()[event.target.value].window);
  element("canvas").focus();
});

function nextPreset() {
  const select = element("preset");
  select.value = (Number(select.value) + 1) % select.options.length;
  viewer.setWindow(viewer.presets()[select.value].window);
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

const KEYS = {
  a: () => act("accept"),
  f: () => act("flag"),
  s: () => act("skip"),
  z: undo,
  i: () => viewer.invert(),
  h: () => isShown() && !current.blinded && setHeat(!heatOn),
  w: nextPreset,
  n: () => step("next"),
  p: () => step("previous"),
  g: nextRelated,
  0: () => viewer.fit(),
  r: () => viewer.real(),
  "+": () => viewer.zoomTo(viewer.zoom * 1.25, viewer.width / 2, viewer.height / 2),
  "=": () => viewer.zoomTo(viewer.zoom * 1.25, viewer.width / 2, viewer.height / 2),
  "-": () => viewer.zoomTo(viewer.zoom / 1.25, viewer.width / 2, viewer.height / 2),
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

for (const [id, run] of Object.entries({ invert: KEYS.i, fit: KEYS[0], real: KEYS.r, heat: KEYS.h, help: KEYS["?"], next: KEYS.n, previous: KEYS.p })) {
  element(id).addEventListener("click", run);
}
for (const button of document.querySelectorAll("[data-act]")) {
  button.addEventListener("click", () => (button.dataset.act === "undo" ? undo() : act(button.dataset.act)));
}
element("comment").addEventListener("input", (event) => current && drafts.set(current.key, event.target.value));
// The second click of a double click would act on the next image, which is there by then.
for (const holder of [element("choices"), document.querySelector(".others")]) {
  holder.addEventListener(
    "click",
    (event) => {
      if (event.detail < 2) return;
      event.stopPropagation();
      note("A double click counts once.");
    },
    { capture: true },
  );
}
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
  for (const act of unsent) {
    try {
      await send(act);
    } catch (error) {
      lost.push(`An earlier reading (${act.name ?? "of another page"}) was not saved: ${error.message}`);
    }
  }
  await open(source.first, { push: false, message: lost.join(" ") });
}

start();
