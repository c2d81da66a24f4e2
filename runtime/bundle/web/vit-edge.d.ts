/** How to load a bundle of `vit-edge bundle --web`. */
export interface LoadOptions {
  /** The folder with `bundle.json` and the model; the default is the folder of this module. */
  base?: string | URL;
  /** "auto" takes WebGPU for float32 files on a graphics card, WebAssembly otherwise. */
  backend?: 'auto' | 'wasm' | 'webgpu';
  /** Threads of WebAssembly; more than 1 need the headers COOP and COEP. The default is up to 4. */
  threads?: number;
}

/** What really runs. */
export interface Backend {
  name: 'wasm' | 'webgpu';
  /** The graphics card as WebGPU describes it; null for WebAssembly. */
  adapter: string | null;
  threads: number;
  /** The release of onnxruntime-web. */
  version: string;
}

export interface Answer {
  label: string;
  index: number;
  /** In [0, 1]; the plain value for a model whose activation is "none". */
  probability: number;
}

export interface Timings {
  decodeMs: number;
  resizeMs: number;
  inferenceMs: number;
  totalMs: number;
}

export interface Prediction {
  label: string;
  probability: number;
  /** The most likely labels, the most likely first. */
  answers: Answer[];
  timings: Timings;
  logits: Float32Array;
  /** The network's input, uint8 RGB [height, width, 3]: the very pixels that vit-edge makes in Python. */
  pixels: Uint8Array;
}

export interface Classifier {
  readonly name: string;
  readonly labels: string[];
  readonly precision: 'float32' | 'float16' | 'int8' | 'int8-dynamic';
  /** Height and width of the network's input. */
  readonly size: [number, number];
  /** The SHA-256 of the model file. */
  readonly sha256: string;
  readonly backend: Backend;
  /** The golden inputs that ran at load, and the SQNR of their logits. */
  readonly golden: { inputs: number; sqnrDb: number };
  /** The kinds of image that this browser does not decode exactly; `classify` refuses them. */
  readonly refusedKinds: string[];
  /** Throws VitEdgeError ("image-rejected") for a file that is no JPEG, PNG or WebP image, is damaged or too large. */
  classify(blob: Blob, options?: { top?: number }): Promise<Prediction>;
  close(): Promise<void>;
}

export class VitEdgeError extends Error {
  readonly code: 'usage' | 'image-rejected' | 'not-trusted' | 'golden-mismatch' | 'unavailable' | 'internal';
  readonly what: string;
  readonly reason: string;
  readonly remedy: string;
}

/** Return a classifier, its seal, golden vectors and golden images checked in this browser. */
export function load(options?: LoadOptions): Promise<Classifier>;
