// From the server's bytes to greys: what the viewer draws, without a screen.

const RAMP = heatRamp();

// review/pixels.py (as_body) says how the bytes are laid out.
export function parseBody(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const grey = new Uint8Array(buffer, 4 + length, head.greys);
  const samples = new Uint16Array(buffer, 4 + length + head.greys, head.rows * head.columns);
  return { ...head, grey, samples };
}

// The screen's colour (RGBA, little-endian) of each sample: through a window {low, high}, or as the image was scored (null).
export function greyTable(image, window, inverted) {
  const table = new Uint32Array(65536);
  const top = image.grey.length - 1;
  const flipped = window && image.grey[0] > image.grey[top];
  const span = window ? Math.max(window.high - window.low, 1e-6) : 1;
  for (let sample = 0; sample <= 65535; sample += 1) {
    let grey;
    if (window) {
      const part = Math.min(1, Math.max(0, (sample - window.low) / span));
      grey = Math.round(255 * (flipped ? 1 - part : part));
    } else {
      grey = image.grey[Math.min(sample, top)];
    }
    if (inverted) grey = 255 - grey;
    table[sample] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
  }
  return table;
}

// The window that comes closest to the grey table: from the last black sample to the first white one.
export function impliedWindow(image) {
  const { grey } = image;
  const rising = grey[0] <= grey[grey.length - 1];
  const dark = rising ? 4 : 251;
  const bright = rising ? 251 : 4;
  let low = 0;
  let high = grey.length - 1;
  while (low < high && (rising ? grey[low] <= dark : grey[low] >= dark)) low += 1;
  while (high > low && (rising ? grey[high] >= bright : grey[high] <= bright)) high -= 1;
  return { low, high: Math.max(high, low + 1) };
}

// Shares of the samples' distribution: at(0.5) is the median.
export function statistics(image) {
  const counts = new Uint32Array(65536);
  const step = Math.max(1, Math.floor(image.samples.length / 250000));
  let total = 0;
  for (let i = 0; i < image.samples.length; i += step) {
    counts[image.samples[i]] += 1;
    total += 1;
  }
  const at = (share) => {
    let left = share * total;
    for (let sample = 0; sample < 65536; sample += 1) {
      left -= counts[sample];
      if (left < 0) return sample;
    }
    return 65535;
  };
  return { at, least: at(0), most: at(0.99999) };
}

export function heatCanvas(overlay) {
  const canvas = document.createElement("canvas");
  canvas.width = overlay.columns;
  canvas.height = overlay.rows;
  const pixels = new ImageData(overlay.columns, overlay.rows);
  const out = new Uint32Array(pixels.data.buffer);
  overlay.values.forEach((value, i) => {
    out[i] = RAMP[Math.round(255 * Math.min(1, Math.max(0, value)))];
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}

// Transparent, then violet, red, yellow: brighter is more.
function heatRamp() {
  const stops = [[0, 60, 20, 110, 0], [0.25, 110, 30, 140, 110], [0.55, 220, 60, 70, 200], [0.8, 250, 150, 30, 235], [1, 255, 240, 130, 255]];
  const ramp = new Uint32Array(256);
  for (let i = 0; i < 256; i += 1) {
    const part = i / 255;
    const k = Math.max(1, stops.findIndex((stop) => stop[0] >= part));
    const [from, to] = [stops[k - 1], stops[k]];
    const share = (part - from[0]) / (to[0] - from[0]);
    const [r, g, b, a] = [1, 2, 3, 4].map((c) => Math.round(from[c] + (to[c] - from[c]) * share));
    ramp[i] = ((a << 24) | (b << 16) | (g << 8) | r) >>> 0;
  }
  return ramp;
}
