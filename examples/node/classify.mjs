#!/usr/bin/env node
// Classify pixels with a model file of vit-edge in Node.js: nothing but the .onnx, onnxruntime-node and protobufjs.
//
//     node classify.mjs model.int8.onnx --golden
//     node classify.mjs model.int8.onnx --raw 32x32 image.rgb
//
// docs/model-file.md says what the file holds; exit codes are those of vit-edge.

import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import ort from 'onnxruntime-node';
import protobuf from 'protobufjs/light.js';

const SCHEMA = 1;
const MANIFEST_KEY = 'vit_edge.manifest';
const SEAL_KEY = 'vit_edge.seal';
const GENERATOR = 'splitmix64-mosaic-1';
const MOST_GOLDEN_INPUTS = 64;
const USAGE = 'node classify.mjs MODEL.onnx (--golden | --raw WIDTHxHEIGHT FILE.rgb) [--top N] [--threads N] [--json]';

// The part of onnx.proto that is read here; what is not named is skipped.
const schema = protobuf.Root.fromJSON({
  nested: {
    ModelProto: { fields: { metadataProps: { rule: 'repeated', type: 'StringStringEntryProto', id: 14 } } },
    StringStringEntryProto: { fields: { key: { type: 'string', id: 1 }, value: { type: 'string', id: 2 } } },
  },
});
const ModelProto = schema.lookupType('ModelProto');

/** What failed, in which file, why, what to do, and the exit code: 2 usage, 3 bad input, 4 not trusted, 6 mismatch. */
class Failure extends Error {
  constructor(exitCode, what, { file, reason, remedy }) {
    super(`${[what, file].filter(Boolean).join(' ')}: ${reason}\ntry: ${remedy}`);
    this.exitCode = exitCode;
  }
}

/** Return the bytes of the model file and its manifest; throws where the seal is broken or it cannot be run here. */
function openModel(file) {
  const data = readBytes(file);
  checkSeal(data, file);
  const reject = (reason, remedy = 'export it again with `vit-edge export`') =>
    new Failure(3, 'cannot use the model file', { file, reason, remedy });
  let manifest;
  try {
    const properties = new Map(ModelProto.decode(data).metadataProps.map(({ key, value }) => [key, value]));
    manifest = JSON.parse(properties.get(MANIFEST_KEY));
  } catch (error) {
    throw reject(`its manifest cannot be read (${error.message})`);
  }
  if (manifest.schema !== SCHEMA) throw reject(`its manifest has schema ${manifest.schema}; this reads ${SCHEMA}`);
  if (manifest.weights) throw reject(`its weights lie in ${manifest.weights.file} beside it`, 'run it with vit-edge');
  const { dtype, layout } = manifest.input;
  if (dtype !== 'uint8' || layout !== 'NHWC') throw reject(`its input is ${dtype} ${layout}; uint8 NHWC is read here`);
  return { data, manifest };
}

/** Throw unless the file ends in the SHA-256 of every byte before it, as one more serialized ModelProto. */
function checkSeal(data, file) {
  const distrust = (reason) =>
    new Failure(4, 'will not load the model file', { file, reason, remedy: 'copy it again from where it was made' });
  const seal = (digest) => ModelProto.encode({ metadataProps: [{ key: SEAL_KEY, value: digest }] }).finish();
  const sealBytes = seal('0'.repeat(64)).length;
  const body = data.subarray(0, -sealBytes);
  const found = data.subarray(-sealBytes);
  const digest = createHash('sha256').update(body).digest('hex');
  if (found.equals(seal(digest))) return;
  const sealed = found.subarray(0, -64).equals(seal('0'.repeat(64)).subarray(0, -64));
  throw distrust(sealed ? 'its bytes are not those that were sealed' : 'it has no seal of vit-edge at its end');
}

function readBytes(file) {
  try {
    return readFileSync(file);
  } catch (error) {
    throw new Failure(3, 'cannot read', { file, reason: error.message, remedy: 'check the path' });
  }
}

async function openSession({ data }, file, threads) {
  const options = {
    executionProviders: ['cpu'],
    intraOpNumThreads: threads,
    interOpNumThreads: 1,
    logSeverityLevel: 3,
    // As vit-edge's own runtime sets them: integers stay integers in the head, and idle threads sleep.
    extra: {
      optimization: { disable_specified_optimizers: 'MatMulAddFusion' },
      session: { intra_op: { allow_spinning: '0' } },
    },
  };
  try {
    return await ort.InferenceSession.create(data, options);
  } catch (error) {
    const remedy = 'update onnxruntime-node, or export it again';
    throw new Failure(3, 'ONNX Runtime cannot load the model', { file, reason: error.message, remedy });
  }
}

