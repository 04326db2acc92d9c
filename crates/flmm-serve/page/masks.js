// Masks and maps as numbers.

/** Okabe and Ito's palette without black, as the command line draws it. */
const PALETTE = [
  [0, 114, 178], [230, 159, 0], [0, 158, 115], [213, 94, 0], [204, 121, 167], [86, 180, 233], [240, 228, 66],
];

/** Colour of phrase number `index`, as red, green, blue. */
export function colour(index) {
  return PALETTE[index % PALETTE.length];
}

/** Lengths of runs, background first, from COCO's compressed text. */
function runs(counts) {
  const lengths = [];
  let at = 0;
  while (at < counts.length) {
    let value = 0;
    let shift = 0;
    let code;
    do {
      code = counts.charCodeAt(at) - 48;
      at += 1;
      value += (code & 31) * 2 ** shift;
      shift += 5;
    } while (code & 32);
    if (code & 16) value -= 2 ** shift;
    if (lengths.length > 2) value += lengths[lengths.length - 2];
    lengths.push(value);
  }
  return lengths;
}

/** A mask `{width, height, bits}`, row by row, from COCO's form, whose runs go down the columns. */
export function decode({ size: [height, width], counts }) {
  const bits = new Uint8Array(width * height);
  let at = 0;
  runs(counts).forEach((length, number) => {
    if (number % 2) {
      for (let i = at; i < at + length; i += 1) bits[(i % height) * width + Math.floor(i / height)] = 1;
    }
    at += length;
  });
  return { width, height, bits };
}

/** Where a point of the picture, in shares of it, lies in maps of attention: the cell's number. */
export function cellAt({ rows, columns, picture: [x0, y0, width, height] }, x, y) {
  const cell = (start, size, share, count) => Math.min(count - 1, Math.floor((start + share * size) * count));
  return cell(y0, height, y, rows) * columns + cell(x0, width, x, columns);
}

/**
 * How much more every token looks at every cell than tokens usually do: what is looked at anyway (borders, sinks) drops out.
 * One Float32Array per token.
 */
export function relative({ maps, rows, columns }) {
  const cells = rows * columns;
  const shares = maps.map((map) => {
    const total = map.reduce((sum, value) => sum + value, 0) || 1;
    return map.map((value) => value / total);
  });
  const usual = new Float32Array(cells);
  for (const share of shares) share.forEach((value, cell) => { usual[cell] += value / shares.length; });
  return shares.map((share) => share.map((value, cell) => value / (usual[cell] + 0.1 / cells)));
}

/** The mean of some maps. */
export function mean(maps) {
  const sum = new Float32Array(maps[0]?.length ?? 0);
  for (const map of maps) map.forEach((value, cell) => { sum[cell] += value / maps.length; });
  return sum;
}

/** Numbers of the tokens that share a character with `start..end`. */
export function tokensOf(offsets, start, end) {
  const numbers = [];
  offsets.forEach(([from, to], token) => { if (from < end && to > start) numbers.push(token); });
  return numbers;
}
