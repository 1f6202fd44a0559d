// What the reader does: kept in the tab until the server has it, and sent again under the same id.

import { post } from "/static/server.js";

const RETRIES_MS = [300, 1000, 3000, 8000];
const IDLE_MS = 60_000; // without a hand on mouse or keyboard nobody is reading
const KEPT = 50; // acts that can be undone after the page was loaded again

// {key, name, document}: `document` goes to the server, which takes an act_id once.
export function newAct(state, action, { label = null, comment = "", activeMs }) {
  const document = {
    act_id: crypto.randomUUID ? crypto.randomUUID() : randomId(),
    action,
    label,
    comment,
    active_ms: activeMs,
    shown: state.shown,
    signature: state.signature,
  };
  return { key: state.key, name: state.name, document };
}

function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// ---- acts that the server does not have yet ----

export const pending = {
  all: () => JSON.parse(sessionStorage.getItem("pending") ?? "[]"),
  add: (act) => sessionStorage.setItem("pending", JSON.stringify([...pending.all(), act])),
  done: (id) => sessionStorage.setItem("pending", JSON.stringify(pending.all().filter((act) => act.document.act_id !== id))),
};
const sending = new Map(); // key of an image -> promise of its last act that is on its way
let retrying = 0; // acts that were not kept at first, until the server has them or refuses them

// Acts on one image go one after another: one that is tried again must not come after a later one and replace it.
export function send(act) {
  const sent = Promise.resolve(sending.get(act.key))
    .catch(() => {})
    .then(() => deliver(act));
  sending.set(act.key, sent);
  const settled = () => sending.get(act.key) === sent && sending.delete(act.key);
  sent.then(settled, settled);
  return sent;
}

export const allSent = () => Promise.allSettled(sending.values());

async function deliver(act) {
  let failed = 0;
  try {
    for (const wait of [...RETRIES_MS, 0]) {
      try {
        const answer = await post("/api/acts", act.document);
        pending.done(act.document.act_id);
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

// ---- acts that can be undone: {place, key, name, shown, signature} ----

const doneActs = JSON.parse(sessionStorage.getItem("acts") ?? "[]");
const keep = () => sessionStorage.setItem("acts", JSON.stringify(doneActs.slice(-KEPT)));

export const done = {
  last: (place) => doneActs.findLast((one) => one.place === place),
  has: (place, key) => doneActs.some((one) => one.place === place && one.key === key),
  add(one) {
    doneActs.push(one);
    keep();
  },
  // Its place among the others, or -1 where it was undone meanwhile.
  remove(one) {
    const at = doneActs.indexOf(one);
    if (at >= 0) doneActs.splice(at, 1);
    keep();
    return at;
  },
  putBack(one, at) {
    doneActs.splice(at, 0, one);
    keep();
  },
};

// ---- how long an image was read ----

export class ActiveClock {
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