/** Return logits, one Float32Array for each image, from uint8 RGB images one after the other. */
async function run(session, manifest, pixels) {
  const [height, width] = manifest.preprocessing.crop;
  const imageBytes = height * width * 3;
  const count = pixels.length / imageBytes;
  const size = manifest.input.batch ?? count; // a fixed batch is filled up with black
  const logits = [];
  for (let start = 0; start < count; start += size) {
    const part = new Uint8Array(size * imageBytes);
    part.set(pixels.subarray(start * imageBytes, (start + size) * imageBytes));
    const images = new ort.Tensor('uint8', part, [size, height, width, 3]);
    const { logits: found } = await session.run({ [manifest.input.name]: images }, ['logits']);
    logits.push(...rows(found.data, manifest.labels.length));
  }
  return logits.slice(0, count);
}

function rows(values, length) {
  return Array.from({ length: values.length / length }, (_, row) => values.slice(row * length, (row + 1) * length));
}

/** Return the top byte of each of the first `count` outputs of SplitMix64 seeded with `stream` x 2^32. */
function splitMix64(stream, count) {
  const wrap = (value) => BigInt.asUintN(64, value);
  const bytes = new Uint8Array(count);
  let state = wrap(stream << 32n);
  for (let position = 0; position < count; position += 1) {
    state = wrap(state + 0x9e3779b97f4a7c15n);
    let z = wrap((state ^ (state >> 30n)) * 0xbf58476d1ce4e5b9n);
    z = wrap((z ^ (z >> 27n)) * 0x94d049bb133111ebn);
    bytes[position] = Number((z ^ (z >> 31n)) >> 56n);
  }
  return bytes;
}

/** Return the golden input of one seed: coloured tiles under fine noise, uint8 [height, width, 3]. */
function mosaic(seed, height, width) {
  const tiles = 2 + (seed % 7);
  const colours = splitMix64(2n * BigInt(seed), tiles * tiles * 3);
  const pixels = splitMix64(2n * BigInt(seed) + 1n, height * width * 3);
  for (let y = 0; y < height; y += 1) {
    for (let x = 0; x < width; x += 1) {
      const tile = Math.floor((y * tiles) / height) * tiles + Math.floor((x * tiles) / width);
      for (let channel = 0; channel < 3; channel += 1) {
        const at = (y * width + x) * 3 + channel;
        pixels[at] = (3 * colours[tile * 3 + channel] + pixels[at]) >> 2;
      }
    }
  }
  return pixels;
}

/** Run the golden inputs; returns how far the logits are from those promised, and a sentence for each broken bound. */
async function checkGolden(session, manifest, file) {
  const { seeds, expected, tolerance } = promised(manifest, file);
  const [height, width] = manifest.preprocessing.crop;
  const found = await run(session, manifest, Buffer.concat(seeds.map((seed) => mosaic(seed, height, width))));
  let [signal, noise, largest, changed, excess] = [0, 0, 0, 0, 0];
  const { sqnr_db: leastDb, top1_gap: gap } = tolerance;
  expected.forEach((promise, row) => {
    const allowed = allowedOf(promise, tolerance);
    promise.forEach((value, column) => {
      const difference = Math.abs(found[row][column] - value);
      [signal, noise, largest] = [signal + value ** 2, noise + difference ** 2, Math.max(largest, difference)];
      excess = Math.max(excess, difference - allowed[column]);
    });
    const [first, second = -Infinity] = [...promise].sort((a, b) => b - a);
    if (gap != null && first - second > gap && best(promise)[0] !== best(found[row])[0]) changed += 1;
  });
  const level = 10 * Math.log10(signal / noise);
  const problems = [];
  if (!found.every((row) => row.every(Number.isFinite))) problems.push('not every logit is finite');
  if (excess > 0) problems.push(`a logit is ${excess} beyond its bound`);
  if (leastDb != null && !(level >= leastDb)) problems.push(`SQNR is ${level.toFixed(1)} dB, below ${leastDb} dB`);
  if (changed) problems.push(`${changed} clear predictions changed`);
  return { inputs: seeds.length, largest_difference: largest, sqnr_db: noise ? level : null, problems };
}

/** Return how far each logit of one image may be off: a share of their spread, or in older files of its own size. */
function allowedOf(logits, { absolute, relative, spread, least_spread: leastSpread }) {
  const scale = Math.max(Math.max(...logits) - Math.min(...logits), leastSpread ?? 0);
  const most = spread == null ? Infinity : spread * scale;
  const isEach = absolute != null || relative != null;
  return logits.map((value) => Math.min(most, isEach ? (absolute ?? 0) + (relative ?? 0) * Math.abs(value) : Infinity));
}

