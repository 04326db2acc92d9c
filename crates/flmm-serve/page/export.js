// Files for other programs.

import { decode } from "./masks.js";

/** Saves `blob` under `name`. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** A blob of JSON. */
export function json(value) {
  return new Blob([JSON.stringify(value, null, 1)], { type: "application/json" });
}

/** An answer as a COCO dataset of one picture; the phrases are its categories. */
export function coco(picture, answer) {
  const names = [...new Set(answer.annotations.map(({ phrase }) => phrase))];
  return {
    info: { description: answer.text },
    images: [{ id: 1, file_name: picture.name, width: picture.width, height: picture.height }],
    categories: names.map((name, number) => ({ id: number + 1, name })),
    annotations: answer.annotations.map((annotation, number) => ({
      id: number + 1,
      image_id: 1,
      category_id: names.indexOf(annotation.phrase) + 1,
      bbox: annotation.bbox,
      area: annotation.area,
      iscrowd: 0,
      segmentation: annotation.segmentation,
      score: annotation.score,
      caption_span: [annotation.start, annotation.end],
    })),
  };
}

/** An answer as a Label Studio task with brush labels as predictions. */
export function labelStudio(picture, answer) {
  return [{
    data: { image: picture.name, text: answer.text },
    predictions: [{
      model_version: answer.model,
      result: answer.annotations.map((annotation, number) => ({
        id: `phrase-${number}`,
        type: "brushlabels",
        from_name: "tag",
        to_name: "image",
        original_width: picture.width,
        original_height: picture.height,
        image_rotation: 0,
        score: annotation.score,
        value: { format: "rle", brushlabels: [annotation.phrase], rle: brush(annotation.segmentation) },
      })),
    }],
  }];
}

/**
 * Label Studio's run lengths: of the red, green, blue and alpha values row by row, as bits. 32 bits tell their number, 5 the
 * size of a value less one, 4 × 4 the sizes of four kinds of lengths less one; then come runs: a one, two bits for the
 * kind of length, the length less one, the value.
 */
function brush(segmentation) {
  const { width, height, bits } = decode(segmentation);
  const bytes = [];
  let rest = 0;
  let filled = 0;
  const put = (value, size) => {
    for (let bit = size - 1; bit >= 0; bit -= 1) {
      rest = rest * 2 + (Math.floor(value / 2 ** bit) % 2);
      filled += 1;
      if (filled === 8) {
        bytes.push(rest);
        rest = 0;
        filled = 0;
      }
    }
  };
  const sizes = [3, 4, 8, 16];
  put(width * height * 4, 32);
  put(7, 5);
  for (const size of sizes) put(size - 1, 4);
  for (const [value, pixels] of rowRuns(bits)) {
    let left = pixels * 4;
    while (left > 0) {
      const length = Math.min(left, 2 ** 16);
      const kind = sizes.findIndex((size) => length <= 2 ** size);
      put(1, 1);
      put(kind, 2);
      put(length - 1, sizes[kind]);
      put(value, 8);
      left -= length;
    }
  }
  if (filled) put(0, 8 - filled);
  return bytes;
}

/** Runs of values 0 and 255 of `bits`: `[value, length]`. */
function rowRuns(bits) {
  const found = [];
  bits.forEach((bit) => {
    const last = found.at(-1);
    if (last && last[0] === bit * 255) last[1] += 1;
    else found.push([bit * 255, 1]);
  });
  return found;
}
