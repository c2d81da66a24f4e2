// onnxruntime-web on WebAssembly (SIMD, and threads if the page is isolated) or on WebGPU.

import { VitEdgeError } from './errors.mjs';
import { rows } from './golden.mjs';
import { normalised } from './pixels.mjs';

const SCRIPTS = { wasm: 'ort.wasm.min.mjs', webgpu: 'ort.webgpu.min.mjs' };
const MOST_THREADS = 4; // more gain nothing on a network of this size, and phones have few fast cores

/** Return the backend to use: WebGPU runs float32 files on a graphics card, WebAssembly everything else. */
export async function chooseBackend(wanted, { precision }) {
  if (wanted === 'wasm') return { name: 'wasm', adapter: null };
  const adapter = await navigator.gpu?.requestAdapter();
  const description = adapter && [adapter.info?.vendor, adapter.info?.architecture].filter(Boolean).join(' ');
  if (wanted === 'webgpu') {
    if (!adapter) throw unavailable('this browser offers no WebGPU adapter');
    // A profile of 1.30 shows MatMul in float32 on WebGPU, and every QuantizeLinear on the CPU with copies both ways.
    if (precision.startsWith('int8')) throw unavailable('ONNX Runtime does not run INT8 on WebGPU');
    return { name: 'webgpu', adapter: description };
  }
  const isSoftware = !adapter || (adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);
  return isSoftware || precision !== 'float32' ? { name: 'wasm', adapter: null } : { name: 'webgpu', adapter: description };
}

/** Return an engine over the verified bytes of a model file. */
export async function openEngine(bytes, manifest, { base, backend, threads }) {
  const ort = await import(new URL(`onnxruntime-web/${SCRIPTS[backend.name]}`, base).href);
  ort.env.wasm.wasmPaths = new URL('onnxruntime-web/', base).href;
  ort.env.wasm.numThreads = backend.name === 'wasm' ? usableThreads(threads) : 1;
  ort.env.logLevel = 'fatal';
  const options = {
    executionProviders: [backend.name],
    // As in Python: with this fusion the INT8 weights of the head are converted back to float at every run.
    extra: { optimization: { disable_specified_optimizers: 'MatMulAddFusion' } },
  };
  try {
    const session = await ort.InferenceSession.create(bytes, options);
    return new Engine(ort, session, manifest, { ...backend, threads: ort.env.wasm.numThreads, version: ort.env.versions.web });
  } catch (error) {
    throw unavailable(String(error.message ?? error).slice(0, 300));
  }
}

/** Threads need SharedArrayBuffer, which a page has only under the headers COOP and COEP. */
function usableThreads(threads) {
  if (!globalThis.crossOriginIsolated) return 1;
  return threads ?? Math.min(MOST_THREADS, navigator.hardwareConcurrency ?? 1);
}

class Engine {
  constructor(ort, session, manifest, backend) {
    Object.assign(this, { ort, session, manifest, backend });
  }

  /** Return logits, one Float32Array for each image, from uint8 RGB images of the network's size. */
  async run(images) {
    const size = this.manifest.input.batch ?? 1;
    const found = [];
    for (let start = 0; start < images.length; start += size) {
      found.push(...(await this.runBatch(images.slice(start, start + size), size)));
    }
    return found;
  }

  /** A fixed batch is filled up with zeros. */
  async runBatch(images, size) {
    const { input, preprocessing, labels } = this.manifest;
    const [height, width] = preprocessing.crop;
    const isPixels = input.dtype === 'uint8';
    const values = new (isPixels ? Uint8Array : Float32Array)(size * height * width * 3);
    images.forEach((pixels, at) => values.set(isPixels ? pixels : normalised(pixels, preprocessing), at * height * width * 3));
    const shape = isPixels ? [size, height, width, 3] : [size, 3, height, width];
    const tensor = new this.ort.Tensor(input.dtype, values, shape);
    const { logits } = await this.session.run({ [input.name]: tensor }, ['logits']);
    return rows(logits.data, labels.length).slice(0, images.length);
  }

  close() {
    return this.session.release();
  }
}

function unavailable(reason) {
  const remedy = 'choose the backend "wasm", or update the browser';
  return new VitEdgeError('unavailable', 'cannot run the model here', { reason, remedy });
}
