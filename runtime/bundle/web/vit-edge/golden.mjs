// Golden inputs from seeds, and whether logits are within the tolerance of those that the file holds: checks/golden.py.

import { VitEdgeError } from './errors.mjs';
import { fromBase64 } from './model-file.mjs';

const GENERATOR = 'splitmix64-mosaic-1';
const MOST_INPUTS = 64;

/** Return uint8 [height, width, 3] of one seed: a mosaic of colored tiles under fine noise. */
export function mosaic(seed, height, width) {
  const tiles = 2 + (seed % 7);
  const colors = splitMix64(2 * seed, tiles * tiles * 3);
  const pixels = splitMix64(2 * seed + 1, height * width * 3);
  for (let y = 0, at = 0; y < height; y += 1) {
    const row = Math.floor((y * tiles) / height) * tiles;
    for (let x = 0; x < width; x += 1) {
      const tile = 3 * (row + Math.floor((x * tiles) / width));
      for (let channel = 0; channel < 3; channel += 1, at += 1) {
        pixels[at] = (3 * colors[tile + channel] + pixels[at]) >> 2;
      }
    }
  }
  return pixels;
}

/** Return the top byte of each of `count` outputs of SplitMix64 seeded with `stream` x 2^32, in halves of 32 bits. */
function splitMix64(stream, count) {
  const bytes = new Uint8Array(count);
  let [high, low] = [stream >>> 0, 0];
  for (let at = 0; at < count; at += 1) {
    const sum = low + 0x7f4a7c15;
    [high, low] = [(high + 0x9e3779b9 + (sum > 0xffffffff ? 1 : 0)) >>> 0, sum >>> 0];
    bytes[at] = topByte(high, low);
  }
  return bytes;
}

function topByte(high, low) {
  let a = (high ^ (high >>> 30)) >>> 0;
  let b = (low ^ ((low >>> 30) | (high << 2))) >>> 0;
  [a, b] = times(a, b, 0xbf58476d, 0x1ce4e5b9);
  [a, b] = times((a ^ (a >>> 27)) >>> 0, (b ^ ((b >>> 27) | (a << 5))) >>> 0, 0x94d049bb, 0x133111eb);
  return (a ^ (a >>> 31)) >>> 24;
}

/** Return the product of two 64-bit numbers modulo 2^64; each is (high, low). */
function times(high, low, otherHigh, otherLow) {
  const [a, b, c, d] = [low >>> 16, low & 0xffff, otherLow >>> 16, otherLow & 0xffff];
  const middle = a * d + ((b * d) >>> 16);
  const carried = b * c + (middle % 0x10000);
  const top = a * c + Math.floor(middle / 0x10000) + Math.floor(carried / 0x10000);
  const crossed = Math.imul(high, otherLow) + Math.imul(low, otherHigh);
  return [(top + crossed) >>> 0, Math.imul(low, otherLow) >>> 0];
}

/** Return {seeds, expected, tolerance} that the manifest holds for ONNX Runtime; throws golden-mismatch if it has none. */
export function recorded({ golden, labels }) {
  const entry = golden?.expected?.find(({ engines }) => engines.includes('onnxruntime'));
  if (!entry) throw mismatch('the file has no golden logits for ONNX Runtime');
  if (golden.generator !== GENERATOR) throw mismatch(`the golden inputs come from ${golden.generator}, which is unknown here`);
  const { seeds } = golden;
  if (!(seeds.length >= 1 && seeds.length <= MOST_INPUTS)) throw mismatch(`the file has ${seeds.length} golden inputs`);
  const values = new Float32Array(fromBase64(entry.logits).buffer);
  if (values.length !== seeds.length * labels.length) throw mismatch(`the file has ${values.length} golden logits`);
  const { absolute, relative, spread, sqnr_db: leastDb } = entry.tolerance;
  if ((absolute ?? relative ?? spread ?? leastDb) == null) throw mismatch('the tolerance has no bound');
  return { seeds, expected: rows(values, labels.length), tolerance: entry.tolerance };
}

/** Return the SQNR in dB of logits, one row an image; throws golden-mismatch if a bound is broken. */
export function compare(expected, found, tolerance) {
  let [signal, noise, excess, changed] = [0, 0, 0, 0];
  expected.forEach((row, image) => {
    const allowed = allowedOf(row, tolerance);
    row.forEach((value, column) => {
      const difference = Math.abs(found[image][column] - value);
      signal += value ** 2;
      noise += difference ** 2;
      excess = Math.max(excess, difference - allowed(value));
    });
    if (isClear(row, tolerance.top1_gap) && best(row)[0] !== best(found[image])[0]) changed += 1;
  });
  const level = noise ? 10 * Math.log10(signal / noise) : Infinity;
  const problems = [];
  if (!found.every((row) => row.every(Number.isFinite))) problems.push('not every logit is finite');
  if (excess > 0) problems.push(`a logit is ${excess.toPrecision(3)} beyond its bound`);
  if (tolerance.sqnr_db != null && !(level >= tolerance.sqnr_db)) {
    problems.push(`SQNR is ${level.toFixed(1)} dB, below ${tolerance.sqnr_db} dB`);
  }
  if (changed) problems.push(`${changed} clear predictions changed`);
  if (problems.length) throw mismatch(`on ${expected.length} golden inputs, ${problems.join('; ')}`);
  return level;
}

function allowedOf(row, { absolute, relative, spread, least_spread: leastSpread }) {
  const range = Math.max(row.reduce((a, b) => Math.max(a, b)) - row.reduce((a, b) => Math.min(a, b)), leastSpread ?? 0);
  const most = spread == null ? Infinity : spread * range;
  const isEach = absolute != null || relative != null;
  return (value) => Math.min(most, isEach ? (absolute ?? 0) + (relative ?? 0) * Math.abs(value) : Infinity);
}

function isClear(row, gap) {
  const [first, second = first] = best(row);
  return gap != null && (row.length < 2 || row[first] - row[second] > gap);
}

/** Return class indices, the largest value first; equal ones in class order. */
export function best(values) {
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
}

/** Return an array as rows of `length` values. */
export function rows(values, length) {
  return Array.from({ length: values.length / length }, (_, row) => values.slice(row * length, (row + 1) * length));
}

function mismatch(reason) {
  const remedy = 'do not use the model in this browser: it was edited, or this browser computes differently';
  return new VitEdgeError('golden-mismatch', 'the model gives other logits here', { reason, remedy });
}