/** Return the seeds, and the golden logits and tolerance for ONNX Runtime. */
function promised({ golden, labels }, file) {
  const reject = (reason) =>
    new Failure(3, 'cannot check the model', { file, reason, remedy: 'export it again with ONNX Runtime installed' });
  const entry = golden?.expected?.find(({ engines }) => engines.includes('onnxruntime'));
  if (!entry) throw reject('the file has no golden logits for onnxruntime');
  if (golden.generator !== GENERATOR) throw reject(`the golden inputs come from ${golden.generator}, which this example does not know`);
  const { seeds } = golden;
  if (!(seeds.length >= 1 && seeds.length <= MOST_GOLDEN_INPUTS)) throw reject(`the file has ${seeds.length} golden inputs`);
  const bytes = Buffer.from(entry.logits, 'base64');
  const values = Float32Array.from({ length: bytes.length / 4 }, (_, position) => bytes.readFloatLE(4 * position));
  if (values.length !== seeds.length * labels.length) throw reject(`the file has ${values.length} golden logits`);
  const { absolute, relative, spread, sqnr_db: leastDb } = entry.tolerance;
  if ((absolute ?? relative ?? spread ?? leastDb) == null) throw reject('the tolerance has no bound');
  return { seeds, expected: rows(values, labels.length), tolerance: entry.tolerance };
}

/** Return class indices, the largest value first; equal ones in class order. */
function best(values) {
  return Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
}

/** Return what the manifest's activation makes of logits: softmax if it names none. */
function activated(logits, activation = 'softmax') {
  if (activation === 'none') return logits;
  if (activation === 'sigmoid') return logits.map((value) => 1 / (1 + Math.exp(-value)));
  const largest = Math.max(...logits);
  const powers = logits.map((value) => Math.exp(value - largest));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

/** Return the `top` likeliest labels with their probabilities, and the logits. */
async function classify(session, manifest, { file, size, top }) {
  const [height, width] = manifest.preprocessing.crop;
  const pixels = readBytes(file);
  if (size !== `${width}x${height}` || pixels.length !== width * height * 3) {
    const reason = `the file has ${pixels.length} bytes for ${size}; the network takes ${width}x${height} of 3 bytes`;
    const remedy = 'make them with Pillow, as README.md shows';
    throw new Failure(3, 'cannot use the pixels', { file, reason, remedy });
  }
  const [logits] = await run(session, manifest, pixels);
  const probabilities = activated(Array.from(logits), manifest.activation);
  const answers = best(logits)
    .slice(0, top)
    .map((index) => ({ label: manifest.labels[index], index, probability: probabilities[index] }));
  return { file, label: answers[0].label, probability: answers[0].probability, answers, logits: Array.from(logits) };
}

function readArguments() {
  const options = {
    golden: { type: 'boolean' },
    raw: { type: 'string' },
    top: { type: 'string', default: '3' },
    threads: { type: 'string', default: '1' },
    json: { type: 'boolean' },
  };
  const misuse = (reason) => new Failure(2, 'cannot run', { reason, remedy: USAGE });
  let parsed;
  try {
    parsed = parseArgs({ options, allowPositionals: true });
  } catch (error) {
    throw misuse(error.message);
  }
  const { values, positionals } = parsed;
  if (positionals.length !== (values.golden ? 1 : 2) || Boolean(values.golden) === Boolean(values.raw)) {
    throw misuse('give a model, and either --golden or --raw with a file of pixels');
  }
  const [top, threads] = [Number(values.top), Number(values.threads)];
  if (![top, threads].every((value) => Number.isInteger(value) && value >= 1 && value <= 256)) {
    throw misuse('--top and --threads are whole numbers from 1 to 256');
  }
  return { ...values, top, threads, model: positionals[0], file: positionals[1] };
}

async function main() {
  const options = readArguments();
  const model = openModel(options.model);
  const { manifest } = model;
  const session = await openSession(model, options.model, options.threads);
  const engine = { engine: 'onnxruntime-node', engine_version: ort.env.versions.node };
  const described = { name: manifest.name, precision: manifest.precision, labels: manifest.labels.length, ...engine };
  if (options.golden) {
    const golden = await checkGolden(session, manifest, options.model);
    const { inputs, largest_difference: largest, sqnr_db: level, problems } = golden;
    const distance = `largest difference ${largest.toPrecision(3)}, SQNR ${level?.toFixed(1) ?? 'infinite'} dB`;
    console.log(options.json ? JSON.stringify({ model: described, golden }) : `${inputs} golden inputs: ${distance}`);
    if (problems.length) {
      const remedy = 'do not use the file here: it was edited, or this machine computes differently';
      const reason = problems.join('; ');
      throw new Failure(6, 'the model gives other logits here', { file: options.model, reason, remedy });
    }
    return;
  }
  const answer = await classify(session, manifest, { file: options.file, size: options.raw, top: options.top });
  const shown = answer.answers.map(({ label, probability }) => `${label} ${(100 * probability).toFixed(1)}%`);
  const line = `${answer.file}: ${shown.join('  ')}`;
  console.log(options.json ? JSON.stringify({ model: described, image: answer }) : line);
}

try {
  await main();
} catch (error) {
  if (!(error instanceof Failure)) throw error;
  console.error(`error: ${error.message}`);
  process.exitCode = error.exitCode;
}
