// A canvas for uint16 images: window and level, invert, zoom, pan, an overlay. Knows nothing of reviews.

import { greyTable, heatCanvas, impliedWindow, statistics } from "/static/pixels.js";

export class Viewer {
  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.onChange = onChange;
    this.image = null;
    this.drawn = document.createElement("canvas");
    this.overlay = null;
    this.overlayShare = 0;
    this.inverted = false;
    this.window = null; // {low, high} in samples; null: the grey table of the scoring
    this.zoom = 1;
    this.x = 0; // the image's top left corner on the canvas, in CSS pixels
    this.y = 0;
    this.fitted = true;
    this.pointers = new Map();
    this._listen();
    new ResizeObserver(() => this._resize()).observe(canvas.parentElement);
    this._resize();
  }

  // A new image starts fitted; the same image in full resolution keeps its place and window.
  show(image, { keep = false } = {}) {
    const before = this.image;
    this.image = image;
    if (!keep || !before) {
      this.window = null;
      this.inverted = false;
      this.overlay = null;
      this.fit();
    } else if (this.window) {
      const value = (sample) => (sample * before.slope + before.intercept - image.intercept) / image.slope;
      this.window = { low: value(this.window.low), high: value(this.window.high) };
    }
    this.stats = statistics(image);
    this._render();
  }

  clear() {
    this.image = null;
    this._paint();
  }

  presets() {
    const { image, stats } = this;
    if (!image) return [];
    const list = [{ name: "As scored", window: null }];
    if (image.window) {
      const [center, width] = image.window;
      const sample = (value) => (value - image.intercept) / image.slope;
      list.push({ name: "Header window", window: { low: sample(center - width / 2), high: sample(center + width / 2) } });
    }
    list.push({ name: "Full range", window: { low: stats.least, high: stats.most } });
    list.push({ name: "Lungs", window: { low: stats.at(0.01), high: stats.at(0.7) } });
    list.push({ name: "Mediastinum", window: { low: stats.at(0.35), high: stats.at(0.995) } });
    return list;
  }

  setWindow(window) {
    this.window = window;
    this._render();
  }

  invert() {
    this.inverted = !this.inverted;
    this._render();
  }

  setOverlay(overlay, share) {
    this.overlay = overlay && overlay.values ? { ...overlay, canvas: heatCanvas(overlay) } : overlay;
    this.overlayShare = share;
    this._paint();
  }

  fit() {
    if (!this.image) return;
    const { full_rows: rows, full_columns: columns } = this.image;
    this.zoom = Math.min(this.width / columns, this.height / rows);
    this.x = (this.width - columns * this.zoom) / 2;
    this.y = (this.height - rows * this.zoom) / 2;
    this.fitted = true;
    this._paint();
  }

  real() {
    this.zoomTo(1 / devicePixelRatio, this.width / 2, this.height / 2);
  }

  zoomTo(zoom, x, y) {
    if (!this.image) return;
    zoom = Math.min(16, Math.max(0.02, zoom));
    const factor = zoom / this.zoom;
    this.x = x - (x - this.x) * factor;
    this.y = y - (y - this.y) * factor;
    this.zoom = zoom;
    this.fitted = false;
    this._paint();
  }

  // dx, dy: CSS pixels.
  move(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.fitted = false;
    this._paint();
  }

  // The window: dx CSS pixels wider, its level dy higher.
  adjust(dx, dy) {
    const window = this.window ?? impliedWindow(this.image);
    const speed = Math.max(this.stats.most - this.stats.least, 8) / 600;
    const center = (window.low + window.high) / 2 + dy * speed;
    const width = Math.max(window.high - window.low + dx * speed * 1.5, 2 * speed);
    this.window = { low: center - width / 2, high: center + width / 2 };
    this._render();
  }

  // Whether the screen shows more than the samples hold.
  wantsMore() {
    return Boolean(this.image) && this.image.step > 1 && this.zoom * devicePixelRatio * this.image.step > 1.25;
  }

  current() {
    const { image } = this;
    const window = this.window ?? impliedWindow(image);
    return {
      center: ((window.low + window.high) / 2) * image.slope + image.intercept,
      width: Math.abs((window.high - window.low) * image.slope),
    };
  }

  _resize() {
    const box = this.canvas.parentElement.getBoundingClientRect();
    this.width = box.width;
    this.height = box.height;
    this.canvas.width = Math.round(box.width * devicePixelRatio);
    this.canvas.height = Math.round(box.height * devicePixelRatio);
    if (this.fitted) this.fit();
    else this._paint();
  }

  // Samples to grey, into a canvas of the samples' size. A 2048 x 2500 image takes some 20 ms.
  _render() {
    const { image } = this;
    if (!image) return;
    const table = greyTable(image, this.window, this.inverted);
    const pixels = new ImageData(image.columns, image.rows);
    const out = new Uint32Array(pixels.data.buffer);
    const { samples } = image;
    for (let i = 0; i < out.length; i += 1) out[i] = table[samples[i]];
    this.drawn.width = image.columns;
    this.drawn.height = image.rows;
    this.drawn.getContext("2d").putImageData(pixels, 0, 0);
    this._paint();
  }

  _paint() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this._draw();
      this.onChange();
    });
  }

  _draw() {
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    const { image } = this;
    if (!image) return;
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    const scale = this.zoom * image.step;
    context.imageSmoothingEnabled = scale * devicePixelRatio < 3;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.drawn, this.x, this.y, image.columns * scale, image.rows * scale);
    if (this.overlay && this.overlay.canvas && this.overlayShare > 0) {
      // The map covers the model's input: a square around the image where that was padded.
      const { full_rows: rows, full_columns: columns } = image;
      const side = Math.max(rows, columns);
      const [width, height] = this.overlay.fit === "pad" ? [side, side] : [columns, rows];
      context.save();
      context.beginPath();
      context.rect(this.x, this.y, columns * this.zoom, rows * this.zoom);
      context.clip();
      context.globalAlpha = this.overlayShare;
      context.imageSmoothingEnabled = true;
      const x = this.x - ((width - columns) / 2) * this.zoom;
      const y = this.y - ((height - rows) / 2) * this.zoom;
      context.drawImage(this.overlay.canvas, x, y, width * this.zoom, height * this.zoom);
      context.restore();
    }
  }

  _listen() {
    const { canvas } = this;
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("dblclick", () => this.fit());
    canvas.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        const box = canvas.getBoundingClientRect();
        const factor = Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015));
        this.zoomTo(this.zoom * factor, event.clientX - box.left, event.clientY - box.top);
      },
      { passive: false },
    );
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      this.moving = event.button !== 0 || event.shiftKey || this.pointers.size > 1;
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    }
    canvas.addEventListener("pointermove", (event) => this._drag(event));
  }

  _drag(event) {
    const last = this.pointers.get(event.pointerId);
    if (!last || !this.image) return;
    const [dx, dy] = [event.clientX - last.x, event.clientY - last.y];
    if (this.pointers.size === 2) {
      const [other] = [...this.pointers.entries()].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      const box = this.canvas.getBoundingClientRect();
      const before = Math.hypot(last.x - other.x, last.y - other.y);
      const after = Math.hypot(event.clientX - other.x, event.clientY - other.y);
      const middle = [(event.clientX + other.x) / 2 - box.left, (event.clientY + other.y) / 2 - box.top];
      if (before > 10) this.zoomTo((this.zoom * after) / before, ...middle);
    }
    if (this.moving) this.move(dx / this.pointers.size, dy / this.pointers.size);
    else this.adjust(dx, dy);
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
  }
}
