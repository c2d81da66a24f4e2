// Classify images in a page with a model file of vit-edge; types are in vit-edge.d.ts.
//
//     import { load } from './vit-edge.mjs';
//     const classifier = await load();
//     const { label, probability } = await classifier.classify(blob);

import { VitEdgeError, fromFields } from './vit-edge/errors.mjs';

export { VitEdgeError };

const BACKENDS = ['auto', 'wasm', 'webgpu'];

/** Return a classifier of the model in the folder `base`, checked in this browser; the default is this file's folder. */
export async function load({ base = new URL('.', import.meta.url), backend = 'auto', threads } = {}) {
  if (!BACKENDS.includes(backend)) throw misuse(`the backend is ${JSON.stringify(backend)}`, `choose ${BACKENDS.join(', ')}`);
  if (threads !== undefined && !isCount(threads)) throw misuse(`threads is ${threads}`, 'give a whole number of at least 1');
  const worker = new Channel(new Worker(new URL('./vit-edge/worker.mjs', import.meta.url), { type: 'module' }));
  const folder = new URL(base, globalThis.location?.href).href;
  try {
    return new Classifier(worker, await worker.call('load', { base: folder, backend, threads }));
  } catch (error) {
    worker.end();
    throw error;
  }
}

/** A loaded model in a worker. */
class Classifier {
  #worker;

  constructor(worker, about) {
    this.#worker = worker;
    Object.assign(this, about);
  }

  /** Return the `top` most likely labels of an image file (a Blob or File), and the time of each stage. */
  async classify(blob, { top = 5 } = {}) {
    if (!(blob instanceof Blob)) throw misuse('the image is not a Blob', 'give a File, or the blob() of a response');
    if (!isCount(top)) throw misuse(`top is ${top}`, 'give a whole number of at least 1');
    return this.#worker.call('classify', { blob, top });
  }

  /** Free the model and its worker. */
  async close() {
    if (this.#worker.isOpen) await this.#worker.call('close');
    this.#worker.end();
  }
}

/** Calls to a worker and their results, by number. */
class Channel {
  #worker;
  #waiting = new Map();
  #last = 0;
  isOpen = true;

  constructor(worker) {
    this.#worker = worker;
    worker.addEventListener('message', ({ data }) => this.#settle(data));
    worker.addEventListener('error', ({ message }) => this.#fail(message ?? 'a file of the site could not be loaded'));
  }

  call(call, options) {
    if (!this.isOpen) return Promise.reject(misuse('the classifier is closed', 'load it again'));
    const id = (this.#last += 1);
    this.#worker.postMessage({ id, call, options });
    return new Promise((resolve, reject) => this.#waiting.set(id, { resolve, reject }));
  }

  end() {
    this.isOpen = false;
    this.#worker.terminate();
    this.#rejectAll(misuse('the classifier was closed', 'load it again'));
  }

  #settle({ id, result, error }) {
    const { resolve, reject } = this.#waiting.get(id);
    this.#waiting.delete(id);
    if (error) reject(fromFields(error));
    else resolve(result);
  }

  #fail(reason) {
    this.#rejectAll(new VitEdgeError('unavailable', 'the worker stopped', { reason, remedy: 'reload the page' }));
  }

  #rejectAll(error) {
    for (const { reject } of this.#waiting.values()) reject(error);
    this.#waiting.clear();
  }
}

const isCount = (value) => Number.isInteger(value) && value >= 1;

function misuse(reason, remedy) {
  return new VitEdgeError('usage', 'cannot classify', { reason, remedy });
}
