// The page: it shows the labels of the image that was dropped, chosen or pasted.

import { load } from './vit-edge.mjs';

const TOP = 5;
const element = (id) => document.getElementById(id);
let classifier = null;

async function start() {
  navigator.serviceWorker?.register('service-worker.js').catch(() => {}); // without it the page works online only
  try {
    classifier = await load();
  } catch (error) {
    showError(error);
    return;
  }
  const { name, labels, precision, size, golden } = classifier;
  element('name').textContent = document.title = name;
  element('about').textContent = `${labels.length} labels, ${precision}, ${size.join(' × ')} pixels. Images stay on this device.`;
  const checked = `${golden.inputs} golden inputs checked here (${golden.sqnrDb.toFixed(1)} dB)`;
  const refused = classifier.refusedKinds.length ? `; not read in this browser: ${classifier.refusedKinds.join(', ')}` : '';
  element('backend').textContent = `Runs on ${described(classifier.backend)}; ${checked}${refused}.`;
  element('file').disabled = false;
  showStatus('Ready.');
}

function described({ name, adapter, threads, version }) {
  const where = name === 'webgpu' ? `WebGPU (${adapter || 'unnamed adapter'})` : `WebAssembly, ${threads} thread${threads > 1 ? 's' : ''}`;
  return `${where}, onnxruntime-web ${version}`;
}

async function show(file) {
  if (!file || !classifier) return;
  showStatus('Classifying …');
  preview(file);
  element('answers').replaceChildren();
  element('timings').textContent = '';
  try {
    const { answers, timings } = await classifier.classify(file, { top: TOP });
    element('answers').replaceChildren(...answers.map(row));
    element('timings').textContent = timed(timings);
    showStatus(file.name ?? '');
  } catch (error) {
    showError(error);
  }
}

function preview(file) {
  const image = element('image');
  URL.revokeObjectURL(image.src);
  Object.assign(image, { src: URL.createObjectURL(file), alt: file.name ?? '', hidden: false });
  element('hint').textContent = 'Drop another image, or choose a file';
}

function row({ label, probability }) {
  const isShare = probability >= 0 && probability <= 1;
  const value = document.createElement('span');
  value.textContent = isShare ? `${(100 * probability).toFixed(1)} %` : probability.toPrecision(4);
  const name = document.createElement('span');
  name.textContent = label;
  const meter = document.createElement('meter');
  meter.value = isShare ? probability : 0;
  const item = document.createElement('li');
  item.append(name, value, meter);
  return item;
}

function timed({ decodeMs, resizeMs, inferenceMs, totalMs }) {
  const ms = (value) => `${value.toFixed(1)} ms`;
  return `Decoding ${ms(decodeMs)}, resizing ${ms(resizeMs)}, network ${ms(inferenceMs)}; ${ms(totalMs)} in all.`;
}

function showStatus(text) {
  element('status').className = '';
  element('status').textContent = text;
}

function showError(error) {
  element('status').className = 'wrong';
  element('status').textContent = error.message;
}

const drop = element('drop');
element('file').addEventListener('change', ({ target }) => show(target.files[0]));
addEventListener('paste', ({ clipboardData }) => show(clipboardData.files[0]));
addEventListener('dragover', (event) => {
  event.preventDefault();
  drop.classList.add('over');
});
addEventListener('dragleave', () => drop.classList.remove('over'));
addEventListener('drop', (event) => {
  event.preventDefault();
  drop.classList.remove('over');
  show(event.dataTransfer.files[0]);
});
start();
