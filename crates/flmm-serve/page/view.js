// What is seen: the picture with its masks, and answers whose words can be pointed at.

import { colour, decode } from "./masks.js";

/** The picture is drawn at least and at most so long, in pixels. */
const SMALLEST = 720;
const LARGEST = 1600;

/** The picture and what lies on it. */
export class Stage {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.layers = new WeakMap();
    this.picture = null;
  }

  /** Shows another picture. */
  show(picture) {
    this.picture = picture;
    const side = Math.max(picture.width, picture.height);
    const scale = side < SMALLEST ? SMALLEST / side : Math.min(1, LARGEST / side);
    this.canvas.width = Math.max(1, Math.round(picture.width * scale));
    this.canvas.height = Math.max(1, Math.round(picture.height * scale));
  }

  /** Draws the picture with `masks`, `[{mask, index, strength}]`, and `heat`, `{map, attention}`, on it. */
  draw({ masks = [], heat = null, opacity = 0.5, point = null }) {
    const { canvas, context, picture } = this;
    if (!picture) return;
    context.imageSmoothingEnabled = true;
    context.globalAlpha = 1;
    context.drawImage(picture.bitmap, 0, 0, canvas.width, canvas.height);
    if (heat) {
      context.globalAlpha = Math.min(1, opacity * 1.3);
      const { picture: [x0, y0, width, height], rows, columns } = heat.attention;
      const layer = heatLayer(heat.map, rows, columns);
      context.drawImage(
        layer, x0 * columns, y0 * rows, width * columns, height * rows, 0, 0, canvas.width, canvas.height,
      );
    }
    context.imageSmoothingEnabled = false;
    for (const { mask, index, strength } of masks) {
      context.globalAlpha = opacity * strength;
      context.drawImage(this.#layer(mask, index), 0, 0, canvas.width, canvas.height);
    }
    context.globalAlpha = 1;
    if (point) cross(context, point.x * canvas.width, point.y * canvas.height);
  }

  /** Whether `mask` covers the point `x`, `y`, in shares of the picture. */
  covers(mask, x, y) {
    const { width, height, bits } = this.#decoded(mask).decoded;
    return bits[Math.min(height - 1, Math.floor(y * height)) * width + Math.min(width - 1, Math.floor(x * width))] === 1;
  }

  #decoded(mask) {
    let known = this.layers.get(mask);
    if (!known) {
      known = { decoded: decode(mask), layer: null };
      this.layers.set(mask, known);
    }
    return known;
  }

  #layer(mask, index) {
    const known = this.#decoded(mask);
    if (!known.layer) {
      const { width, height, bits } = known.decoded;
      known.layer = new OffscreenCanvas(width, height);
      const data = new ImageData(width, height);
      const [red, green, blue] = colour(index);
      bits.forEach((bit, i) => { if (bit) data.data.set([red, green, blue, 255], i * 4); });
      known.layer.getContext("2d").putImageData(data, 0, 0);
    }
    return known.layer;
  }
}

/** A map as colours, dark blue over green to yellow, the lowest value clear. */
function heatLayer(map, rows, columns) {
  const ramp = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
  const low = Math.min(...map);
  const span = Math.max(...map) - low || 1;
  const data = new ImageData(columns, rows);
  map.forEach((value, i) => {
    const level = (value - low) / span;
    const place = level * (ramp.length - 1);
    const [a, b] = [ramp[Math.floor(place)], ramp[Math.ceil(place)]];
    const mixed = a.map((part, channel) => part + (b[channel] - part) * (place % 1));
    data.data.set([...mixed, 90 + 165 * level], i * 4);
  });
  const layer = new OffscreenCanvas(columns, rows);
  layer.getContext("2d").putImageData(data, 0, 0);
  return layer;
}

function cross(context, x, y) {
  for (const [style, width] of [["#000", 5], ["#fff", 2]]) {
    context.strokeStyle = style;
    context.lineWidth = width;
    context.beginPath();
    context.moveTo(x - 14, y);
    context.lineTo(x + 14, y);
    context.moveTo(x, y - 14);
    context.lineTo(x, y + 14);
    context.stroke();
  }
}

/** A turn of the conversation; returns its element. */
export function turn(log, who, text) {
  const element = document.createElement("div");
  element.className = `turn ${who}`;
  element.textContent = text;
  log.append(element);
  log.scrollTop = log.scrollHeight;
  return element;
}

/**
 * Writes an answer into `element`: words that can be pointed at, phrases as buttons in the colours of their masks.
 * `on.word(start, end)` and `on.phrase(number)` are called for what is pointed at, `on.leave()` afterwards.
 */
export function write(element, answer, on) {
  element.replaceChildren();
  // Positions count Unicode scalar values, which a JavaScript string does not.
  const characters = Array.from(answer.text);
  const cut = (start, end) => characters.slice(start, end).join("");
  let at = 0;
  const order = answer.annotations.map((annotation, number) => ({ ...annotation, number }));
  order.sort((a, b) => a.start - b.start);
  for (const { start, end, number, phrase } of order) {
    if (start < at) continue;
    words(element, cut(at, start), at, on);
    const button = document.createElement("button");
    button.type = "button";
    button.className = "phrase";
    button.dataset.number = number;
    button.style.setProperty("--c", `rgb(${colour(number).join(" ")})`);
    button.setAttribute("aria-label", `${phrase}, phrase ${number + 1}: show its mask`);
    button.setAttribute("aria-pressed", "false");
    words(button, cut(start, end), start, on);
    button.addEventListener("pointerenter", () => on.phrase(number));
    button.addEventListener("pointerleave", on.leave);
    button.addEventListener("focus", () => on.phrase(number));
    button.addEventListener("blur", on.leave);
    button.addEventListener("click", () => on.pin(number));
    element.append(button);
    at = end;
  }
  words(element, cut(at), at, on);
}

/** Appends `text`, whose first character has number `start`, word by word. */
function words(element, text, start, on) {
  let at = start;
  for (const piece of text.split(/(\s+)/u)) {
    const end = at + Array.from(piece).length;
    if (/\S/u.test(piece)) {
      const word = document.createElement("span");
      word.className = "word";
      word.dataset.start = at;
      word.dataset.end = end;
      word.textContent = piece;
      const [from, to] = [at, end];
      word.addEventListener("pointerenter", () => on.word(from, to));
      word.addEventListener("pointerleave", on.leave);
      element.append(word);
    } else {
      element.append(piece);
    }
    at = end;
  }
}
