// The arithmetic of vit_edge.image in integers: alpha on white, EXIF turns, Pillow's resize, and the crop, bit for bit.

// Pillow's Resample.c: coefficients have 22 fractional bits, the result of the horizontal pass is rounded to 8 bits.
const PRECISION_BITS = 22;

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
const FILTERS = {
  bilinear: { support: 1, weight: (x) => (Math.abs(x) < 1 ? 1 - Math.abs(x) : 0) },
  bicubic: { support: 2, weight: bicubic },
  lanczos: { support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) },
};

function bicubic(value) {
  const [a, x] = [-0.5, Math.abs(value)];
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** Write RGB from RGBA, transparent pixels on white, as Pillow's alpha_composite rounds. */
export function compositeOnWhite(rgba, rgb, at) {
  for (let from = 0; from < rgba.length; from += 4) {
    const alpha = rgba[from + 3];
    for (let channel = 0; channel < 3; channel += 1) {
      const mixed = 128 * (rgba[from + channel] * alpha + 255 * (255 - alpha)) + 0x4000;
      rgb[at++] = ((mixed >> 8) + mixed) >> 15;
    }
  }
}

/** Return {data, width, height} turned as the EXIF orientation says. */
export function upright({ data, width, height }, orientation) {
  if (orientation === 1) return { data, width, height };
  const isTurned = orientation >= 5;
  const [w, h] = isTurned ? [height, width] : [width, height];
  const turned = new Uint8Array(data.length);
  const source = SOURCES[orientation];
  for (let y = 0, to = 0; y < h; y += 1) {
    for (let x = 0; x < w; x += 1, to += 3) {
      const [column, row] = source(x, y, width - 1, height - 1);
      const from = 3 * (row * width + column);
      turned[to] = data[from];
      turned[to + 1] = data[from + 1];
      turned[to + 2] = data[from + 2];
    }
  }
  return { data: turned, width: w, height: h };
}

// EXIF 2.3, tag Orientation: which column and row of the stored image shows at (x, y); `right` and `bottom` are its last.
const SOURCES = {
  2: (x, y, right) => [right - x, y],
  3: (x, y, right, bottom) => [right - x, bottom - y],
  4: (x, y, right, bottom) => [x, bottom - y],
  5: (x, y) => [y, x],
  6: (x, y, right, bottom) => [y, bottom - x],
  7: (x, y, right, bottom) => [right - y, bottom - x],
  8: (x, y, right) => [right - y, x],
};

/**
 * Return uint8 [height, width, 3] of the network's size from an upright RGB image, resized and cropped.
 *
 * Each pass rounds to 8 bits, so their order shows. With `tallFirst` it is that of Pillow 13, which begins with the rows of
 * an image that loses more than twice as many rows as columns; earlier releases always begin with the columns.
 */
export function fit(image, preprocessing, { tallFirst }) {
  const [height, width] = resized(image, preprocessing);
  const [cropHeight, cropWidth] = preprocessing.crop;
  const halve = preprocessing.crop_rounding === 'floor' ? Math.floor : halfEven;
  const rows = windowOf(image.height, height, halve((height - cropHeight) / 2), cropHeight, preprocessing);
  const columns = windowOf(image.width, width, halve((width - cropWidth) / 2), cropWidth, preprocessing);
  const lost = [image.height - height, image.width - width];
  if (tallFirst && lost[0] > 0 && lost[0] > 2 * lost[1]) {
    const [left, right] = spanOf(columns);
    return horizontal(vertical(image, rows, left, right), columns, 0, cropHeight).data;
  }
  const [top, bottom] = spanOf(rows);
  return vertical(horizontal(image, columns, top, bottom), rows, 0, cropWidth).data;
}

/** Return [height, width] that an image is resized to before the crop: Preprocessing.resized. */
export function resized({ width, height }, { resize, keep_ratio: keepsRatio }) {
  if (Array.isArray(resize)) {
    if (!keepsRatio) return resize;
    const ratio = Math.min(height / resize[0], width / resize[1]);
    return [halfEven(height / ratio), halfEven(width / ratio)];
  }
  if (width <= height) return [Math.floor((resize * height) / width), resize];
  return [resize, Math.floor((resize * width) / height)];
}

/** Return Python's round(): half to even. */
function halfEven(value) {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 ? floor + 1 : floor;
}

/** Return, for each of `count` output positions from `first`, where its source begins and the weights, as integers. */
function windowOf(inSize, outSize, first, count, { interpolation }) {
  if (inSize === outSize) return copied(first, count);
  return interpolation === 'nearest' ? nearest(inSize, outSize, first, count) : weighted(inSize, outSize, first, count, interpolation);
}

const ONE = 1 << PRECISION_BITS;
const single = (start) => ({ start, weights: Int32Array.of(ONE) });
const copied = (first, count) => Array.from({ length: count }, (_, position) => single(first + position));

/** Return single pixels: the position is a running sum, whose rounding Pillow's ImagingScaleAffine shows too. */
function nearest(inSize, outSize, first, count) {
  const step = inSize / outSize;
  const starts = [];
  for (let position = 0, at = step * 0.5; position < first + count; position += 1, at += step) starts.push(Math.floor(at));
  return starts.slice(first).map(single);
}

function weighted(inSize, outSize, first, count, interpolation) {
  const { support: radius, weight } = FILTERS[interpolation];
  const scale = inSize / outSize;
  const filterScale = Math.max(scale, 1);
  const [support, step] = [radius * filterScale, 1 / filterScale];
  return Array.from({ length: count }, (_, position) => {
    const center = (first + position + 0.5) * scale;
    const start = Math.max(Math.trunc(center - support + 0.5), 0);
    const end = Math.min(Math.trunc(center + support + 0.5), inSize);
    const values = Array.from({ length: end - start }, (_, x) => weight((x + start - center + 0.5) * step));
    const sum = values.reduce((total, value) => total + value, 0);
    const share = (value) => (sum === 0 ? value : value / sum);
    return { start, weights: Int32Array.from(values, (value) => integer(share(value))) };
  });
}

const integer = (weight) => Math.trunc((weight < 0 ? -0.5 : 0.5) + weight * ONE);

/** Return [first, last + 1] of the positions that are read. */
function spanOf(positions) {
  const ends = positions.map(({ start, weights }) => start + weights.length);
  return [Math.min(...positions.map(({ start }) => start)), Math.max(...ends)];
}

/** Return the weighted sums of columns, for the rows from `top` to `bottom`; `left` is the first column of `data`. */
function horizontal({ data, width, left = 0 }, columns, top, bottom) {
  const sums = new Uint8ClampedArray((bottom - top) * columns.length * 3);
  let to = 0;
  for (let y = top; y < bottom; y += 1) {
    for (const { start, weights } of columns) {
      weigh(data, 3 * (y * width + start - left), 3, weights, sums, to);
      to += 3;
    }
  }
  return { data: new Uint8Array(sums.buffer), width: columns.length, top };
}

/** Return the weighted sums of rows, for the columns from `left` to `right`; `top` is the first row of `data`. */
function vertical({ data, width, top = 0 }, rows, left, right) {
  const sums = new Uint8ClampedArray(rows.length * (right - left) * 3);
  let to = 0;
  for (const { start, weights } of rows) {
    for (let x = left; x < right; x += 1) {
      weigh(data, 3 * ((start - top) * width + x), 3 * width, weights, sums, to);
      to += 3;
    }
  }
  return { data: new Uint8Array(sums.buffer), width: right - left, left };
}

/** Write one pixel, the weighted sum of pixels `step` bytes apart, rounded and clamped to 8 bits. */
function weigh(data, from, step, weights, pixels, to) {
  let red = ONE / 2, green = ONE / 2, blue = ONE / 2; // prettier-ignore
  for (let i = 0, at = from; i < weights.length; i += 1, at += step) {
    const weight = weights[i];
    red += data[at] * weight;
    green += data[at + 1] * weight;
    blue += data[at + 2] * weight;
  }
  pixels[to] = red >> PRECISION_BITS;
  pixels[to + 1] = green >> PRECISION_BITS;
  pixels[to + 2] = blue >> PRECISION_BITS;
}

/** Return float32 [3, height, width], (x / 255 - mean) / std in float32: Preprocessing.normalise. */
export function normalised(pixels, { mean, std }) {
  const size = pixels.length / 3;
  const values = new Float32Array(pixels.length);
  for (let channel = 0; channel < 3; channel += 1) {
    const [center, spread] = [Math.fround(mean[channel]), Math.fround(std[channel])];
    const table = Float32Array.from({ length: 256 }, (_, x) => Math.fround(Math.fround(Math.fround(x / 255) - center) / spread));
    for (let at = 0; at < size; at += 1) values[channel * size + at] = table[pixels[3 * at + channel]];
  }
  return values;
}
