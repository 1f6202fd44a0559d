// The image in its viewer, with presets of the window, the heat map, and the whole resolution when it is wanted.

import { element, make, words } from "/static/dom.js";
import { note, showMessage } from "/static/messages.js";
import { bodyOf, overlayOf } from "/static/server.js";
import { Viewer } from "/static/viewer.js";

let image = null; // state of the image that the page is at
let there = false; // whether its pixels, or why there are none, are what the viewer shows
let wantsFull = false; // whether its whole resolution was asked for
let heatOn = false;
let making = false; // whether the note says that the heat map is being made
export const viewer = new Viewer(element("canvas"), viewChanged);

// The page is at this image; its pixels come with `show`.
export function expect(state) {
  image = state;
  there = wantsFull = false;
  element("heat").hidden = state.blinded;
  setHeat(false);
}

export function show(body) {
  there = true;
  viewer.show(body);
  element("preset").replaceChildren(...viewer.presets().map(({ name }, number) => make("option", { value: number, text: name })));
  showMessage("");
}

export function showWhyNot(sentence) {
  there = true;
  viewer.clear();
  showMessage(sentence);
}

export const isThere = () => there;

function viewChanged() {
  const readout = element("readout");
  if (!viewer.image) {
    readout.textContent = "";
    return;
  }
  const { center, width } = viewer.current();
  const figure = (number) => (Math.abs(number) < 10 ? number.toFixed(2) : Math.round(number));
  readout.textContent = `C ${figure(center)}  W ${figure(width)}  ${Math.round(100 * viewer.zoom * devicePixelRatio)} %${viewer.image.step > 1 ? "  reduced" : ""}`;
  if (viewer.wantsMore() && there && !wantsFull) {
    wantsFull = true;
    const state = image;
    bodyOf(state.id, "full")
      .then((body) => image === state && viewer.show(body, { keep: true }))
      .catch((error) => note(error.message));
  }
}

async function setHeat(on) {
  heatOn = on;
  element("heat").setAttribute("aria-pressed", String(on));
  element("heat-share").hidden = !on;
  if (!on) {
    if (making) note("");
    making = false;
    return viewer.setOverlay(null, 0);
  }
  const state = image;
  making = true;
  note("The heat map is being made …", { stays: true });
  try {
    const overlay = await overlayOf(state.id);
    if (image === state && heatOn) {
      making = false;
      viewer.setOverlay(overlay, element("heat-share").value / 100);
      note(`What moved the score for ${words(overlay.label)}; not where disease is.`);
    }
  } catch (error) {
    if (image !== state) return undefined;
    making = false;
    setHeat(false);
    note(error.message);
  }
  return undefined;
}

function choosePreset(number) {
  element("preset").value = number;
  viewer.setWindow(viewer.presets()[number].window);
}

element("heat-share").addEventListener("input", (event) => viewer.setOverlay(viewer.overlay, event.target.value / 100));
element("preset").addEventListener("change", (event) => {
  choosePreset(event.target.value);
  element("canvas").focus();
});

const zoomBy = (factor) => viewer.zoomTo(viewer.zoom * factor, viewer.width / 2, viewer.height / 2);

export const DISPLAY_KEYS = {
  i: () => viewer.invert(),
  h: () => there && !image.blinded && setHeat(!heatOn),
  w: () => viewer.image && choosePreset((Number(element("preset").value) + 1) % viewer.presets().length),
  0: () => viewer.fit(),
  r: () => viewer.real(),
  "+": () => zoomBy(1.25),
  "=": () => zoomBy(1.25),
  "-": () => zoomBy(1 / 1.25),
};

const ARROWS = { ArrowLeft: [-20, 0], ArrowRight: [20, 0], ArrowUp: [0, -20], ArrowDown: [0, 20] };

// As a drag of so many CSS pixels; a key that is held goes on.
document.addEventListener("keydown", (event) => {
  const way = ARROWS[event.key];
  const elsewhere = event.target.closest("input, textarea, select, dialog[open]");
  if (!way || elsewhere || !viewer.image || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.shiftKey) viewer.move(...way);
  else viewer.adjust(...way);
  event.preventDefault();
});

for (const [id, key] of Object.entries({ invert: "i", fit: "0", real: "r", heat: "h" })) {
  element(id).addEventListener("click", DISPLAY_KEYS[key]);
}
