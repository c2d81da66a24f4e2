// The worker behind vit-edge.mjs: it loads, checks and runs the model, so that the page never waits.

import { decode } from './decoding.mjs';
import { chooseBackend, openEngine } from './engine.mjs';
import { VitEdgeError, toFields } from './errors.mjs';
import { best, compare, mosaic, recorded } from './golden.mjs';
import { fromBase64, openModel, pixelHash } from './model-file.mjs';
import { fit } from './pixels.mjs';

let model = null; // {engine, manifest, exactKinds, order}

async function load({ base, backend, threads }) {
  const about = JSON.parse(new TextDecoder().decode(await fetched(new URL('bundle.json', base))));
  const bytes = await fetched(new URL(about.model, base));
  const manifest = await openModel(bytes, about);
  const exactKinds = await exactKindsOf(about.probes);
  const order = { tallFirst: about.tall_first };
  await checkImages(manifest, exactKinds, order);
  const engine = await openEngine(bytes, manifest, { base, threads, backend: await chooseBackend(backend, manifest) });
  const golden = await checkGolden(engine, manifest);
  model = { engine, manifest, exactKinds, order };
  const { name, labels, precision, preprocessing } = manifest;
  const refusedKinds = [...new Set(about.probes.map(({ kind }) => kind))].filter((kind) => !exactKinds.has(kind));
  return { name, labels, precision, size: preprocessing.crop, sha256: about.sha256, backend: engine.backend, golden, refusedKinds };
}

async function fetched(url) {
  const failed = (reason) =>
    new VitEdgeError('unavailable', 'cannot load', { reason: `${url.pathname}: ${reason}`, remedy: 'check that the whole site was copied' });
  const response = await fetch(url).catch((error) => {
    throw failed(error.message);
  });
  if (!response.ok) throw failed(`the server answers ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}

/** Return the kinds of image that this browser decodes to the very pixels of Python, by small images in the bundle. */
async function exactKindsOf(probes) {
  const isExact = await Promise.all(probes.map(decodesExactly));
  const differing = new Set(probes.filter((_, at) => !isExact[at]).map(({ kind }) => kind));
  return new Set(probes.map(({ kind }) => kind).filter((kind) => !differing.has(kind)));
}

async function decodesExactly({ data, sha256 }) {
  try {
    const image = await decode(fromBase64(data), null);
    return (await pixelHash(image.data, image.height, image.width)) === sha256;
  } catch (error) {
    if (error instanceof VitEdgeError) return false;
    throw error;
  }
}

/** Throw golden-mismatch if an image in the file decodes, turns or resizes to other pixels here. */
async function checkImages({ golden, preprocessing }, exactKinds, order) {
  const [height, width] = preprocessing.crop;
  for (const { format, data, pixels_sha256: expected } of golden?.images ?? []) {
    const pixels = await decode(fromBase64(data), exactKinds).then((image) => fit(image, preprocessing, order), () => null);
    if (pixels && (await pixelHash(pixels, height, width)) === expected) continue;
    const reason = `the ${format} image in the file gives other pixels after preprocessing`;
    const remedy = 'use another browser, or switch off its protection against fingerprinting for this page';
    throw new VitEdgeError('golden-mismatch', 'images are prepared differently here', { reason, remedy });
  }
}

async function checkGolden(engine, manifest) {
  const [height, width] = manifest.preprocessing.crop;
  const { seeds, expected, tolerance } = recorded(manifest);
  const found = await engine.run(seeds.map((seed) => mosaic(seed, height, width)));
  return { inputs: seeds.length, sqnrDb: compare(expected, found, tolerance) };
}

async function classify({ blob, top }) {
  if (!model) throw new VitEdgeError('usage', 'cannot classify', { reason: 'no model is loaded', remedy: 'load it first' });
  const { engine, manifest, exactKinds, order } = model;
  const started = performance.now();
  const image = await decode(new Uint8Array(await blob.arrayBuffer()), exactKinds);
  const decoded = performance.now();
  const pixels = fit(image, manifest.preprocessing, order);
  const resized = performance.now();
  const [logits] = await engine.run([pixels]);
  const ended = performance.now();
  const timings = { decodeMs: decoded - started, resizeMs: resized - decoded, inferenceMs: ended - resized, totalMs: ended - started };
  return { ...named(logits, manifest, top), timings, logits, pixels };
}

function named(logits, { labels, activation }, top) {
  const probabilities = activated(Array.from(logits), activation);
  const answers = best(probabilities).slice(0, top).map((index) => ({ label: labels[index], index, probability: probabilities[index] }));
  return { label: answers[0].label, probability: answers[0].probability, answers };
}

function activated(logits, activation = 'softmax') {
  if (activation === 'none') return logits;
  if (activation === 'sigmoid') return logits.map((value) => 1 / (1 + Math.exp(-value)));
  const largest = logits.reduce((a, b) => Math.max(a, b));
  const powers = logits.map((value) => Math.exp(value - largest));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

async function close() {
  await model?.engine.close();
  model = null;
}

const CALLS = { load, classify, close };
let queue = Promise.resolve(); // an engine runs one image at a time

self.addEventListener('message', ({ data: { id, call, options } }) => {
  queue = queue.then(async () => {
    try {
      self.postMessage({ id, result: await CALLS[call](options) });
    } catch (error) {
      self.postMessage({ id, error: toFields(error) });
    }
  });
});
