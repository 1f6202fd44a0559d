// The panel beside the image: what the model and the readers say of it, the answers to choose from, what is known.

import { element, make, words } from "/static/dom.js";
import { showOpenBy } from "/static/messages.js";

// `relatedAddress`: where another image of the patient is shown.
export function fillPanel(state, relatedAddress) {
  element("name").textContent = state.name;
  element("folder").textContent = state.folder ?? "";
  element("place").textContent = state.place ?? "";
  showOpenBy("");
  fillAnswer(state);
  fillBars(state.bars ?? []);
  fillChoices(state);
  fillRelated(state.related ?? [], relatedAddress);
  fillHistory(state.history ?? []);
  const facts = element("facts");
  facts.hidden = !state.facts?.length;
  facts.querySelector("dl").replaceChildren(
    ...(state.facts ?? []).flatMap(([name, value]) => [make("dt", { text: name }), make("dd", { text: value })]),
  );
  element("previous").disabled = !state.previous?.length;
  element("next").disabled = !state.next?.length;
}

const percent = (share) => `${Math.round(100 * share)} %`;
const line = (name, ...said) => make("p", { className: "final" }, make("span", { className: "dim", text: name }), ...said);

function fillAnswer(state) {
  const answer = element("answer");
  if (state.blinded) {
    answer.replaceChildren(make("p", { className: "dim", text: "Blinded: what the model and others say is not shown." }));
  } else if (!state.label) {
    answer.replaceChildren(make("p", { text: "The model has no answer for this image." }));
  } else {
    const reasons = new Set([...(state.why ?? []), ...(state.flags ?? [])]); // a flag may be the reason
    const tags = [...reasons].map((word) => make("span", { className: "tag", text: words(word) }));
    answer.replaceChildren(
      make(
        "p",
        { className: "says" },
        make("span", { className: "dim", text: "Model" }),
        make("strong", { text: words(state.label) }),
        make("span", { className: "share", text: percent(state.confidence) }),
      ),
      make("p", { className: "why" }, make("span", { className: `chip ${state.decision}`, text: words(state.decision) }), ...tags),
    );
  }
  if (state.label_set?.length > 1) answer.append(line("May be", make("span", { text: state.label_set.map(words).join(", ") })));
  if (state.status) {
    const { status, label, by } = state.status;
    answer.append(line("Readers", make("span", { className: `chip ${status}`, text: words(label ?? status) }), make("span", { className: "dim", text: by })));
  }
  if (state.mine) answer.append(line("You", make("strong", { text: words(state.mine.label ?? state.mine.action) })));
}

function fillBars(bars) {
  const holder = element("bars");
  holder.hidden = !bars.length;
  const rows = bars.map((bar) => {
    const filled = make("div", { className: "filled" });
    filled.style.width = `${100 * bar.probability}%`;
    const track = make("div", { className: "track" }, filled);
    if (bar.threshold != null) {
      const mark = make("div", { className: "threshold", title: `reported from ${bar.threshold.toFixed(2)} on` });
      mark.style.left = `${100 * bar.threshold}%`;
      track.append(mark);
    }
    const number = make("span", { className: "number", text: bar.probability.toFixed(2) });
    return make("div", { className: bar.in_set ? "bar-row in-set" : "bar-row" }, make("span", { text: words(bar.label) }), track, number);
  });
  holder.replaceChildren(...rows);
}

function fillChoices(state) {
  const buttons = state.choices.map(({ key, label }) => {
    const button = make("button", { "data-act": "override", "data-label": label }, make("kbd", { text: key }), ` ${words(label)}`);
    if (state.mine?.label === label) button.setAttribute("aria-pressed", "true");
    return button;
  });
  if (!state.blinded && state.label) {
    buttons.unshift(make("button", { className: "accept", "data-act": "accept" }, make("kbd", { text: "a" }), ` Accept ${words(state.label)}`));
  }
  element("choices").replaceChildren(...buttons);
}

function fillRelated(related, relatedAddress) {
  const holder = element("related");
  holder.hidden = !related.length;
  const links = related.map((other) => {
    const text = [other.name, other.study_date || "no date", other.view, other.same_study ? "this study" : "same patient"].filter(Boolean).join(" · ");
    return make("li", {}, make("a", { href: relatedAddress(other.id), text }));
  });
  holder.replaceChildren(make("h3", { text: "Also of this study or patient" }), make("ul", {}, ...links));
}

function fillHistory(acts) {
  const holder = element("history");
  holder.hidden = !acts.length;
  const rows = acts.map((one) => {
    const said = one.action === "withdraw" ? "withdrawn" : [one.adjudication ? "adjudicated" : one.action, words(one.label)].filter(Boolean).join(" ");
    const shown = one.blinded ? "blinded" : one.shown ? `shown ${words(one.shown)} ${percent(one.shown_confidence)}` : "nothing shown";
    const comment = one.comment ? [make("q", { text: one.comment })] : [];
    return make("li", {}, make("strong", { text: one.reader }), ` ${said} `, make("span", { className: "dim", text: `${one.at} · ${shown}` }), ...comment);
  });
  holder.replaceChildren(make("h3", { text: "History" }), make("ol", {}, ...rows));
}
